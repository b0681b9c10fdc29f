import type { ClientHttp2Stream } from 'node:http2';

/**
 * Lets no answer that was cut pass for a whole one. A stream that the kedge resets with NO_ERROR or CANCEL ends without an
 * error in Node, which pushes an end as if END_STREAM had come (nodejs/node `onStreamClose()` and `_destroy()` in
 * lib/internal/http2/core.js), and undici completes the answer on that. END_STREAM itself is pushed before the stream is
 * closed. Without an end undici says of a stream that closes that its answer is not complete.
 */
export function endOnlyWhole(stream: ClientHttp2Stream): void {
  stream.push = push;
}

function push(this: ClientHttp2Stream, chunk: unknown, encoding?: BufferEncoding): boolean {
  const inherited: ClientHttp2Stream['push'] = Object.getPrototypeOf(this).push;
  if (chunk !== null) return inherited.call(this, chunk, encoding);
  if (this.closed) {
    // Node goes on with a stream that it takes to be there.
    process.nextTick(() => this.destroy());
    return false;
  }
  this.push = inherited;
  return inherited.call(this, null);
}

/**
 * Lets no answer be cut by its own trailers: undici stops listening for data when they come (nodejs/undici `onTrailers()` in
 * lib/dispatcher/client-h2.js), though a stream whose reader is slow has some left, which would flow to nobody.
 */
export function readBeforeTrailers(stream: ClientHttp2Stream): void {
  // Before undici's own, for it has none yet.
  stream.once('trailers', () => {
    if (stream.readableLength === 0) return;
    stream.off = offButData;
    process.nextTick(() => Reflect.deleteProperty(stream, 'off'));
  });
}

function offButData(this: ClientHttp2Stream, event: string | symbol, listener: (...args: unknown[]) => void) {
  return event === 'data' ? this : this.removeListener(event, listener);
}
