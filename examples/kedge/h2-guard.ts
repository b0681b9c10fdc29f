import type http2 from 'node:http2';
import type { TLSSocket } from 'node:tls';

const PREFACE_MS = 5_000;
const IDLE_MS = 120_000;
const CHECK_MS = 10_000;
/** Checks that a PING may go unanswered beside open streams, whose data may stand before the answer on a slow line. */
const PATIENCE = 6;

/** How many a session has: to be counted by whoever serves them. */
export interface Streams {
  open: number;
}

/**
 * The timers that Node has for HTTP/1.1 only: a client that never says SETTINGS or is idle is closed, and so is one that
 * sends, but cannot answer a PING meanwhile: a frame or a header block of it never ends (RFC 9113 §6.10).
 */
export function guardSession(session: http2.ServerHttp2Session): Streams {
  const preface = setTimeout(() => session.destroy(), PREFACE_MS);
  session.once('remoteSettings', () => clearTimeout(preface));
  session.setTimeout(IDLE_MS, () => session.close());

  const socket = session.socket as TLSSocket;
  const streams: Streams = { open: 0 };
  let bytes = 0;
  let unanswered = 0;
  let isAsked = false;
  const check = setInterval(() => {
    if (session.destroyed) return;
    if (isAsked) unanswered += 1;
    if (unanswered >= (streams.open === 0 ? 1 : PATIENCE)) {
      session.destroy();
      return;
    }
    const now = socket.bytesRead ?? 0;
    if (isAsked || now === bytes) return;
    bytes = now;
    isAsked = session.ping(() => {
      isAsked = false;
      unanswered = 0;
      // Its answer is no reason to ask again.
      bytes = session.destroyed ? 0 : (socket.bytesRead ?? 0);
    });
  }, CHECK_MS).unref();
  session.once('close', () => {
    clearTimeout(preface);
    clearInterval(check);
  });
  return streams;
}
