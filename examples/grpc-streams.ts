import {
  type ClientHttp2Stream,
  constants,
  type IncomingHttpHeaders,
  type OutgoingHttpHeaders,
  type ServerHttp2Stream,
} from 'node:http2';

const { NGHTTP2_CANCEL, NGHTTP2_INTERNAL_ERROR, NGHTTP2_NO_ERROR } = constants;
const UNAVAILABLE = 14;

/** Joins a client's gRPC stream with the one behind, in both directions and in every way to end; `clean` takes off headers that are not for the client. */
export function joinStreams(
  stream: ServerHttp2Stream,
  upstream: ClientHttp2Stream,
  clean: (headers: IncomingHttpHeaders) => OutgoingHttpHeaders,
): void {
  let trailers: IncomingHttpHeaders = {};
  stream.pipe(upstream);
  upstream.on('response', (headers, flags) => {
    if (stream.destroyed || stream.headersSent) return;
    const head = { ':status': headers[':status'], ...clean(headers) };
    if ((flags & constants.NGHTTP2_FLAG_END_STREAM) !== 0) {
      stream.respond(head, { endStream: true });
      return;
    }
    stream.respond(head, { waitForTrailers: true });
    stream.on('wantTrailers', () => stream.sendTrailers(clean(trailers)));
    upstream.pipe(stream);
  });
  upstream.on('trailers', (received) => {
    trailers = received;
  });
  upstream.on('error', () => {});
  upstream.on('close', () => {
    if (stream.destroyed || stream.closed) return;
    if (!stream.headersSent) endWith(stream, UNAVAILABLE, 'the connection behind was lost');
    else if (upstream.rstCode !== NGHTTP2_NO_ERROR || !('grpc-status' in trailers))
      stream.close(upstream.rstCode || NGHTTP2_INTERNAL_ERROR);
  });
  stream.on('error', () => {});
  stream.on('close', () => {
    if (!upstream.closed && !upstream.destroyed) upstream.close(NGHTTP2_CANCEL);
  });
}

/** A status without a message ("trailers-only"). */
export function endWith(stream: ServerHttp2Stream, status: number, message: string): void {
  if (stream.destroyed || stream.closed) return;
  const head = {
    ':status': 200,
    'content-type': 'application/grpc',
    'grpc-status': String(status),
    'grpc-message': encodeURI(message),
  };
  stream.respond(head, { endStream: true });
  // What the client still sends is not wanted.
  stream.close(NGHTTP2_NO_ERROR);
}
