import { type ClientHttp2Stream, constants, type IncomingHttpHeaders, type IncomingHttpStatusHeader } from 'node:http2';
import { Code, ConnectError } from '@connectrpc/connect';
import type { Session } from '../rpc/session.ts';
import { isKedgeError, KedgeError, rpcStatusOf } from '../support/errors.ts';
import { running } from '../support/timer.ts';

/** How long an answer that is not of the call's protocol may stay unread, in ms. */
const UNREAD_MS = 100;

const { NGHTTP2_CANCEL, NGHTTP2_NO_ERROR, NGHTTP2_REFUSED_STREAM } = constants;
const { NGHTTP2_ENHANCE_YOUR_CALM, NGHTTP2_INADEQUATE_SECURITY } = constants;

/** What else a stream may be reset with (gRPC over HTTP2, "Errors"). */
const RESETS: Readonly<Record<number, Code>> = {
  [NGHTTP2_CANCEL]: Code.Canceled,
  [NGHTTP2_ENHANCE_YOUR_CALM]: Code.ResourceExhausted,
  [NGHTTP2_INADEQUATE_SECURITY]: Code.PermissionDenied,
};

/** A call that has a stream. */
export interface OpenCall {
  readonly stream: ClientHttp2Stream;
  readonly session: Session;
  readonly target: string;
  readonly kedge: string | undefined;
  readonly contentType: unknown;
}

/**
 * Sees a stream to its end, which `onEnd` hears of once. Transports leave streams unread: of an answer that is not what they
 * expect, or whose reader has had enough. Node says 'close' when all is read, so what counts is the end on the wire, which
 * it tells by `push(null)`. What ends before that ends with our error in place of Node's, which says neither why nor where.
 */
export function watchCall(call: OpenCall, onEnd: () => void): void {
  const { stream } = call;
  const { push, destroy } = stream;
  let isAnswered = false;
  let isOver = false;
  const end = () => {
    if (isOver) return;
    isOver = true;
    onEnd();
  };
  stream.push = (chunk: unknown, encoding?: BufferEncoding) => {
    // Both sides have ended; what is done about it must not run within nghttp2.
    if (chunk === null && stream.closed) process.nextTick(end);
    return push.call(stream, chunk, encoding);
  };
  stream.destroy = (error?: Error) => {
    // The end of the connection takes nothing from a slow reader.
    const isWhole = stream.closed && stream.rstCode === NGHTTP2_NO_ERROR && isAnswered;
    if (isWhole && error == null && stream.readableLength > 0) return stream;
    return destroy.call(stream, failureOf(call, error, isAnswered));
  };
  stream.once('close', end);
  stream.once('response', (answer) => {
    isAnswered = true;
    if (!isExpected(call, answer)) running(UNREAD_MS, () => discardUnread(stream));
  });
}

/** What a call fails with, as its transport is to hear it. */
export function connectError(error: unknown, target: string, kedge?: string, code?: Code): ConnectError {
  if (error instanceof ConnectError) return error;
  const cause = isKedgeError(error)
    ? error.for(target, kedge)
    : new KedgeError('ERR_KEDGE_CONNECTION', 'the call failed', { target, kedge, cause: error });
  return new ConnectError(cause.message, code ?? (rpcStatusOf(cause.code) as Code), undefined, undefined, cause);
}

/** Why a stream is destroyed; `error` is what Node or its owner says. */
function failureOf(call: OpenCall, error: Error | undefined, isAnswered: boolean): Error | undefined {
  const { stream, session, target, kedge } = call;
  const { rstCode = NGHTTP2_NO_ERROR } = stream;
  const failed = (reason: string, code?: Code) =>
    connectError(new KedgeError('ERR_KEDGE_CONNECTION', reason, { cause: error }), target, kedge, code);
  if (isKedgeError(error)) return connectError(error, target, kedge);
  if (stream.closed && rstCode === NGHTTP2_REFUSED_STREAM) return failed('the kedge did not take the call');
  // Its end came before that of the connection.
  if (stream.closed && rstCode === NGHTTP2_NO_ERROR && isAnswered) return error;
  if (session.isLost || isEndOfSession(error)) {
    return session.why === undefined ? failed('the connection was lost') : connectError(session.why, target, kedge);
  }
  // What its owner ends it with is the owner's business.
  if (error != null || !stream.closed) return error;
  if (rstCode === NGHTTP2_NO_ERROR) return failed('the kedge ended the call without an answer');
  // That may have been its caller, who has heard of it.
  if (rstCode === NGHTTP2_CANCEL) return undefined;
  return failed(`the stream was reset with code ${rstCode}`, RESETS[rstCode] ?? Code.Internal);
}

function isEndOfSession(error: Error | undefined): boolean {
  return /^ERR_HTTP2_(?:SESSION_ERROR|STREAM_CANCEL)$/.test(String((error as NodeJS.ErrnoException | undefined)?.code));
}

/** Transports look no further at anything else. */
function isExpected(call: OpenCall, answer: IncomingHttpHeaders & IncomingHttpStatusHeader): boolean {
  return answer[':status'] === 200 && kindOf(answer['content-type']) === kindOf(call.contentType);
}

function kindOf(contentType: unknown): string {
  return String(contentType).split(/[+;]/, 1)[0]!;
}

function discardUnread(stream: ClientHttp2Stream): void {
  const isRead = stream.readableFlowing === true || stream.listenerCount('readable') > 0;
  if (isRead || stream.destroyed) return;
  if (stream.closed) stream.resume();
  else stream.close(NGHTTP2_CANCEL);
}
