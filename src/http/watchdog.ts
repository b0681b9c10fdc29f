import type { EventEmitter } from 'node:events';
import type { Socket } from 'node:net';

/** PINGs that may stay unanswered; at the default interval a frozen connection is closed within 5 s. */
const MISSED = 1;

/**
 * Closes an HTTP/2 connection whose PINGs are no longer answered. undici sends them but sets no limit, so calls on a
 * connection that froze, or whose reset Node has missed, would wait for their headers timeout, five minutes by default.
 *
 * Counts turns of the timer, not time: after a pause of the whole process the answers get their chance to be read.
 */
export function watchPings(client: EventEmitter, socket: Socket, intervalMs: number, frozen: () => Error): void {
  let missed = 0;
  const answered = () => {
    missed = 0;
  };
  const timer = setInterval(() => {
    missed += 1;
    if (missed > MISSED) socket.destroy(frozen());
  }, intervalMs).unref();
  client.on('ping', answered);
  socket.once('close', () => {
    clearInterval(timer);
    client.off('ping', answered);
  });
}
