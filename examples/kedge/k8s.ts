import { KubeConfig, type V1EndpointSlice, Watch } from '@kubernetes/client-node';
import type { Resolvers } from './config.ts';
import type { Address, Resolver } from './resolver.ts';

const RETRY_MS = 1_000;
/** How long the first answer may take. */
const FIRST_MS = 5_000;

/** The ready endpoints of a Service, watched: EndpointSlices of discovery.k8s.io/v1, with the pod's own service account. */
export function watchEndpoints({ service, namespace, port }: NonNullable<Resolvers['k8s']>): Resolver {
  const config = new KubeConfig();
  config.loadFromDefault();
  const slices = new Map<string, readonly Address[]>();
  let all: readonly Address[] = [];
  const changed = () => {
    all = [...slices.values()].flat();
  };
  const first = Promise.withResolvers<void>();
  let isClosed = false;
  let isFirst = true;
  let hasAll = false;
  let abort: AbortController | undefined;

  const watch = async () => {
    if (isClosed) return;
    // A new watch begins with all there is: what is not among it is gone.
    const before = new Set(slices.keys());
    const path = `/apis/discovery.k8s.io/v1/namespaces/${namespace}/endpointslices`;
    const query = { labelSelector: `kubernetes.io/service-name=${service}` };
    const seen = (type: string, slice: V1EndpointSlice) => {
      const name = slice.metadata?.name ?? '';
      before.delete(name);
      if (type === 'DELETED') slices.delete(name);
      else if (type === 'ADDED' || type === 'MODIFIED') slices.set(name, readyOf(slice, port));
      changed();
      if (isFirst) setTimeout(first.resolve, 50);
      isFirst = false;
    };
    const again = () => {
      if (!isClosed) setTimeout(watch, RETRY_MS);
    };
    try {
      abort = await new Watch(config).watch(path, query, seen as never, again);
      setTimeout(() => {
        for (const name of before) slices.delete(name);
        changed();
        hasAll = true;
        first.resolve();
      }, RETRY_MS).unref();
    } catch {
      again();
    }
  };
  void watch();
  return {
    addresses: async () => {
      let timer: NodeJS.Timeout | undefined;
      const late = new Promise<never>((_, reject) => {
        timer = setTimeout(
          () => reject(new Error(`no endpoints of ${service}.${namespace} within ${FIRST_MS} ms`)),
          FIRST_MS,
        );
      });
      await Promise.race([first.promise, late]).finally(() => clearTimeout(timer));
      hasAll = true;
      return all;
    },
    current: () => (hasAll ? all : undefined),
    close: () => {
      isClosed = true;
      abort?.abort();
    },
  };
}

function readyOf({ endpoints, ports }: V1EndpointSlice, wanted: string): Address[] {
  const port = (ports ?? []).find(({ name, port: number }) => name === wanted || String(number) === wanted)?.port;
  if (port === undefined) return [];
  // Unknown readiness counts as ready (Kubernetes API, EndpointConditions).
  const ready = (endpoints ?? []).filter(({ conditions }) => conditions?.ready !== false);
  return ready.flatMap(({ addresses }) => addresses.map((host) => ({ host, port })));
}
