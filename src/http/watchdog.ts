import type { ClientHttp2Session } from 'node:http2';
import type { Socket } from 'node:net';

/** How often we look during one interval. */
const LOOKS = 4;

/**
 * Closes an HTTP/2 connection that froze: after an interval without a byte a PING asks for one, and after another the
 * calls end, which would wait for their headers timeout otherwise, five minutes by default. undici sends PINGs as well,
 * but sets them no limit, and sends none on a connection that drains (nodejs/undici lib/dispatcher/client-h2.js).
 *
 * Whatever arrives is a sign of life: the answer to a PING may stand behind megabytes that are on their way. Looks are
 * counted, not time, so that a pause of the whole process counts as one of them, and the last word is spoken after all
 * that is there has been read.
 */
export function watchSession(
  session: ClientHttp2Session,
  socket: Socket,
  intervalMs: number,
  frozen: () => Error,
): void {
  let received = 0;
  let silent = 0;
  const look = () => {
    if (socket.bytesRead !== received) {
      received = socket.bytesRead;
      silent = 0;
      return;
    }
    silent += 1;
    if (silent % LOOKS !== 0 || session.destroyed) return;
    if (silent === LOOKS) ask(session);
    else setImmediate(() => socket.bytesRead === received && socket.destroy(frozen()));
  };
  const timer = setInterval(look, intervalMs / LOOKS).unref();
  socket.once('close', () => clearInterval(timer));
}

/** Node sends no PING once a session is to close (nodejs/node lib/internal/http2/core.js), but SETTINGS, which are acknowledged too. */
function ask(session: ClientHttp2Session): void {
  if (session.closed) session.settings({});
  else session.ping(() => {});
}
