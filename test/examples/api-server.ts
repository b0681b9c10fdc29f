import { once } from 'node:events';
import { writeFileSync } from 'node:fs';
import type http from 'node:http';
import https from 'node:https';
import type { AddressInfo } from 'node:net';
import { join } from 'node:path';
import type { TestContext } from 'node:test';
import { authority } from '../helpers/kedge.ts';
import { tempDir } from '../helpers/temp.ts';

/** An object of the API, as a test writes it. */
export interface Item {
  metadata: {
    name: string;
    namespace?: string;
    labels?: Record<string, string>;
    annotations?: Record<string, string>;
    resourceVersion?: string;
  };
  [field: string]: unknown;
}

interface Change {
  version: number;
  type: 'ADDED' | 'MODIFIED' | 'DELETED';
  object: Item;
}

const TOKEN = 'service-account-token';
const NAMESPACED = /^\/apis\/discovery\.k8s\.io\/v1\/namespaces\/([^/]+)\/(endpointslices)$/;
const SERVICES = '/api/v1/services';

/**
 * A Kubernetes API server for EndpointSlices and Services, over TLS and with a token: lists, watches with versions, bookmarks and
 * timeouts, and forgets what is old; it can go away and come back on the same port.
 */
export class ApiServer {
  readonly kubeconfig: string;
  readonly requests: string[] = [];
  private readonly tls: https.ServerOptions;
  private readonly kinds = { endpointslices: new Map<string, Item>(), services: new Map<string, Item>() };
  private readonly log: { kind: Kind; change: Change }[] = [];
  private readonly watchers = new Set<{ response: http.ServerResponse; send(kind: Kind, change: Change): void }>();
  private version = 100;
  private forgotten = 0;
  private server: https.Server | undefined;
  private port = 0;
  /** The status of every answer, where it is not what was asked for. */
  failing: number | undefined;
  /** How 410 is said: in the head, or in the stream as real servers do most often. */
  gone: 'status' | 'event' = 'event';

  private constructor(tls: https.ServerOptions, folder: string) {
    this.tls = tls;
    this.kubeconfig = join(folder, 'kubeconfig');
  }

  static async start(t: TestContext): Promise<ApiServer> {
    const ca = await authority();
    const folder = await tempDir(t);
    const api = new ApiServer(await ca.issue({ cn: 'kube-apiserver', ip: ['127.0.0.1'] }), folder);
    await api.up();
    t.after(() => api.down());
    const cluster = {
      server: `https://127.0.0.1:${api.port}`,
      'certificate-authority-data': Buffer.from(ca.cert).toString('base64'),
    };
    const config = {
      apiVersion: 'v1',
      kind: 'Config',
      clusters: [{ name: 'c', cluster }],
      users: [{ name: 'u', user: { token: TOKEN } }],
      contexts: [{ name: 'x', context: { cluster: 'c', user: 'u' } }],
      'current-context': 'x',
    };
    writeFileSync(api.kubeconfig, JSON.stringify(config));
    writeFileSync(join(folder, 'ca.crt'), ca.cert);
    writeFileSync(join(folder, 'token'), TOKEN);
    return api;
  }

  get url(): string {
    return `https://127.0.0.1:${this.port}`;
  }

  async up(): Promise<void> {
    this.server = https.createServer(this.tls, (request, response) => this.answer(request, response));
    this.server.listen(this.port, '127.0.0.1');
    await once(this.server, 'listening');
    this.port = (this.server.address() as AddressInfo).port;
  }

  /** Resets every connection and takes no other. */
  async down(): Promise<void> {
    const { server } = this;
    if (server === undefined) return;
    this.server = undefined;
    server.closeAllConnections();
    await new Promise((resolve) => server.close(resolve));
  }

  /** Ends the watches in peace. */
  endWatches(): void {
    for (const { response } of this.watchers) response.end();
  }

  put(kind: Kind, item: Item): void {
    const key = keyOf(item);
    const type = this.kinds[kind].has(key) ? 'MODIFIED' : 'ADDED';
    this.version += 1;
    const object = { ...item, metadata: { ...item.metadata, resourceVersion: String(this.version) } };
    this.kinds[kind].set(key, object);
    this.happened(kind, { version: this.version, type, object });
  }

  remove(kind: Kind, item: Item): void {
    const object = this.kinds[kind].get(keyOf(item))!;
    this.kinds[kind].delete(keyOf(item));
    this.version += 1;
    this.happened(kind, {
      version: this.version,
      type: 'DELETED',
      object: { ...object, metadata: { ...object.metadata, resourceVersion: String(this.version) } },
    });
  }

  /** Whoever watches from before this moment is told that it is gone. */
  forget(): void {
    this.forgotten = this.version;
  }

  private happened(kind: Kind, change: Change): void {
    this.log.push({ kind, change });
    for (const watcher of this.watchers) watcher.send(kind, change);
  }

  private answer(request: http.IncomingMessage, response: http.ServerResponse): void {
    const url = new URL(request.url!, 'https://x');
    this.requests.push(`${url.pathname}?${url.searchParams}`);
    const [, namespace, slices] = NAMESPACED.exec(url.pathname) ?? [];
    const kind = slices !== undefined ? 'endpointslices' : 'services';
    if (this.failing !== undefined || request.headers.authorization !== `Bearer ${TOKEN}`) {
      response.writeHead(this.failing ?? 401).end('{}');
      return;
    }
    if (slices === undefined && url.pathname !== SERVICES) {
      response.writeHead(404).end();
      return;
    }
    const [label = '', value] = (url.searchParams.get('labelSelector') ?? '').split('=');
    const isMeant = ({ metadata: { labels = {}, namespace: own } }: Item) =>
      (namespace === undefined || own === namespace) &&
      (value === undefined ? Object.hasOwn(labels, label) : labels[label] === value);
    if (url.searchParams.get('watch') !== 'true') {
      const items = [...this.kinds[kind].values()].filter(isMeant);
      response.end(JSON.stringify({ metadata: { resourceVersion: String(this.version) }, items }));
      return;
    }
    const since = Number(url.searchParams.get('resourceVersion'));
    const write = (type: string, object: object) => response.write(`${JSON.stringify({ type, object })}\n`);
    if (since < this.forgotten) {
      if (this.gone === 'status') response.writeHead(410).end();
      else {
        write('ERROR', { kind: 'Status', code: 410, reason: 'Expired', metadata: {} });
        response.end();
      }
      return;
    }
    response.flushHeaders();
    const send = (of: Kind, { version, type, object }: Change) => {
      if (of !== kind || version <= since) return;
      if (isMeant(object)) write(type, object);
      // What stops being selected is deleted, as far as this watch goes.
      else if (type === 'MODIFIED') write('DELETED', object);
    };
    for (const each of this.log) send(each.kind, each.change);
    if (url.searchParams.get('allowWatchBookmarks') === 'true')
      write('BOOKMARK', { metadata: { resourceVersion: String(this.version) } });
    const watcher = { response, send };
    this.watchers.add(watcher);
    const ends = setTimeout(() => response.end(), Number(url.searchParams.get('timeoutSeconds') ?? 300) * 1000);
    response.once('close', () => {
      clearTimeout(ends);
      this.watchers.delete(watcher);
    });
  }
}

type Kind = 'endpointslices' | 'services';

function keyOf({ metadata: { namespace, name } }: Item): string {
  return `${namespace} ${name}`;
}

/** The one slice of a Service with one address and ports by name. */
export function sliceOf(
  service: string,
  namespace: string,
  ports: Record<string, number>,
  address = '127.0.0.1',
): Item {
  return {
    metadata: { name: `${service}-1`, namespace, labels: { 'kubernetes.io/service-name': service } },
    ports: Object.entries(ports).map(([name, port]) => ({ name, port })),
    endpoints: [{ addresses: [address], conditions: { ready: true } }],
  };
}
