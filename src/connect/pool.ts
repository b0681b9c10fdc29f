import http2, { type ClientHttp2Session, type ClientHttp2Stream } from 'node:http2';
import { KedgeError } from '../errors.ts';
import type { Generation, WirePool } from '../kedge/generation.ts';
import type { Kedge } from '../kedge/kedge.ts';
import type { ResolvedOptions } from '../options.ts';

/** One HTTP/2 connection, there or on its way. */
interface Entry {
  readonly ready: Promise<ClientHttp2Session>;
  session: ClientHttp2Session | undefined;
  calls: number;
  /** Streams at a time: ours to say, unless the kedge says fewer. */
  limit: number;
  /** Refused by a GOAWAY, lost, or closing: it takes no new calls. */
  over: boolean;
}

/**
 * The HTTP/2 connections of one generation for connect-es, with the limits of the gRPC wire: each call goes to the least
 * loaded one, another opens only when all are full.
 */
export class SessionPool implements WirePool {
  private readonly generation: Generation;
  private readonly observer: Kedge;
  private readonly options: ResolvedOptions;
  private readonly entries = new Set<Entry>();
  private calls = 0;
  private drained: (() => void) | undefined;

  constructor(kedge: Kedge, options: ResolvedOptions) {
    this.generation = kedge.generation;
    this.observer = kedge;
    this.options = options;
  }

  get inFlight(): number {
    return this.calls;
  }

  /**
   * Opens a stream with `open` on the best connection. The call counts until the stream has closed.
   *
   * @throws {@link KedgeError} what went wrong with the dial, or what `open` throws
   */
  async stream(open: (session: ClientHttp2Session) => ClientHttp2Stream): Promise<ClientHttp2Stream> {
    const entry = this.choose();
    entry.calls += 1;
    this.calls += 1;
    try {
      const session = await entry.ready;
      const stream = open(session);
      // Calls hold the process, connections do not.
      session.ref();
      stream.once('close', () => this.release(entry));
      // A call that found a connection there is no dial that would tell.
      const { breaker } = this.observer;
      if (!breaker.isClosed) stream.once('response', () => breaker.succeeded());
      return stream;
    } catch (error) {
      this.release(entry);
      throw error;
    }
  }

  async close(): Promise<void> {
    if (this.calls > 0) {
      const { promise, resolve } = Promise.withResolvers<void>();
      this.drained = resolve;
      await promise;
    }
    for (const { session } of this.entries) session?.close();
  }

  destroy(error: Error): void {
    for (const { session } of this.entries) session?.destroy(error);
    this.drained?.();
  }

  private release(entry: Entry): void {
    entry.calls -= 1;
    this.calls -= 1;
    if (entry.calls === 0) {
      entry.session?.unref();
      if (entry.over) entry.session?.close();
    }
    if (this.calls === 0) this.drained?.();
  }

  private choose(): Entry {
    const { maxConnections } = this.options.grpc;
    const usable = [...this.entries].filter(({ over }) => !over);
    const [best] = usable.sort((a, b) => a.calls / a.limit - b.calls / b.limit);
    const isFull = best === undefined || best.calls >= best.limit;
    return best !== undefined && (!isFull || usable.length >= maxConnections) ? best : this.open();
  }

  private open(): Entry {
    const entry: Entry = {
      ready: this.dial().then(
        (session) => this.admit(entry, session),
        (error) => {
          this.entries.delete(entry);
          throw error;
        },
      ),
      session: undefined,
      calls: 0,
      limit: this.options.grpc.maxStreamsPerConnection,
      over: false,
    };
    entry.ready.catch(() => {});
    this.entries.add(entry);
    return entry;
  }

  private admit(entry: Entry, session: ClientHttp2Session): ClientHttp2Session {
    entry.session = session;
    const learn = () => {
      const { maxConcurrentStreams = Number.POSITIVE_INFINITY } = session.remoteSettings;
      entry.limit = Math.max(1, Math.min(maxConcurrentStreams, this.options.grpc.maxStreamsPerConnection));
    };
    learn();
    session.on('remoteSettings', learn);
    const over = () => {
      entry.over = true;
      this.entries.delete(entry);
    };
    session.once('goaway', () => {
      over();
      session.close();
    });
    session.once('close', over);
    this.keepAlive(entry, session);
    return session;
  }

  private dial(): Promise<ClientHttp2Session> {
    const { connector } = this.generation;
    const { connect, grpc } = this.options;
    return new Promise((resolve, reject) => {
      connector.connect(['h2'], (error, socket) => {
        if (error !== null) {
          reject(error);
          return;
        }
        const session = http2.connect(connector.origin, {
          createConnection: () => socket!,
          settings: { initialWindowSize: grpc.windowBytes, enablePush: false },
        });
        const fail = (cause?: Error) => {
          clearTimeout(timer);
          session.destroy();
          const late = `no HTTP/2 SETTINGS within ${connect.handshakeTimeoutMs} ms`;
          const reason = cause === undefined ? late : 'the kedge closed the connection before it spoke HTTP/2';
          const failed = new KedgeError('ERR_KEDGE_CONNECT', 'connect', reason, { kedge: connector.name, cause });
          this.observer.failed();
          reject(connector.refusal ?? failed);
        };
        const closed = () => fail(new Error('closed'));
        const timer = setTimeout(fail, connect.handshakeTimeoutMs);
        session.on('error', () => {});
        session.once('close', closed);
        session.once('remoteSettings', () => {
          clearTimeout(timer);
          session.off('close', closed);
          session.setLocalWindowSize(grpc.windowBytes);
          resolve(session);
        });
      });
    });
  }

  /** PINGs while there are calls (gRFC A8): a frozen connection is closed. */
  private keepAlive(entry: Entry, session: ClientHttp2Session): void {
    const { keepaliveTimeMs, keepaliveTimeoutMs } = this.options.grpc;
    session.unref();
    const timer = setInterval(() => {
      if (entry.calls === 0) return;
      const reason = `no answer to a PING within ${keepaliveTimeoutMs} ms`;
      const frozen = setTimeout(() => {
        const context = { kedge: this.generation.connector.name };
        session.destroy(new KedgeError('ERR_KEDGE_CONNECTION', 'kedge', reason, context));
      }, keepaliveTimeoutMs);
      session.ping(() => clearTimeout(frozen));
    }, keepaliveTimeMs).unref();
    session.once('close', () => clearInterval(timer));
  }
}

/** The pool of a kedge's generation, opened when its first call comes. */
export function sessionPool(kedge: Kedge, options: ResolvedOptions): SessionPool {
  const { generation } = kedge;
  generation.connect ??= new SessionPool(kedge, options);
  return generation.connect as SessionPool;
}
