import type http2 from 'node:http2';
import type { TLSSocket } from 'node:tls';

const PREFACE_MS = 5_000;
const IDLE_MS = 120_000;
const HEADERS_MS = 10_000;
const CHECK_MS = 1_000;
/** A PING frame (RFC 9113 §6.7): the one thing that an idle client may send for ever. */
const PING_BYTES = 17;

/**
 * The timers that Node has for HTTP/1.1 only: a client that never says SETTINGS, is idle, or keeps sending without ever
 * beginning a request is closed.
 */
export function guardSession(session: http2.ServerHttp2Session): void {
  const preface = setTimeout(() => session.destroy(), PREFACE_MS);
  session.once('remoteSettings', () => clearTimeout(preface));
  session.setTimeout(IDLE_MS, () => session.close());

  const socket = session.socket as TLSSocket;
  let open = 0;
  let pings = 0;
  let quietSince = performance.now();
  let bytes = 0;
  const account = () => {
    quietSince = performance.now();
    bytes = read() - pings * PING_BYTES;
  };
  const read = () => (session.destroyed ? 0 : (socket.bytesRead ?? 0));
  session.on('ping', () => {
    pings += 1;
  });
  session.on('stream', (stream) => {
    open += 1;
    stream.once('close', () => {
      open -= 1;
      account();
    });
  });
  const check = setInterval(() => {
    if (open > 0 || read() - pings * PING_BYTES <= bytes) {
      account();
      return;
    }
    if (performance.now() - quietSince < HEADERS_MS) return;
    // Most likely HEADERS that never end; an honest client opens another connection.
    session.close();
    session.destroy();
  }, CHECK_MS).unref();
  session.once('close', () => {
    clearTimeout(preface);
    clearInterval(check);
  });
}
