import type { GrpcRoute, HttpRoute } from './config.ts';
import { decodedPath } from './path.ts';
import { Refusal } from './refusal.ts';

type Values = Readonly<Record<string, string | string[] | undefined>>;

/** What HTTP routes look at. */
export interface HttpTarget {
  /** Lower case, without port. */
  host: string;
  /** 80 where the request named none, 443 for an absolute https URL. */
  port: number;
  /** With the query, as it was sent. */
  path: string;
  headers: Values;
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
  metadata: Values;
}

/**
 * The first route that matches; undefined: unknown route. Throws a {@link Refusal} where a route has rules for
 * paths and this path could be read in two ways.
 */
export function routeHttp(routes: readonly HttpRoute[], target: HttpTarget): HttpRoute | undefined {
  for (const route of routes) {
    if (
      (route.proxyMode === 'ANY' || route.proxyMode === target.mode) &&
      (route.hostMatcher === '' || route.hostMatcher.toLowerCase() === target.host) &&
      (route.portMatcher === 0 || route.portMatcher === target.port) &&
      // Of several values the first counts, as in the original.
      everyHeader(route.headerMatcher, (name, value) => listOf(target.headers[name])[0] === value) &&
      matchesPath(route, target.path)
    )
      return route;
  }
  return undefined;
}

/** The first route that matches; undefined: unknown route. */
export function routeGrpc(routes: readonly GrpcRoute[], target: GrpcTarget): GrpcRoute | undefined {
  return routes.find(
    (route) =>
      (route.serviceNameMatcher === '' || matches(route.serviceNameMatcher, target.method)) &&
      (route.authorityHostMatcher === '' || route.authorityHostMatcher.toLowerCase() === target.host) &&
      (route.authorityPortMatcher === 0 || route.authorityPortMatcher === target.port) &&
      everyHeader(route.metadataMatcher, (name, value) => listOf(target.metadata[name]).includes(value)),
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

function matchesPath({ pathRules }: HttpRoute, target: string): boolean {
  if (pathRules.length === 0) return true;
  const path = decodedPath(target);
  if (path === undefined) throw new Refusal(400, 'no-route', 'INVALID_ARGUMENT', 'the path can be read in two ways');
  return pathRules.some((rule) => matches(rule, path));
}

function everyHeader(wanted: Readonly<Record<string, string>>, has: (name: string, value: string) => boolean): boolean {
  for (const name in wanted) if (!has(name, wanted[name]!)) return false;
  return true;
}

/** Exact, or by prefix where the rule ends in a star. */
function matches(rule: string, value: string): boolean {
  return rule.endsWith('*') ? value.startsWith(rule.slice(0, -1)) : value === rule;
}

function listOf(value: string | string[] | undefined): readonly string[] {
  return value === undefined ? [] : typeof value === 'string' ? [value] : value;
}
