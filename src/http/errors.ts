import { constants } from 'node:http2';
import type { Connector } from '../dial/connector.ts';
import { codeOf, isKedgeError, KedgeError } from '../support/errors.ts';

/** undici's and Node's codes for a transport that failed under a call; anything else is the caller's own error. */
const LOST =
  /^(?:UND_ERR_SOCKET|UND_ERR_INFO|UND_ERR_DESTROYED|UND_ERR_CLOSED|E[A-Z]{2,}|ERR_HTTP2_|ERR_SSL_|ERR_TLS_|ERR_STREAM_)/;
const TIMEOUT = /^UND_ERR_(?:HEADERS|BODY|CONNECT)_TIMEOUT$/;
const RESPONSE = /^(?:HPE_|UND_ERR_HEADERS_OVERFLOW|UND_ERR_RES_|UND_ERR_RESPONSE)/;
const REQUEST = /^UND_ERR_(?:INVALID_ARG|NOT_SUPPORTED|REQ_CONTENT_LENGTH_MISMATCH)$/;

/** Whether an error with this code says that the connection went away under a call. */
export function isLost(code: string): boolean {
  return LOST.test(code);
}

/** Whether undici found the request itself invalid, which it does when a client takes it from the pool. */
export function isInvalidRequest(error: unknown): boolean {
  return REQUEST.test(codeOf(error));
}

/** What a failed call is told: a {@link KedgeError} with undici's error as its cause; the caller's own errors as they are. */
export function callError(error: unknown, target: string, kedge: Connector | undefined): Error {
  // All calls of a connection are told of the end of their dialer with one error.
  if (isKedgeError(error)) return error.for(target, error.code === 'ERR_KEDGE_CLOSED' ? kedge?.name : undefined);
  const cause = asError(error);
  const context = { target, kedge: kedge?.name, cause };
  const name = codeOf(cause);
  if (REQUEST.test(name)) return new KedgeError('ERR_KEDGE_REQUEST', cause.message, context);
  const reset = streamReset(cause);
  if (reset !== undefined) return new KedgeError('ERR_KEDGE_CONNECTION', reset, context);
  if (TIMEOUT.test(name)) return new KedgeError('ERR_KEDGE_TIMEOUT', cause.message, context);
  if (RESPONSE.test(name) || isUnparsable(cause)) return new KedgeError('ERR_KEDGE_RESPONSE', cause.message, context);
  if (!isLost(name)) return cause;
  return (
    kedge?.refusal?.for(target) ?? new KedgeError('ERR_KEDGE_CONNECTION', `connection lost: ${cause.message}`, context)
  );
}

/** Whether undici found an HTTP/1.1 answer to be none; it knows no code of these. */
export function isUnparsable({ name }: Error): boolean {
  return name === 'HTTPParserError';
}

export function asError(error: unknown): Error {
  return error instanceof Error ? error : new Error('a non-error was thrown', { cause: error });
}

/** What is said of a stream that ended while its connection lives on. */
function streamReset(error: Error): string | undefined {
  const { http2ErrorCode } = error as { http2ErrorCode?: unknown };
  const name = NAMES.get(http2ErrorCode) ?? `code ${String(http2ErrorCode)}`;
  if (codeOf(error) === 'ERR_HTTP2_STREAM_ERROR') return `the kedge reset the stream: ${name}`;
  // undici puts this in place of whatever ended an answer with a length; PROTOCOL_ERROR is how nghttp2 ends one that is false.
  const isShort = codeOf(error) === 'UND_ERR_RES_CONTENT_LENGTH_MISMATCH' && http2ErrorCode !== undefined;
  if (isShort && http2ErrorCode !== constants.NGHTTP2_PROTOCOL_ERROR) {
    return `connection lost or stream reset in the middle of the answer: ${name}`;
  }
  // NO_ERROR and CANCEL, for which Node has no error and undici two.
  if (/^HTTP\/2: stream (?:half-closed|closed before)/.test(error.message)) {
    return `the kedge reset or ended the stream before its answer was complete (${error.message})`;
  }
  return undefined;
}

/** The names of RFC 9113 §7, by code. */
const NAMES = new Map<unknown, string>([
  [constants.NGHTTP2_PROTOCOL_ERROR, 'PROTOCOL_ERROR'],
  [constants.NGHTTP2_INTERNAL_ERROR, 'INTERNAL_ERROR'],
  [constants.NGHTTP2_FLOW_CONTROL_ERROR, 'FLOW_CONTROL_ERROR'],
  [constants.NGHTTP2_STREAM_CLOSED, 'STREAM_CLOSED'],
  [constants.NGHTTP2_FRAME_SIZE_ERROR, 'FRAME_SIZE_ERROR'],
  [constants.NGHTTP2_REFUSED_STREAM, 'REFUSED_STREAM'],
  [constants.NGHTTP2_CANCEL, 'CANCEL'],
  [constants.NGHTTP2_COMPRESSION_ERROR, 'COMPRESSION_ERROR'],
  [constants.NGHTTP2_CONNECT_ERROR, 'CONNECT_ERROR'],
  [constants.NGHTTP2_ENHANCE_YOUR_CALM, 'ENHANCE_YOUR_CALM'],
  [constants.NGHTTP2_INADEQUATE_SECURITY, 'INADEQUATE_SECURITY'],
  [constants.NGHTTP2_HTTP_1_1_REQUIRED, 'HTTP_1_1_REQUIRED'],
]);
