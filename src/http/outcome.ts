import type { Socket } from 'node:net';
import { isDialError } from '../dial/dial-error.ts';
import type { Outcome } from '../engine/attempts.ts';
import { codeOf, isKedgeError } from '../support/errors.ts';
import { isLost, isUnparsable } from './errors.ts';

/** RFC 9110 §9.2.2, with QUERY (draft-ietf-httpbis-safe-method-w-body). */
const IDEMPOTENT = new Set(['GET', 'HEAD', 'OPTIONS', 'TRACE', 'PUT', 'DELETE', 'QUERY']);
const NGHTTP2_FRAME_SIZE_ERROR = 6;
const NGHTTP2_REFUSED_STREAM = 7;

/** Our own reasons for ending a connection under its calls; a closed dialer is not one of them. */
const ENDED = new Set(['ERR_KEDGE_CONNECTION', 'ERR_KEDGE_IDENTITY_EXPIRED']);

/** What lost connections had done by then, by the error that their requests are given. */
const losses = new WeakMap<Error, 'unserved' | 'stale'>();

/** Remembers what a connection had done when it is lost, which its requests cannot see. */
export function watchLoss(socket: Socket, isH2: boolean): void {
  socket.once('error', (error) => {
    // Only an orderly end proves that there was nothing to read: a reset discards what was.
    if (!isH2 && socket.bytesRead > 0 && !isUnparsable(error)) losses.set(error, 'stale');
    else if (isH2 && socket.bytesRead === 0 && /other side closed/.test(error.message)) losses.set(error, 'unserved');
  });
}

/** Why pools were given up to whose connections the kedge never said a word. */
const silences = new WeakSet<Error>();

/** Marks that: what was not written may be tried once more, and of the rest nobody knows. */
export function silence<E extends Error>(error: E): E {
  silences.add(error);
  return error;
}

/** What ends an attempt that undici would send again by itself on the connection that refused it. */
export function refusedStream(): Error {
  const error = new Error('Stream closed with error code NGHTTP2_REFUSED_STREAM');
  return Object.assign(error, { code: 'ERR_HTTP2_STREAM_ERROR', http2ErrorCode: NGHTTP2_REFUSED_STREAM });
}

/** What ends a stream that a GOAWAY leaves out; undici says it like this. */
export function leftOut(code: number): Error {
  const error = new Error(`HTTP/2: "GOAWAY" frame received with code ${code}`);
  return Object.assign(error, { code: 'UND_ERR_SOCKET' });
}

/** What an error says of the attempt that it ended: which was written or not, and of whose answer a byte was here or not. */
export function outcomeOf(error: unknown, isStarted: boolean, hasBegun: boolean): Outcome {
  // A dial that fails after the start: undici had taken the request back from a connection that turned it away.
  if (isDialError(error)) return isStarted ? 'unprocessed' : 'unsent';
  const code = codeOf(error);
  const lost = isLost(code) || (isKedgeError(error) && ENDED.has(code));
  if (!isStarted) return silences.has(error as Error) ? 'unserved' : lost ? 'unsent' : 'final';
  const { http2ErrorCode, message } = (error ?? {}) as { http2ErrorCode?: unknown; message?: unknown };
  if (http2ErrorCode === NGHTTP2_REFUSED_STREAM && code === 'ERR_HTTP2_STREAM_ERROR') return 'refused';
  // undici has no codes for these; the first comes only for streams that the kedge's GOAWAY leaves out.
  if (/"GOAWAY" frame received/.test(String(message))) return 'unprocessed';
  const frame = unsentHeaders(message);
  if (frame !== undefined) return frame === NGHTTP2_FRAME_SIZE_ERROR ? 'final' : 'unprocessed';
  const loss = losses.get(error as Error);
  // What was read were answers to others, unless it was this one's.
  return loss === undefined || hasBegun ? (lost ? 'lost' : 'final') : loss;
}

/** nghttp2's code for HEADERS that it did not send: it has read a GOAWAY meanwhile, or they are too long for a frame. */
export function unsentHeaders(message: unknown): number | undefined {
  const match = /"frameError" received - type 1, code ([0-9]+)/.exec(String(message));
  return match === null ? undefined : Number(match[1]);
}

export function isIdempotent(method: string, idempotent: boolean | undefined): boolean {
  return idempotent ?? IDEMPOTENT.has(method);
}
