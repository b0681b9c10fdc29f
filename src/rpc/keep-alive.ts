import { type ClientHttp2Session, constants } from 'node:http2';
import type { Socket } from 'node:net';
import { wakeReads } from '../dial/wake-reads.ts';
import { MAX_INT32, running } from '../support/timer.ts';

/** How a {@link keepAlive} is done. */
export interface KeepAliveOptions {
  /** How often a PING is sent while it is needed, in ms; Infinity: never. */
  readonly timeMs: number;
  /** How long nothing at all may arrive after one, in ms. */
  readonly timeoutMs: number;
  /** Whose connections these are: when it finds the PINGs too many, all of them send fewer. */
  readonly owner: object;
  isNeeded(): boolean;
  /** Nothing came: the connection is frozen. */
  frozen(): void;
}

/** How often it is looked whether a connection that moves nothing is still there, in ms. */
const LOOK_MS = 1000;

/** By how much the interval has grown. */
const patience = new WeakMap<object, number>();

/**
 * Finds out that an HTTP/2 connection is frozen: by PINGs (gRFC A8), after which whatever arrives is a sign of life, for the
 * answer may stand behind megabytes on a slow link. The interval doubles for good when the kedge says `too_many_pings`.
 */
export function keepAlive(session: ClientHttp2Session, socket: Socket, options: KeepAliveOptions): void {
  const { timeMs, timeoutMs, owner } = options;
  let stopWaiting: (() => void) | undefined;
  const stop = () => {
    stopWaiting?.();
    stopWaiting = undefined;
  };
  const ping = () => {
    if (stopWaiting !== undefined || session.destroyed || !options.isNeeded()) return;
    const before = socket.bytesRead;
    stopWaiting = running(timeoutMs, () => {
      stopWaiting = undefined;
      if (socket.bytesRead === before) options.frozen();
    });
    // Node sends no PING on a session that finishes its last streams; SETTINGS are answered as well (RFC 9113 §6.5.3).
    if (session.closed) session.settings({ enablePush: false }, stop);
    else session.ping(stop);
  };
  const intervalMs = Math.min(timeMs * (patience.get(owner) ?? 1), MAX_INT32);
  const pings = timeMs === Number.POSITIVE_INFINITY ? undefined : setInterval(ping, intervalMs).unref();
  const looks = setInterval(wakeWhatIsStill(socket, options), LOOK_MS).unref();
  session.once('goaway', (code, _last, data) => {
    if (code !== constants.NGHTTP2_ENHANCE_YOUR_CALM || data?.toString() !== 'too_many_pings') return;
    patience.set(owner, (patience.get(owner) ?? 1) * 2);
  });
  session.once('close', () => {
    clearInterval(pings);
    clearInterval(looks);
    stop();
  });
}

/** Looks whether anything moved since the last time, where something should. */
function wakeWhatIsStill(socket: Socket, { isNeeded }: KeepAliveOptions): () => void {
  let last = -1;
  return () => {
    const moved = socket.bytesRead + socket.bytesWritten;
    if (isNeeded() && moved === last) wakeReads(socket);
    last = moved;
  };
}
