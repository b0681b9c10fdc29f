import type { OutgoingHttpHeaders } from 'node:http';
import type { Tokens } from '../engine/credentials.ts';
import { KedgeError } from '../support/errors.ts';

/**
 * Headers that belong to a connection (RFC 9113 §8.2.2), name its other end, or count bytes that only the transport
 * knows. RPC libraries send metadata as it is, and what Node or nghttp2 refuses ends the whole connection, with
 * everybody else's calls; grpc-js even dials and tries the same call again without a pause.
 */
const FORBIDDEN = new Set([
  'connection',
  'content-length',
  'host',
  'http2-settings',
  'keep-alive',
  'proxy-connection',
  'transfer-encoding',
  'upgrade',
]);

/** Headers of which Node's HTTP/2 sends one value only; it throws for a second (`kSingleValueFields` of its sources). */
const SINGLE = new Set(
  `access-control-allow-credentials access-control-max-age access-control-request-method age authorization
   content-encoding content-language content-location content-md5 content-range content-type date dnt etag expires from
   if-match if-modified-since if-none-match if-range if-unmodified-since last-modified location max-forwards
   proxy-authorization range referer retry-after te tk upgrade-insecure-requests user-agent x-content-type-options`.split(
    /\s+/,
  ),
);

/**
 * The most that the headers of a call may have, counted as in RFC 9113 §6.5.2. Receivers that use nghttp2 (Node, Envoy,
 * curl) end the connection beyond 64 KiB, where one stream would do.
 */
const MAX_HEADER_BYTES = 60 * 1024;
const ENTRY_BYTES = 32;

/**
 * Checks what a caller put into the headers of an RPC, so that it can hurt no call but its own. `ownBytes` is the size of
 * what goes out besides.
 *
 * @throws {@link KedgeError} `ERR_KEDGE_REQUEST` naming the header
 */
export function checkCallHeaders(headers: OutgoingHttpHeaders, bringsProxyAuth: boolean, ownBytes: number): void {
  let bytes = ownBytes;
  for (const name in headers) {
    const value = headers[name];
    if (FORBIDDEN.has(name)) throw refuse(`metadata \`${name}\` belongs to a connection, not to a call`);
    if (typeof value === 'string') {
      bytes += name.length + value.length + ENTRY_BYTES;
      if (name === 'te' && value !== 'trailers') throw refuse('metadata `te` is always `trailers`');
    } else if (Array.isArray(value)) {
      if (value.length > 1 && SINGLE.has(name)) throw refuse(`metadata \`${name}\` is there more than once`);
      for (const each of value) bytes += name.length + each.length + ENTRY_BYTES;
    }
    if (bringsProxyAuth && name === 'proxy-authorization') {
      throw refuse('the route brings its own proxy-authorization');
    }
  }
  if (bytes > MAX_HEADER_BYTES) throw refuse(`the headers of a call have at most ${MAX_HEADER_BYTES} bytes`);
}

/** What a call's headers have besides its metadata, for {@link checkCallHeaders}. */
export function ownBytes(authority: string, method: string, tokens: Tokens): number {
  return authority.length + method.length + (tokens.proxyAuth?.length ?? 0) + (tokens.backendAuth?.length ?? 0);
}

function refuse(reason: string): KedgeError {
  return new KedgeError('ERR_KEDGE_REQUEST', reason);
}
