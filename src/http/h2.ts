import type { Socket } from 'node:net';
import { watchStreams } from '../kedge/streams.ts';
import { closeAsCancelled } from './cancel.ts';
import { continueUnasked } from './expect.ts';
import { Uploads } from './uploads.ts';
import { watchSession } from './watchdog.ts';

/** Does on an HTTP/2 connection what undici and Node leave undone. */
export function tend(socket: Socket, pingIntervalMs: number, frozen: () => Error): void {
  let uploads: Uploads | undefined;
  watchStreams(socket, (stream, session) => {
    if (uploads === undefined) {
      uploads = new Uploads(session);
      watchSession({ session, socket, uploads }, pingIntervalMs, frozen);
    }
    closeAsCancelled(stream);
    uploads.watch(stream);
    continueUnasked(stream);
  });
}
