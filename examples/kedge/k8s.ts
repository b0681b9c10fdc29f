import { setTimeout as sleep } from 'node:timers/promises';
import type { KubeConfig, V1EndpointSlice } from '@kubernetes/client-node';
import { watchAll } from './cluster.ts';
import type { BackendConfig } from './config.ts';
import { metrics } from './metrics.ts';
import type { Address, Resolver } from './resolver.ts';

/** How long the first answer may take. */
const FIRST_MS = 5_000;

/** The ready endpoints of a Service, watched; while the API server is away, those that were there last. */
export function watchEndpoints(
  { service, namespace, port }: NonNullable<BackendConfig['k8s']>,
  cluster: KubeConfig,
): Resolver {
  const first = Promise.withResolvers<void>();
  let all: readonly Address[] | undefined;
  const target = `${service}.${namespace}${port === undefined ? '' : `:${port}`}`;
  const close = watchAll<V1EndpointSlice>(
    cluster,
    `/apis/discovery.k8s.io/v1/namespaces/${namespace}/endpointslices`,
    `kubernetes.io/service-name=${service}`,
    (slices) => {
      all = slices.flatMap((slice) => readyOf(slice, port));
      metrics.endpoints.set({ target }, all.length);
      metrics.watchChanges.inc(target);
      first.resolve();
    },
    () => metrics.watchErrors.inc(target),
  );
  return {
    addresses: async () => {
      const tooLate = sleep(FIRST_MS, undefined, { ref: false }).then(() => {
        throw new Error(`no endpoints of ${target} within ${FIRST_MS} ms`);
      });
      await Promise.race([first.promise, tooLate]);
      return all!;
    },
    current: () => all,
    close,
  };
}

/** By the port's name or number; where none is wanted, by the only one that there is. */
function readyOf({ endpoints, ports }: V1EndpointSlice, wanted: string | undefined): Address[] {
  const all = ports ?? [];
  const found = wanted === undefined ? all : all.filter((each) => each.name === wanted || String(each.port) === wanted);
  const port = wanted === undefined && all.length > 1 ? undefined : found[0]?.port;
  if (port === undefined) return [];
  // Unknown readiness counts as ready (Kubernetes API, EndpointConditions).
  const ready = (endpoints ?? []).filter(({ conditions }) => conditions?.ready !== false);
  return ready.flatMap(({ addresses }) => addresses.map((host) => ({ host, port })));
}
