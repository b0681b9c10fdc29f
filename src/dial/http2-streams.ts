import { subscribe } from 'node:diagnostics_channel';
import type { ClientHttp2Session, ClientHttp2Stream } from 'node:http2';
import type { Socket } from 'node:net';
import { MAX_INT32 } from '../support/timer.ts';

/** Ids of streams run out (RFC 9113 §5.1.1): from this one on a connection is replaced, and calls that wait for it have the rest. */
export const LAST_STREAM_ID = MAX_INT32 - 2 ** 20;

/** Sees each new HTTP/2 stream of a connection. */
export type OnStream = (stream: ClientHttp2Stream, session: ClientHttp2Session) => void;

/** On our sockets; `session.socket` is a Proxy, so identity does not tell. */
const ON_STREAM = Symbol('kedge-dialer.onStream');

type Marked = { [ON_STREAM]?: OnStream };

const sessions = new WeakMap<ClientHttp2Session, OnStream | null>();
let subscribed = false;

/**
 * Shows the streams that a client library opens on a connection of ours: Node's own diagnostics channel is the one public
 * way to them (Node.js documentation, diagnostics_channel, "HTTP/2").
 */
export function watchStreams(socket: Socket, onStream: OnStream): void {
  (socket as Marked)[ON_STREAM] = onStream;
  if (subscribed) return;
  subscribed = true;
  subscribe('http2.client.stream.created', (message) => {
    const { stream } = message as { stream: ClientHttp2Stream };
    const session = stream.session as ClientHttp2Session | undefined;
    if (session === undefined) return;
    let seen = sessions.get(session);
    if (seen === undefined) {
      seen = (session.socket as Marked | undefined)?.[ON_STREAM] ?? null;
      sessions.set(session, seen);
    }
    seen?.(stream, session);
  });
}

/**
 * Of a stream that has been reset. Where the kedge allows no streams yet it was never sent, and Node would never say that it
 * is closed.
 */
export function destroySoon(stream: ClientHttp2Stream): void {
  setImmediate(() => stream.destroy());
}
