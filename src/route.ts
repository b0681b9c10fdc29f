import { type TokenSource, tokenSourceReader } from './auth/token-source.ts';
import { type AnyIdentity, identityReader } from './identity/identity.ts';
import { type KedgeAddress, kedgeAddress } from './kedge/address.ts';
import { type PeerPolicy, peerPolicy } from './kedge/peer.ts';
import { KedgeError, quote } from './support/errors.ts';
import { boolean, check, object, optional, type Table } from './support/shape.ts';
import { parseTarget } from './target.ts';

/** How a target is reached. Built and checked by {@link route}. */
export interface Route {
  /** The kedges in the order in which they are tried. */
  readonly kedges: readonly URL[];
  readonly proxyAuth?: TokenSource | undefined;
  readonly backendAuth?: TokenSource | undefined;
  readonly overrideAuthorization?: boolean | undefined;
  readonly serverName?: string | undefined;
  readonly identity?: AnyIdentity | undefined;
  readonly peer?: PeerPolicy | undefined;
}

/** What belongs to a route besides its kedges. */
export interface RouteOptions {
  /** Sent to the kedge as `Proxy-Authorization: Bearer`; the kedge consumes it. */
  proxyAuth?: TokenSource;
  /** Sent to the backend as `Authorization: Bearer`, unless the caller set one. */
  backendAuth?: TokenSource;
  /** Let `backendAuth` win over the caller's own `Authorization`, as winch does. Default: false. */
  overrideAuthorization?: boolean;
  /** The name that the kedge's certificate must be for, also sent as SNI. Default: the host of its URL. */
  serverName?: string;
  /** Overrides the dialer's `identity`. */
  identity?: AnyIdentity;
  /** Overrides the dialer's `peer`. */
  peer?: PeerPolicy;
}

/** A kedge URL, or several in the order in which they are tried, with what belongs to them. */
export type RouteInit = string | URL | (RouteOptions & { kedge: string | URL | readonly (string | URL)[] });

/** What every mapper takes that makes routes. */
export const ROUTE_OPTIONS = {
  proxyAuth: optional(tokenSourceReader),
  backendAuth: optional(tokenSourceReader),
  overrideAuthorization: optional(boolean),
  serverName: optional(serverNameOf),
  identity: optional(identityReader),
  peer: optional(peerPolicy),
} satisfies Table<RouteOptions>;

const ROUTE = object({ ...ROUTE_OPTIONS, kedge: kedgeUrls }, 'a route is a kedge URL or { kedge, ... }');
/** The addresses as they were checked: a `URL` can be changed by whoever holds it. */
const checked = new WeakMap<object, readonly KedgeAddress[]>();

/**
 * Checks a route once, so that no call has to. For own mappers: build the routes ahead and return them.
 *
 * @example
 * ```ts
 * import { createDialer, fileToken, route } from 'kedge-dialer';
 *
 * const us1 = route({
 *   kedge: ['https://a.us1.kedge.example.com', 'https://b.us1.kedge.example.com'],
 *   proxyAuth: fileToken('/var/run/secrets/kedge/token'),
 * });
 * const dialer = createDialer({ mapper: ({ hostname }) => (hostname.endsWith('.us1.example') ? us1 : undefined) });
 * ```
 *
 * @throws {@link KedgeError} `ERR_KEDGE_ROUTE`: an invalid kedge URL, an unknown option, or tokens over `http:` or over
 * a connection that is not verified
 */
export function route(init: RouteInit): Route {
  const given = typeof init === 'string' || init instanceof URL ? { kedge: init } : init;
  const { kedge: kedges, ...options } = check('route', ROUTE, given, { code: 'ERR_KEDGE_ROUTE' });
  const { proxyAuth, backendAuth, identity, peer, serverName } = options;
  const hasTokens = proxyAuth !== undefined || backendAuth !== undefined;
  const addresses = kedges.map((url) => kedgeAddress(url, serverName));
  for (const [i, address] of addresses.entries()) {
    const isTwice = addresses.findIndex(({ origin }) => origin === address.origin) !== i;
    if (isTwice) throw invalid(`kedge ${address.name} is there twice`);
    if (!address.secure && hasTokens) throw invalid(`kedge ${address.name} is plain http: tokens need https`);
    if (!address.secure && identity !== undefined)
      throw invalid(`kedge ${address.name} is plain http: it cannot see the identity`);
  }
  if (hasTokens && peer?.dangerouslySkipVerification) throw invalid('tokens need a verified kedge');
  const result: Route = Object.freeze({ kedges: Object.freeze(kedges), ...options });
  checked.set(result, Object.freeze(addresses));
  return result;
}

/** The kedges of a route as {@link route} checked them; undefined for what it did not build. */
export function addressesOf(value: unknown): readonly KedgeAddress[] | undefined {
  return typeof value === 'object' && value !== null ? checked.get(value) : undefined;
}

function kedgeUrls(value: unknown): URL[] {
  const kedges = (Array.isArray(value) ? value : [value]).map(kedgeUrl);
  if (kedges.length === 0) throw invalid('`kedge` is empty');
  return kedges;
}

function kedgeUrl(input: unknown): URL {
  if (input instanceof URL) return new URL(input);
  const url = typeof input === 'string' ? URL.parse(input) : null;
  if (url === null) throw invalid(`${quote(input)} is not a kedge URL such as https://us1.kedge.example.com`);
  return url;
}

function serverNameOf(input: unknown): string {
  if (typeof input !== 'string') throw invalid('`serverName` is a host name');
  try {
    const { hostname, authority } = parseTarget(input);
    if (authority !== hostname) throw invalid('`serverName` has no port');
    return hostname.startsWith('[') ? hostname.slice(1, -1) : hostname;
  } catch (cause) {
    throw invalid('`serverName` is not a valid host name', cause);
  }
}

function invalid(reason: string, cause?: unknown): KedgeError {
  return new KedgeError('ERR_KEDGE_ROUTE', `route: ${reason}`, { cause });
}
