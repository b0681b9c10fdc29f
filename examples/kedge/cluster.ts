import { createRequire } from 'node:module';
import { setTimeout as sleep } from 'node:timers/promises';
import type { KubeConfig, KubernetesObject } from '@kubernetes/client-node';
import { request } from 'undici';

/** Loaded where there is something to ask it: that takes longer than all else of a start. */
const kubernetes = () =>
  createRequire(import.meta.url)('@kubernetes/client-node') as typeof import('@kubernetes/client-node');

const RETRY_MS = 500;
/** When the API server is to end a watch, and after how much silence it is taken for dead. */
const WATCH_SECONDS = 50;
const SILENCE_MS = 60_000;

/** How to reach the API server where neither the service account nor the kubeconfig says it; empty: as they do. */
export interface ClusterOptions {
  url: string;
  caFile: string;
  tokenFile: string;
  isInsecure: boolean;
  kubeconfig: string;
  user: string;
}

/** Rejects what cannot be read. */
export function clusterOf({ url, caFile, tokenFile, isInsecure, kubeconfig, user }: ClusterOptions): KubeConfig {
  const config = new (kubernetes().KubeConfig)();
  if (url !== '') {
    const authProvider = { name: 'tokenFile', config: { tokenFile } };
    config.loadFromOptions({
      clusters: [
        { name: 'own', server: url.replace(/\/$/, ''), caFile: caFile || undefined, skipTLSVerify: isInsecure },
      ],
      users: [tokenFile === '' ? { name: 'own' } : { name: 'own', authProvider }],
      contexts: [{ name: 'own', cluster: 'own', user: 'own' }],
      currentContext: 'own',
    });
    return config;
  }
  if (kubeconfig === '') config.loadFromDefault();
  else config.loadFromFile(kubeconfig);
  const context = config.getContextObject(config.currentContext);
  if (context === null) throw new Error('the kubeconfig has no current context');
  if (user !== '') {
    if (config.getUser(user) === null) throw new Error(`the kubeconfig has no user "${user}"`);
    config.contexts = config.contexts.map((each) => (each === context ? { ...each, user } : each));
  }
  return config;
}

interface Event<T> {
  readonly type: 'ADDED' | 'MODIFIED' | 'DELETED' | 'BOOKMARK' | 'ERROR';
  readonly object: T & { code?: number };
}

/**
 * Lists and then watches objects (https://kubernetes.io/docs/reference/using-api/api-concepts/): `changed` is given all of
 * them, each time; while the API server is away it hears nothing. Returns what ends it.
 */
export function watchAll<T extends KubernetesObject>(
  cluster: KubeConfig,
  path: string,
  labelSelector: string,
  changed: (objects: readonly T[]) => void,
  failed: (error: Error) => void = () => {},
): () => void {
  const ending = new AbortController();
  let objects = new Map<string, T>();
  /** What is known; undefined: nothing that the server still remembers. */
  let version: string | undefined;

  const get = async (query: Record<string, string>) => {
    const url = `${cluster.getCurrentCluster()!.server}${path}?${new URLSearchParams({ labelSelector, ...query })}`;
    const { HttpMethod, RequestContext } = kubernetes();
    const context = new RequestContext(url, HttpMethod.GET);
    await cluster.applySecurityAuthentication(context);
    const dispatcher = context.getDispatcher();
    const { statusCode, body } = await request(url, {
      headers: context.getHeaders(),
      ...(dispatcher === undefined ? {} : { dispatcher }),
      signal: ending.signal,
      headersTimeout: SILENCE_MS,
      bodyTimeout: SILENCE_MS,
    });
    if (statusCode === 200) return body;
    await body.dump();
    if (statusCode === 410) version = undefined;
    throw new Error(`the API server answers ${statusCode} to ${path}`);
  };

  const list = async () => {
    const body = await get({});
    const { items, metadata } = (await body.json()) as { items: T[]; metadata: { resourceVersion: string } };
    objects = new Map(items.map((each) => [keyOf(each), each]));
    version = metadata.resourceVersion;
    changed(items);
  };

  const watch = async (resourceVersion: string) => {
    const timeoutSeconds = String(WATCH_SECONDS);
    const body = await get({ watch: 'true', resourceVersion, allowWatchBookmarks: 'true', timeoutSeconds });
    body.setEncoding('utf8');
    let rest = '';
    for await (const chunk of body) {
      const lines = (rest + chunk).split('\n');
      rest = lines.pop()!;
      for (const line of lines) take(JSON.parse(line) as Event<T>);
      if (lines.length > 0) changed([...objects.values()]);
    }
  };

  const take = ({ type, object }: Event<T>) => {
    if (type === 'ERROR') {
      // Gone: it has forgotten what happened since.
      if (object.code === 410) version = undefined;
      throw new Error(`the API server ends the watch of ${path} with ${object.code}`);
    }
    version = object.metadata!.resourceVersion!;
    if (type === 'DELETED') objects.delete(keyOf(object));
    else if (type !== 'BOOKMARK') objects.set(keyOf(object), object);
  };

  const run = async () => {
    while (!ending.signal.aborted) {
      const known = version;
      try {
        if (known === undefined) await list();
        await watch(version!);
      } catch (error) {
        // Listed again at once where the server no longer knows where we were.
        if (known !== undefined && version === undefined) continue;
        if (!ending.signal.aborted) failed(error as Error);
      }
      await sleep(RETRY_MS, undefined, { ref: false });
    }
  };
  void run();
  return () => ending.abort();
}

function keyOf({ metadata }: KubernetesObject): string {
  return `${metadata?.namespace ?? ''}/${metadata?.name ?? ''}`;
}
