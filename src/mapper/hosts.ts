import { type Route, type RouteInit, route } from '../route.ts';
import { KedgeError, quote } from '../support/errors.ts';
import { isIP, parseTarget, type Target } from '../target.ts';
import { described } from './describe.ts';
import type { Mapper } from './mapper.ts';

/** Keys to routes, as a plain object or a Map. */
export type RouteTable = Readonly<Record<string, RouteInit>> | ReadonlyMap<string, RouteInit>;

/**
 * By host name, whatever the port: the original's `simpleHost` mapper.
 *
 * @example
 * ```ts
 * import { hosts } from 'kedge-dialer';
 *
 * const mapper = hosts({
 *   'orders.us1.example': 'https://us1.kedge.example.com',
 *   'stock.us1.example': { kedge: ['https://a.kedge.example.com', 'https://b.kedge.example.com'] },
 * });
 * ```
 *
 * @throws {@link KedgeError} `ERR_KEDGE_ROUTE`
 */
export function hosts(table: RouteTable): Mapper {
  const routes = tableOf('hosts', table, (key) => {
    const { authority, hostname } = keyTarget('hosts', key, 'host');
    if (authority !== hostname) throw invalid('hosts', `key ${quote(key)} has a port: use hostPorts`);
    return hostname;
  });
  return lookUp('hosts', routes, ({ hostname }) => hostname);
}

/**
 * By host name and port: the original's `simpleHostPort` mapper. A target without a port counts with its default.
 *
 * @example
 * ```ts
 * import { hostPorts } from 'kedge-dialer';
 *
 * const mapper = hostPorts({ 'orders.us1.example:8080': 'https://us1.kedge.example.com' });
 * ```
 *
 * @throws {@link KedgeError} `ERR_KEDGE_ROUTE`
 */
export function hostPorts(table: RouteTable): Mapper {
  const routes = tableOf('hostPorts', table, (key) => {
    if (!/:[0-9]+$/.test(key)) throw invalid('hostPorts', `key ${quote(key)} has no port`);
    return hostPort(keyTarget('hostPorts', key, 'host:port'));
  });
  return lookUp('hostPorts', routes, hostPort);
}

function hostPort({ hostname, port }: Target): string {
  return `${hostname}:${port}`;
}

function lookUp(mapper: string, routes: ReadonlyMap<string, Route>, keyOf: (target: Target) => string): Mapper {
  return described(
    (target) => routes.get(keyOf(target)),
    (target) => `${mapper}: ${routes.has(keyOf(target)) ? 'has' : 'has no'} ${quote(keyOf(target))}`,
  );
}

function tableOf(mapper: string, table: RouteTable, canonicalKey: (key: string) => string): Map<string, Route> {
  if (typeof table !== 'object' || table === null) throw invalid(mapper, 'takes an object or a Map');
  const routes = new Map<string, Route>();
  for (const [key, init] of table instanceof Map ? table : Object.entries(table)) {
    const name = canonicalKey(key);
    if (routes.has(name)) throw invalid(mapper, `${quote(key)} stands there twice`);
    routes.set(name, route(init));
  }
  return routes;
}

function keyTarget(mapper: string, key: string, form: string): Target {
  let target: Target;
  try {
    target = parseTarget(key, { wire: 'grpc' });
  } catch (cause) {
    throw invalid(mapper, `key ${quote(key)} is not a ${form}`, cause);
  }
  if (isIP(target)) throw invalid(mapper, `key ${quote(key)} is an IP address: those are never mapped`);
  return target;
}

function invalid(mapper: string, reason: string, cause?: unknown): KedgeError {
  return new KedgeError('ERR_KEDGE_ROUTE', `${mapper}: ${reason}`, { cause });
}
