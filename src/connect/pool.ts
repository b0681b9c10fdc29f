import http2, { type ClientHttp2Session, type ClientHttp2Stream } from 'node:http2';
import type { Socket } from 'node:net';
import { KedgeError, type KedgeErrorCode } from '../errors.ts';
import type { Generation, WirePool } from '../kedge/generation.ts';
import type { Kedge } from '../kedge/kedge.ts';
import { keepAlive } from '../kedge/keep-alive.ts';
import type { ResolvedOptions } from '../options.ts';
import { refuseUnprocessed } from './goaway.ts';

/** One HTTP/2 connection, there or on its way. */
interface Entry {
  readonly ready: Promise<ClientHttp2Session>;
  session: ClientHttp2Session | undefined;
  socket: Socket | undefined;
  /** Follows a new stream. */
  opened: ((stream: ClientHttp2Stream) => void) | undefined;
  calls: number;
  /** Streams at a time: ours to say, unless the kedge says fewer. */
  limit: number;
  /** It takes no new calls: the kedge said so, it is lost, or not needed any more. */
  over: boolean;
  idle: NodeJS.Timeout | undefined;
}

/** How long a connection beyond the first may have no calls before it is closed, in ms. */
const IDLE_MS = 30_000;
/** How long a kedge may take to close its half of a connection that is closed, in ms. */
const CLOSE_MS = 1_000;

/**
 * The HTTP/2 connections of one generation for connect-es, with the limits of the gRPC wire: each call goes to the least
 * loaded one, another opens only when all are full.
 */
export class SessionPool implements WirePool {
  private readonly generation: Generation;
  private readonly kedge: Kedge;
  private readonly options: ResolvedOptions;
  private readonly entries = new Set<Entry>();
  private calls = 0;
  private drained: (() => void) | undefined;

  constructor(kedge: Kedge, options: ResolvedOptions) {
    this.generation = kedge.generation;
    this.kedge = kedge;
    this.options = options;
  }

  get inFlight(): number {
    return this.calls;
  }

  /**
   * Opens a stream with `open` on the best connection. The call counts until the stream has closed.
   *
   * @throws {@link KedgeError} what went wrong with the dial, the reason of `signal`, or what `open` throws
   */
  async stream(
    open: (session: ClientHttp2Session) => ClientHttp2Stream,
    signal: AbortSignal,
  ): Promise<ClientHttp2Stream> {
    for (let refused = 0; ; refused += 1) {
      const entry = this.choose();
      entry.calls += 1;
      this.calls += 1;
      clearTimeout(entry.idle);
      try {
        if (entry.session === undefined) await unlessAborted(entry.ready, signal);
        if (!isOver(entry)) return this.begin(entry, open);
        // A kedge that turns connections away as soon as they are there is asked for one more.
        if (refused > 0) throw this.lost('the kedge closed the connection before the call was sent');
      } catch (error) {
        this.release(entry);
        throw error;
      }
      this.release(entry);
    }
  }

  async close(): Promise<void> {
    if (this.calls > 0) {
      const { promise, resolve } = Promise.withResolvers<void>();
      this.drained = resolve;
      await promise;
    }
    for (const entry of this.entries) {
      clearTimeout(entry.idle);
      entry.session?.close();
    }
  }

  destroy(error: Error): void {
    for (const { session } of this.entries) session?.destroy(error);
    this.drained?.();
  }

  private begin(entry: Entry, open: (session: ClientHttp2Session) => ClientHttp2Stream): ClientHttp2Stream {
    const session = entry.session!;
    const stream = open(session);
    entry.opened!(stream);
    // Calls hold the process, connections do not.
    session.ref();
    stream.once('close', () => this.release(entry));
    // A call that found a connection there is no dial that would tell.
    const { breaker } = this.kedge;
    if (!breaker.isClosed) stream.once('response', () => breaker.succeeded());
    // What ends it before its caller has it must not end the process.
    stream.on('error', () => {});
    return stream;
  }

  private release(entry: Entry): void {
    entry.calls -= 1;
    this.calls -= 1;
    if (entry.calls === 0) this.unused(entry);
    if (this.calls === 0) this.drained?.();
  }

  private unused(entry: Entry): void {
    const { session } = entry;
    if (isOver(entry)) {
      this.end(entry);
      return;
    }
    if (session === undefined) return;
    session.unref();
    entry.idle = setTimeout(() => {
      if (this.usable().length > 1) this.end(entry);
    }, IDLE_MS).unref();
  }

  private usable(): Entry[] {
    return [...this.entries].filter((entry) => !isOver(entry));
  }

  private choose(): Entry {
    let best: Entry | undefined;
    let open = 0;
    for (const entry of this.entries) {
      if (isOver(entry)) continue;
      open += 1;
      if (best === undefined || rankOf(entry) < rankOf(best)) best = entry;
    }
    const isFull = best === undefined || best.calls >= best.limit;
    return best !== undefined && (!isFull || open >= this.options.grpc.maxConnections) ? best : this.open();
  }

  private open(): Entry {
    const { promise, resolve, reject } = Promise.withResolvers<ClientHttp2Session>();
    const entry: Entry = {
      ready: promise,
      session: undefined,
      socket: undefined,
      opened: undefined,
      calls: 0,
      limit: this.options.grpc.maxStreamsPerConnection,
      over: false,
      idle: undefined,
    };
    promise.catch(() => {});
    this.entries.add(entry);
    const fail = (error: KedgeError) => {
      this.entries.delete(entry);
      reject(error);
    };
    this.generation.connector.connect(['h2'], (error, socket) => {
      if (error !== null) fail(error);
      else this.speak(entry, socket!, resolve, fail);
    });
    return entry;
  }

  /** HTTP/2 on a connection: there when the kedge's SETTINGS are. */
  private speak(
    entry: Entry,
    socket: Socket,
    ready: (session: ClientHttp2Session) => void,
    fail: (error: KedgeError) => void,
  ): void {
    const { connector } = this.generation;
    const { connect, grpc } = this.options;
    const session = http2.connect(connector.origin, {
      createConnection: () => socket,
      settings: { initialWindowSize: grpc.windowBytes, enablePush: false },
    });
    let pending = true;
    const failed = (code: KedgeErrorCode, reason: string, cause?: Error) => {
      if (!pending) return;
      pending = false;
      clearTimeout(timer);
      this.kedge.failed();
      fail(connector.refusal ?? new KedgeError(code, 'connect', reason, { kedge: connector.name, cause }));
      session.destroy();
    };
    // What came while this process stood still is read first.
    const late = () =>
      failed('ERR_KEDGE_CONNECT_TIMEOUT', `no HTTP/2 SETTINGS within ${connect.handshakeTimeoutMs} ms`);
    const timer = setTimeout(() => setImmediate(late), connect.handshakeTimeoutMs);
    let lastError: Error | undefined;
    session.on('error', (error) => {
      lastError = error;
    });
    session.once('goaway', () => this.end(entry));
    session.once('close', () => {
      failed('ERR_KEDGE_CONNECT', 'the kedge closed the connection before it spoke HTTP/2', lastError);
      entry.over = true;
      clearTimeout(entry.idle);
      this.entries.delete(entry);
    });
    session.on('remoteSettings', ({ maxConcurrentStreams = Number.POSITIVE_INFINITY }) => {
      // At 0 calls wait for the kedge to allow some again (RFC 9113 §6.5.2).
      entry.limit = Math.max(1, Math.min(maxConcurrentStreams, grpc.maxStreamsPerConnection));
    });
    session.once('remoteSettings', () => {
      if (!pending) return;
      pending = false;
      clearTimeout(timer);
      session.setLocalWindowSize(grpc.windowBytes);
      session.unref();
      entry.opened = refuseUnprocessed(session);
      entry.session = session;
      entry.socket = socket;
      keepAlive(session, socket, {
        timeMs: grpc.keepaliveTimeMs,
        timeoutMs: grpc.keepaliveTimeoutMs,
        isNeeded: () => entry.calls > 0,
        frozen: () => this.lost(`nothing arrived within ${grpc.keepaliveTimeoutMs} ms of a PING`),
        owner: this.kedge,
      });
      ready(session);
    });
  }

  /** Takes no new calls; those under way finish, and it closes after the last. */
  private end(entry: Entry): void {
    entry.over = true;
    entry.session?.close();
    const { socket } = entry;
    // Node waits for the kedge to close its half, too.
    if (entry.calls === 0 && socket !== undefined) setTimeout(() => socket.destroy(), CLOSE_MS).unref();
  }

  private lost(reason: string): KedgeError {
    return new KedgeError('ERR_KEDGE_CONNECTION', 'kedge', reason, { kedge: this.generation.connector.name });
  }
}

function isOver({ over, session }: Entry): boolean {
  return over || session?.closed === true;
}

/** Room first, then a connection that is there, then the least loaded. */
function rankOf({ calls, limit, session }: Entry): number {
  const full = calls >= limit ? 2 ** 40 : 0;
  const absent = session === undefined ? 2 ** 30 : 0;
  return full + absent + calls;
}

async function unlessAborted(ready: Promise<unknown>, signal: AbortSignal): Promise<void> {
  signal.throwIfAborted();
  const { promise: aborted, reject } = Promise.withResolvers<never>();
  const abort = () => reject(signal.reason);
  signal.addEventListener('abort', abort, { once: true });
  try {
    await Promise.race([ready, aborted]);
    // A kedge that ends the connection at once says so right behind its SETTINGS.
    await new Promise(setImmediate);
    signal.throwIfAborted();
  } finally {
    signal.removeEventListener('abort', abort);
  }
}

/** The pool of a kedge's generation, opened when its first call comes. */
export function sessionPool(kedge: Kedge, options: ResolvedOptions): SessionPool {
  const { generation } = kedge;
  generation.connect ??= new SessionPool(kedge, options);
  return generation.connect as SessionPool;
}
