import type { GrpcRoute, HttpRoute } from './config.ts';

/** What HTTP routes look at. */
export interface HttpTarget {
  /** Lower case, without port. */
  host: string;
  /** 80 where the request named none, 443 for an absolute https URL. */
  port: number;
  /** Undefined where the request named none. */
  namedPort: number | undefined;
  path: string;
  headers: Readonly<Record<string, string | string[] | undefined>>;
  /** Forward: the request line held an absolute URL. */
  mode: 'REVERSE_PROXY' | 'FORWARD_PROXY';
}

/** What gRPC routes look at. */
export interface GrpcTarget {
  /** `package.Service/Method`. */
  method: string;
  host: string;
  /** 0 where the authority named none. */
  port: number;
  metadata: Readonly<Record<string, string | string[] | undefined>>;
}

/** The first route that matches; undefined: unknown route. */
export function routeHttp(routes: readonly HttpRoute[], target: Omit<HttpTarget, 'namedPort'>): HttpRoute | undefined {
  return routes.find(
    (route) =>
      (route.proxyMode === 'ANY' || route.proxyMode === target.mode) &&
      (route.hostMatcher === '' || route.hostMatcher.toLowerCase() === target.host) &&
      (route.portMatcher === 0 || route.portMatcher === target.port) &&
      (route.pathRules.length === 0 || route.pathRules.some((rule) => matches(rule, target.path))) &&
      Object.entries(route.headerMatcher).every(([name, value]) => valuesOf(target.headers, name).join(', ') === value),
  );
}

/** The first route that matches; undefined: unknown route. */
export function routeGrpc(routes: readonly GrpcRoute[], target: GrpcTarget): GrpcRoute | undefined {
  return routes.find(
    (route) =>
      (route.serviceNameMatcher === '' || matches(route.serviceNameMatcher, target.method)) &&
      (route.authorityHostMatcher === '' || route.authorityHostMatcher.toLowerCase() === target.host) &&
      (route.authorityPortMatcher === 0 || route.authorityPortMatcher === target.port) &&
      Object.entries(route.metadataMatcher).every(([name, value]) => valuesOf(target.metadata, name).includes(value)),
  );
}

/** `host`, `host:port` or `[v6]:port`; undefined when it is none of them. Brackets are dropped, a final dot too. */
export function splitAuthority(authority: string): { host: string; port: number | undefined } | undefined {
  const found = /^(?:\[([0-9a-fA-F:.]+)\]|([^\s:@/,[\]]+?)\.?)(?::([0-9]{1,5}))?$/.exec(authority);
  if (found === null) return undefined;
  const port = found[3] === undefined ? undefined : Number(found[3]);
  if (port !== undefined && port > 65_535) return undefined;
  return { host: (found[1] ?? found[2]!).toLowerCase(), port };
}

/** Exact, or by prefix where the rule ends in a star. */
function matches(rule: string, value: string): boolean {
  return rule.endsWith('*') ? value.startsWith(rule.slice(0, -1)) : value === rule;
}

function valuesOf(headers: HttpTarget['headers'], name: string): string[] {
  const value = headers[name];
  return value === undefined ? [] : Array.isArray(value) ? value : [value];
}
