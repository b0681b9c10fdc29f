import { type ClientHttp2Stream, constants } from 'node:http2';
import { destroySoon } from '../dial/http2-streams.ts';

type Close = ClientHttp2Stream['close'];

/**
 * undici ends an aborted HTTP/2 request with `stream.close()` and then destroys the stream. Without a code Node waits for
 * the rest of the body before it resets the stream (nodejs/node `closeStream()` in lib/internal/http2/core.js); where the
 * kedge's window holds that rest back, the reset is never sent, and the next WINDOW_UPDATE makes nghttp2 ask a destroyed
 * stream for its data, for ever: the process hangs. With CANCEL (RFC 9113 §7), which is what an abort means, the reset
 * goes out at once.
 *
 * Node also ends the writing side before it resets, and sends that end: what there was of the body would arrive as a whole
 * one, and a PUT that was given up as half an object.
 */
export function closeAsCancelled(stream: ClientHttp2Stream): void {
  stream.close = close;
}

function close(this: ClientHttp2Stream, code = constants.NGHTTP2_CANCEL, callback?: Parameters<Close>[1]): void {
  this.end = () => this;
  const inherited: Close = Object.getPrototypeOf(this).close;
  inherited.call(this, code, callback);
  destroySoon(this);
}
