import { isIPv4 } from 'node:net';
import { domainToASCII, domainToUnicode } from 'node:url';
import { KedgeError, quote } from './support/errors.ts';
import { check, object, oneOf, or } from './support/shape.ts';

/** Which wire a call takes. */
export type Wire = 'http' | 'grpc';

/**
 * Where a caller wants to go, in the one spelling that everything behind it compares: lower case, IDNA-encoded, no
 * trailing dot. Built by {@link parseTarget} only.
 */
export interface Target {
  readonly wire: Wire;
  /** `http:` or `https:` as the caller wrote it; `grpc:` on the gRPC wire. */
  readonly protocol: 'http:' | 'https:' | 'grpc:';
  /** A DNS name or an IP address; IPv6 in brackets. */
  readonly hostname: string;
  /** The port, the protocol's default where none was given (http 80; https and gRPC 443). */
  readonly port: number;
  /** What goes out as `Host` or `:authority`: `hostname`, with `:port` unless it is the default (gRPC: unless none was given). */
  readonly authority: string;
}

/** The options of {@link parseTarget} and of `explain()`. */
export const WIRE = object({ wire: or(oneOf('http', 'grpc'), 'http') });

/** Characters that some parser between here and the kedge reads as more than a letter of a name. */
const AMBIGUOUS = /[\s\p{Cc}%@/\\?#*{}<>^|`"'$,;!()&=+~]/u;
const LABEL = /^[a-z0-9_](?:[a-z0-9_-]*[a-z0-9_])?$/;
const PORT = /^[1-9][0-9]{0,4}$/;
const DEFAULT_PORT = { 'http:': 80, 'https:': 443, 'grpc:': 443 } as const;

/**
 * The only canonicaliser of targets. A `URL` was parsed by its owner (so `b%2ek` is decoded); a string is taken
 * literally: an origin (`http://host:8080`), an authority (`host`, `host:8080`, `[::1]:8080`) and, on the gRPC wire,
 * `dns:host:9090` or `dns:///host:9090`. What two parsers could read differently is refused.
 *
 * @example
 * ```ts
 * import { parseTarget } from 'kedge-dialer';
 *
 * parseTarget('http://Orders.US1.example:8080').authority; // 'orders.us1.example:8080'
 * parseTarget('greeter.us1.example', { wire: 'grpc' }).port; // 443
 * ```
 *
 * @throws {@link KedgeError} `ERR_KEDGE_TARGET`; `ERR_KEDGE_OPTIONS`
 */
export function parseTarget(input: string | URL, options?: { wire?: Wire }): Target {
  return targetOf(input, options === undefined ? 'http' : check('parseTarget', WIRE, options).wire);
}

/** {@link parseTarget} for those who know the wire. */
export function targetOf(input: string | URL, wire: Wire): Target {
  if (typeof input === 'string') return wire === 'http' ? fromHttpString(input) : fromGrpcString(input);
  if (input instanceof URL) return fromUrl(input, wire);
  throw refuse(input, 'a target is a string or a URL');
}

/** Whether the target is an IP address: those are never mapped. */
export function isIP(target: Target): boolean {
  return target.hostname.charCodeAt(0) === 0x5b /* [ */ || isIPv4(target.hostname);
}

function fromUrl(url: URL, wire: Wire): Target {
  const { protocol } = url;
  if (wire !== 'http') throw refuse(url.protocol, 'a gRPC target is a string, not a URL');
  if (protocol !== 'http:' && protocol !== 'https:') throw refuse(protocol, 'the scheme is not http or https');
  if (url.username !== '' || url.password !== '') throw refuse(url.href, 'credentials in a URL are not sent');
  const port = url.port === '' ? DEFAULT_PORT[protocol] : Number(url.port);
  if (port === 0) throw refuse(url.href, 'port 0');
  return build('http', protocol, canonicalHost(url.hostname, url.href), port);
}

function fromHttpString(input: string): Target {
  const scheme = /^([a-z][a-z0-9+.-]*):\/\//i.exec(input);
  if (scheme === null) return fromAuthority('http', 'http:', input, input);
  const protocol = `${scheme[1]!.toLowerCase()}:`;
  if (protocol !== 'http:' && protocol !== 'https:') throw refuse(input, 'the scheme is not http or https');
  const rest = input.slice(scheme[0].length);
  return fromAuthority('http', protocol, rest.endsWith('/') ? rest.slice(0, -1) : rest, input);
}

function fromGrpcString(input: string): Target {
  // gRPC naming: https://github.com/grpc/grpc/blob/master/doc/naming.md. A DNS server of the caller's choice
  // (dns://8.8.8.8/host) would not be asked, so that form is refused with every other scheme.
  const authority = /^dns:(?:\/\/\/)?(.*)$/is.exec(input)?.[1] ?? input;
  return fromAuthority('grpc', 'grpc:', authority, input);
}

function fromAuthority(wire: Wire, protocol: Target['protocol'], authority: string, input: string): Target {
  if (/^[^/?#]*@/.test(authority)) throw refuse(input, 'credentials in a target are not sent');
  if (/[/?#]/.test(authority)) throw refuse(input, 'a target is a host and a port, without a path or a query');
  let host = authority;
  let portText = '';
  const bracketed = /^(\[[0-9a-f:.]+\])(?::(.*))?$/is.exec(authority);
  if (bracketed !== null) {
    host = bracketed[1]!;
    portText = bracketed[2] ?? '';
  } else {
    const colon = authority.indexOf(':');
    if (colon !== -1) {
      if (authority.includes(':', colon + 1)) throw refuse(input, 'more than one colon');
      host = authority.slice(0, colon);
      portText = authority.slice(colon + 1);
    }
    if (AMBIGUOUS.test(host)) throw refuse(input, 'a character that does not belong in a host name');
  }
  if (portText !== '' && (!PORT.test(portText) || Number(portText) > 65_535)) {
    throw refuse(input, 'the port is not a number from 1 to 65535');
  }
  // 1,024 bounds the work on hostile input; no name that passes is longer than 253.
  const parsed = host === '' || host.length > 1024 ? null : URL.parse(`http://${host}/`);
  if (parsed === null) throw refuse(input, 'not a host name or IP address');
  const hostname = canonicalHost(parsed.hostname, input);
  const port = portText === '' ? DEFAULT_PORT[protocol] : Number(portText);
  return build(wire, protocol, hostname, port, wire === 'grpc' && portText === '');
}

function build(wire: Wire, protocol: Target['protocol'], hostname: string, port: number, bare = false): Target {
  const isDefault = wire === 'http' && port === DEFAULT_PORT[protocol];
  const authority = isDefault || bare ? hostname : `${hostname}:${port}`;
  return Object.freeze({ wire, protocol, hostname, port, authority });
}

/**
 * The host as the WHATWG parser left it (lower case, IDNA, IPv4 in every notation), held to the rules of a DNS name.
 * Kedge hosts pass through here too.
 */
export function canonicalHost(parsed: string, input: string): string {
  if (parsed.startsWith('[') || isIPv4(parsed)) return parsed;
  const hostname = parsed.endsWith('.') ? parsed.slice(0, -1) : parsed;
  if (hostname.length === 0 || hostname.length > 253) throw refuse(input, 'a name has 1 to 253 characters');
  for (const label of hostname.split('.')) {
    if (label.length === 0 || label.length > 63 || !LABEL.test(label))
      throw refuse(input, 'an invalid label in the name');
    if (label.startsWith('xn--') && !isRoundTrip(label)) throw refuse(input, 'an invalid internationalised label');
  }
  return hostname;
}

/** Node lines differ in which `xn--` labels their URL parser lets pass; a label that is its own encoding passes on all. */
function isRoundTrip(label: string): boolean {
  const unicode = domainToUnicode(label);
  return unicode !== '' && unicode !== label && domainToASCII(unicode) === label;
}

/** Shows no query: it may hold a token. */
function refuse(input: unknown, reason: string): KedgeError {
  const shown = typeof input === 'string' ? input.replace(/[?#].*$/s, (query) => `${query[0]}***`) : input;
  return new KedgeError('ERR_KEDGE_TARGET', reason, { target: quote(shown) });
}
