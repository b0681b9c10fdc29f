import {
  type ClientHttp2Stream,
  constants,
  type IncomingHttpHeaders,
  type OutgoingHttpHeaders,
  type ServerHttp2Stream,
} from 'node:http2';

const { NGHTTP2_CANCEL, NGHTTP2_INTERNAL_ERROR, NGHTTP2_NO_ERROR, NGHTTP2_REFUSED_STREAM } = constants;
const UNAVAILABLE = 14;

/**
 * Joins a client's gRPC stream with the one behind, in both directions and in every way to end; `clean` takes off headers
 * that are not for the client, and throws when there are some that cannot be sent.
 */
export function joinStreams(
  stream: ServerHttp2Stream,
  upstream: ClientHttp2Stream,
  clean: (headers: IncomingHttpHeaders) => OutgoingHttpHeaders,
  cleanTrailers = clean,
): void {
  let trailers: IncomingHttpHeaders = {};
  // Node throws where the client was faster: nothing that a client does may end this process.
  const send = (what: () => void) => {
    if (stream.destroyed || stream.closed) return;
    try {
      what();
    } catch {
      stream.close(NGHTTP2_INTERNAL_ERROR);
    }
  };
  stream.on('aborted', () => upstream.close(NGHTTP2_CANCEL));
  stream.pipe(upstream);
  upstream.on('response', (headers, flags) =>
    send(() => {
      if (stream.headersSent) return;
      const head = { ...clean(headers), ':status': headers[':status'] };
      const endStream = (flags & constants.NGHTTP2_FLAG_END_STREAM) !== 0;
      stream.respond(head, { endStream, waitForTrailers: !endStream });
      if (!endStream) upstream.pipe(stream);
    }),
  );
  stream.on('wantTrailers', () =>
    send(() => {
      // Node ends what was cut off as if it were whole.
      if (upstream.rstCode !== NGHTTP2_NO_ERROR) stream.close(upstream.rstCode);
      else stream.sendTrailers(cleanTrailers(trailers));
    }),
  );
  upstream.on('trailers', (received) => {
    trailers = received;
  });
  upstream.on('error', () => {});
  upstream.on('close', () => {
    const { rstCode } = upstream;
    if (rstCode === NGHTTP2_REFUSED_STREAM && !stream.headersSent) stream.close(rstCode);
    else if (!stream.headersSent) endWith(stream, UNAVAILABLE, 'the connection behind was lost');
    else if (rstCode !== NGHTTP2_NO_ERROR && !stream.closed) stream.close(rstCode);
  });
  stream.on('error', () => {});
  stream.on('close', () => {
    if (!upstream.closed && !upstream.destroyed) upstream.close(NGHTTP2_CANCEL);
  });
}

/** A status without a message ("trailers-only"), with `more` beside it. */
export function endWith(
  stream: ServerHttp2Stream,
  status: number,
  message: string,
  more: OutgoingHttpHeaders = {},
): void {
  if (stream.destroyed || stream.closed || stream.headersSent) return;
  const head = {
    ':status': 200,
    'content-type': 'application/grpc',
    'grpc-status': String(status),
    'grpc-message': encodeURI(message.toWellFormed()),
    ...more,
  };
  try {
    stream.respond(head, { endStream: true });
  } catch {
    // Its client was faster: there is nobody to tell.
  }
  // What the client still sends is not wanted.
  stream.close(NGHTTP2_NO_ERROR);
}
