import type { ClientHttp2Session } from 'node:http2';
import type { Socket } from 'node:net';
import { wakeReads } from '../dial/wake-reads.ts';

/** How often we look during one interval. */
const LOOKS = 4;
/** Bytes a second that any link carries: what a PING stands behind gets that much time, and no more than this many bytes do. */
const SLOWEST_LINK = 64 * 1024;
const MOST_ON_THE_WAY = 4 * 1024 * 1024;

/** A connection to watch. */
export interface Watched {
  readonly session: ClientHttp2Session;
  readonly socket: Socket;
  /** Bytes of large uploads so far. */
  readonly uploads: { readonly uploaded: number };
}

/**
 * Closes an HTTP/2 connection that froze: after an interval without a byte a PING asks for one, and after another the
 * calls end, which would wait for their headers timeout otherwise, five minutes by default. undici sends PINGs as well,
 * but sets them no limit, and sends none on a connection that drains (nodejs/undici lib/dispatcher/client-h2.js).
 *
 * Whatever arrives is a sign of life: the answer to a PING may stand behind megabytes that are on their way. Where the
 * PING itself may stand behind an upload, it has more time. Looks are counted, so that a pause of the whole process is
 * one of them however long it was, and the last word is spoken after all that is there has been read.
 */
export function watchSession({ session, socket, uploads }: Watched, intervalMs: number, frozen: () => Error): void {
  const lookMs = intervalMs / LOOKS;
  let received = 0;
  let uploaded = 0;
  let silent = 0;
  const look = () => {
    if (socket.bytesRead !== received) {
      received = socket.bytesRead;
      uploaded = uploads.uploaded;
      silent = 0;
      return;
    }
    silent += 1;
    wakeReads(socket);
    if (silent === LOOKS && !session.destroyed) ask(session);
    const onTheWay = Math.min(uploads.uploaded - uploaded, MOST_ON_THE_WAY);
    const patience = 2 * intervalMs + (onTheWay / SLOWEST_LINK) * 1000;
    if (silent * lookMs >= patience) setImmediate(() => socket.bytesRead === received && socket.destroy(frozen()));
  };
  const timer = setInterval(look, lookMs).unref();
  socket.once('close', () => clearInterval(timer));
}

/** Node sends no PING once a session is to close (nodejs/node lib/internal/http2/core.js), but SETTINGS, which are acknowledged too. */
function ask(session: ClientHttp2Session): void {
  if (session.closed) session.settings({});
  else session.ping(() => {});
}
