import { type ClientHttp2Session, type ClientHttp2Stream, constants } from 'node:http2';
import type { Socket } from 'node:net';
import type { TLSSocket } from 'node:tls';
import { LAST_STREAM_ID, watchStreams } from '../dial/http2-streams.ts';
import { closeAsCancelled } from './cancel.ts';
import { continueUnasked } from './expect.ts';
import { leftOut } from './outcome.ts';
import { Uploads } from './uploads.ts';
import { watchSession } from './watchdog.ts';
import { endOnlyWhole, readBeforeTrailers } from './whole.ts';

/** Streams that a GOAWAY left out: undici ends them with the code of those that were refused. */
const unprocessed = new WeakSet<ClientHttp2Stream>();

/**
 * Does on an HTTP/2 connection what undici and Node leave undone; `greeted` is told that the kedge speaks HTTP/2, `opened` of
 * each stream as it is opened.
 */
export function tend(
  socket: Socket,
  pingIntervalMs: number,
  frozen: () => Error,
  greeted: () => void,
  opened: (stream: ClientHttp2Stream) => void,
): void {
  const streams = new Set<ClientHttp2Stream>();
  let uploads: Uploads | undefined;
  watchStreams(socket, (stream, session) => {
    if (uploads === undefined) {
      uploads = new Uploads(session);
      watchSession({ session, socket, uploads }, pingIntervalMs, frozen);
      watchGoaway(session, streams);
      if (socket.bytesRead > 0) greeted();
      else session.once('remoteSettings', greeted);
    }
    opened(stream);
    streams.add(stream);
    stream.once('close', () => streams.delete(stream));
    closeAsCancelled(stream);
    endOnlyWhole(stream);
    readBeforeTrailers(stream);
    uploads.watch(stream);
    if ((stream.id ?? 0) > LAST_STREAM_ID) uploads.retire();
    continueUnasked(stream);
  });
}

export function isH2(socket: Socket | TLSSocket): boolean {
  return (socket as Partial<TLSSocket>).alpnProtocol === 'h2';
}

/** Whether the kedge ended a stream with REFUSED_STREAM. */
export function isRefused(stream: ClientHttp2Stream | undefined): boolean {
  return stream?.rstCode === constants.NGHTTP2_REFUSED_STREAM && !unprocessed.has(stream);
}

/**
 * undici takes in the first GOAWAY of a connection and ignores all others (nodejs/undici lib/dispatcher/client-h2.js), but
 * who shuts down gracefully sends two (RFC 9113 §6.8): what the second leaves out was not processed either. Node tells of
 * it before it ends the streams with its code.
 */
function watchGoaway(session: ClientHttp2Session, streams: Iterable<ClientHttp2Stream>): void {
  session.on('goaway', (code, lastStreamId) => {
    for (const stream of streams) {
      // Without an id it is still to be sent.
      if (stream.id !== undefined && stream.id <= lastStreamId) continue;
      unprocessed.add(stream);
      if (!stream.closed) stream.destroy(leftOut(code));
    }
  });
}
