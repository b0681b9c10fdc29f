import http2, {
  type ClientHttp2Session,
  type ClientHttp2Stream,
  constants,
  type OutgoingHttpHeaders,
} from 'node:http2';
import type { Socket } from 'node:net';
import type { TLSSocket } from 'node:tls';
import type { Connector } from '../dial/connector.ts';
import { destroySoon, LAST_STREAM_ID } from '../dial/http2-streams.ts';
import type { Kedge } from '../kedge/kedge.ts';
import { debug } from '../support/debug.ts';
import { KedgeError } from '../support/errors.ts';
import { keepAlive } from './keep-alive.ts';

/** How an RPC connection is set up; connections are shared by calls with equal settings. */
export interface SessionSettings {
  /** Of the others, see {@link sessionSettings}. */
  readonly key: string;
  /** Flow-control window of a stream and of the connection, in bytes. */
  readonly windowBytes: number;
  /** How often a connection with calls is asked for a sign of life, in ms (gRFC A8); Infinity: never. */
  readonly keepaliveTimeMs: number;
  readonly keepaliveTimeoutMs: number;
  readonly keepaliveWithoutCalls: boolean;
}

export function sessionSettings(settings: Omit<SessionSettings, 'key'>): SessionSettings {
  const { windowBytes, keepaliveTimeMs, keepaliveTimeoutMs, keepaliveWithoutCalls } = settings;
  const key = `${windowBytes} ${keepaliveTimeMs} ${keepaliveTimeoutMs} ${keepaliveWithoutCalls}`;
  return { key, windowBytes, keepaliveTimeMs, keepaliveTimeoutMs, keepaliveWithoutCalls };
}

/** What a session belongs to. */
export interface SessionOwner {
  readonly connector: Connector;
  readonly settings: SessionSettings;
  readonly handshakeTimeoutMs: number;
  /** Streams at a time on each of its sessions. */
  readonly streamLimit: number;
  readonly kedge: Kedge;
  /** The kedge's own limit of streams on a connection (RFC 9113 §6.5.2). */
  limitStreams(limit: number): void;
  /** It has no calls at the moment. */
  idle(session: Session): void;
  changed(session: Session): void;
}

/** `draining`: it takes no new calls, and closes with its last. `closed` is final, also after a failed dial. */
export type SessionState = 'connecting' | 'ready' | 'draining' | 'closed';

/** How long a kedge may take to close its half of a connection that is closed, in ms. */
const CLOSE_MS = 1_000;

/**
 * One HTTP/2 connection for RPCs, from its dial to its end.
 *
 * @remarks Large, for an HTTP/2 connection has a life (greeting, limits, streams, goodbye) of which no part is over
 * before the other.
 */
export class Session {
  state: SessionState = 'connecting';
  /** Whether its head start is not over yet: calls wait for it alone. */
  isFresh = true;
  /** Why its dial failed. */
  failure: KedgeError | undefined;
  /** Whether the connector does not know of that. */
  isUntold = false;
  /** Whether the kedge took no call on it and said goodbye, as one does that is being replaced. */
  isTurnedAway = false;
  /** Since when it has no calls, on the clock of `performance.now()`. */
  idleSince = Number.POSITIVE_INFINITY;
  /** Whether the kedge ended it with an error, which streams that it may have acted on end with. */
  hasErred = false;
  private readonly owner: SessionOwner;
  private http2: ClientHttp2Session | undefined;
  private socket: Socket | undefined;
  private readonly streams = new Set<ClientHttp2Stream>();
  private picked = 0;
  private waiting = 0;
  private reason: KedgeError | undefined;
  private mustDrain = false;
  private readonly release: (this: ClientHttp2Stream) => void;

  constructor(owner: SessionOwner) {
    this.owner = owner;
    const ended = (stream: ClientHttp2Stream) => this.ended(stream);
    // One function for all streams.
    this.release = function release(this: ClientHttp2Stream) {
      ended(this);
    };
    owner.connector.connect(['h2'], (error, socket) => {
      if (error !== null) this.fail(error);
      else if (this.state === 'closed') socket!.destroy();
      else this.begin(socket!);
    });
  }

  /** Calls on it, with those that wait for it. */
  get load(): number {
    return this.streams.size + this.picked + this.waiting;
  }

  /** Whether new calls may take it, or wait for it. */
  get isUsable(): boolean {
    return !this.mustDrain && (this.state === 'ready' || this.state === 'connecting');
  }

  /** Whether it has a stream for one more of those that wait for it. */
  get hasRoom(): boolean {
    return this.streams.size + this.picked < this.owner.streamLimit;
  }

  get peer(): string {
    const { remoteAddress, remotePort } = this.socket ?? {};
    return remoteAddress === undefined ? this.owner.connector.name : `${remoteAddress}:${remotePort}`;
  }

  get tlsSocket(): TLSSocket | undefined {
    return this.socket !== undefined && 'getPeerCertificate' in this.socket ? (this.socket as TLSSocket) : undefined;
  }

  get isSecure(): boolean {
    return this.owner.connector.isSecure;
  }

  /** Why its connection was lost, as far as is known. */
  get why(): KedgeError | undefined {
    return this.reason ?? this.owner.connector.refusal;
  }

  /** Whether the connection itself is gone, not only a stream of it. */
  get isLost(): boolean {
    return this.http2 === undefined || this.http2.destroyed || this.socket!.destroyed;
  }

  /** A call waits until the session is ready. */
  wait(): void {
    this.waiting += 1;
  }

  unwait(): void {
    this.waiting -= 1;
    this.unused();
  }

  /** A call will open a stream, and fetches its credentials first. */
  pick(): void {
    this.picked += 1;
  }

  unpick(): void {
    this.picked -= 1;
    this.unused();
  }

  /**
   * Opens the stream of a call; the session is in use until the stream has closed, or {@link ended}.
   *
   * @throws what node:http2 says of the headers, or that the connection is closing: it is not usable from then on
   */
  open(headers: OutgoingHttpHeaders): ClientHttp2Stream {
    const { http2 } = this;
    // A session that Node has destroyed is not `closed`, and one whose socket is destroyed takes requests.
    if (this.isLost) http2!.destroy();
    if (http2!.closed || http2!.destroyed) {
      this.drain();
      // Node gives it a stream that fails as if it had been lost (https://github.com/nodejs/node/issues/63412).
      throw new KedgeError('ERR_KEDGE_CONNECTION', 'the connection is closing', { kedge: this.owner.connector.name });
    }
    const stream = http2!.request(headers);
    if ((stream.id ?? 0) > LAST_STREAM_ID) this.drain();
    stream.close = close;
    // Calls hold the process, connections do not.
    if (this.streams.size === 0) http2!.ref();
    this.streams.add(stream);
    this.idleSince = Number.POSITIVE_INFINITY;
    stream.once('close', this.release);
    // A call that found a connection there is no dial that would tell.
    const { breaker } = this.owner.kedge;
    if (!breaker.isClosed) stream.once('response', () => breaker.succeeded());
    return stream;
  }

  /** The call is over: its stream has closed, or has ended on the wire and waits for a reader. */
  ended(stream: ClientHttp2Stream): void {
    if (!this.streams.delete(stream) || this.streams.size > 0 || this.state === 'closed') return;
    if (this.http2!.destroyed) {
      this.close();
      return;
    }
    this.idleSince = performance.now();
    this.http2!.unref();
    this.unused();
  }

  /** Takes no new calls, but those that wait for it; closes when the last of them is over. */
  drain(): void {
    if (this.state === 'closed' || this.mustDrain) return;
    this.mustDrain = true;
    this.unused();
  }

  destroy(error: KedgeError): void {
    if (this.state === 'closed') return;
    this.reason = error;
    this.http2?.destroy(error);
    // Which would wait for the kedge, after a GOAWAY.
    this.socket?.destroy();
    this.setState('closed');
  }

  private unused(): void {
    const { load } = this;
    if (load === 0 && this.state === 'ready') this.owner.idle(this);
    if (!this.mustDrain || this.state === 'closed') return;
    if (load === 0) {
      this.close();
    } else if (this.state === 'ready' && this.picked + this.waiting === 0) {
      // Not closed yet: Node would refuse a stream whose headers are still on their way out.
      this.setState('draining');
    }
  }

  private close(): void {
    const { socket } = this;
    this.http2?.close();
    this.setState('closed');
    // Node waits for the kedge to close its half, too.
    if (socket !== undefined) setTimeout(() => socket.destroy(), CLOSE_MS).unref();
  }

  /** What is thrown here, by Node or by who wraps it to watch, would be thrown at the process. */
  private begin(socket: Socket): void {
    try {
      this.greet(socket);
    } catch (cause) {
      socket.destroy();
      this.isUntold = true;
      const { name } = this.owner.connector;
      this.fail(new KedgeError('ERR_KEDGE_CONNECT', 'HTTP/2 could not begin', { kedge: name, cause }));
    }
  }

  /** HTTP/2 begins: ready with the kedge's SETTINGS, not before. */
  private greet(socket: Socket): void {
    const { connector, settings, handshakeTimeoutMs } = this.owner;
    const session = http2.connect(connector.origin, {
      createConnection: () => socket,
      // Above Node's 10 MB answers are reset for what other calls of the session have not sent yet.
      maxSessionMemory: Number.MAX_SAFE_INTEGER,
      settings: { initialWindowSize: settings.windowBytes, enablePush: false },
    });
    this.http2 = session;
    this.socket = socket;
    const fail = (code: 'ERR_KEDGE_CONNECT' | 'ERR_KEDGE_CONNECT_TIMEOUT', reason: string, cause?: Error) => {
      const { refusal } = connector;
      this.isUntold = refusal === undefined;
      connector.avoid(socket);
      this.fail(refusal ?? new KedgeError(code, reason, { kedge: connector.name, cause }));
      session.destroy();
      socket.destroy();
    };
    const late = () => fail('ERR_KEDGE_CONNECT_TIMEOUT', `no HTTP/2 SETTINGS within ${handshakeTimeoutMs} ms`);
    // What came while this process stood still is read first.
    const timer = setTimeout(() => setImmediate(() => this.state === 'connecting' && late()), handshakeTimeoutMs);
    const over = (cause: Error = new Error('the connection was closed')) => {
      clearTimeout(timer);
      if (this.state === 'connecting') {
        const may = connector.showsCertificate ? ', as kedges do that refuse our certificate and send no alert' : '';
        fail('ERR_KEDGE_CONNECT', `the kedge closed the connection before it spoke HTTP/2${may}`, cause);
        return;
      }
      session.destroy();
      socket.destroy();
      if (this.state !== 'closed') this.setState('closed');
    };
    // Each can come without the others: with TLS 1.3 the kedge's verdict on our certificate meets the socket alone.
    session.on('error', over);
    session.once('close', over);
    socket.once('error', over);
    socket.once('close', () => over());
    session.on('goaway', (code, lastStreamId) => {
      if (code !== constants.NGHTTP2_NO_ERROR) {
        this.hasErred = true;
        const reason = `the kedge ended the connection with error code ${code}`;
        this.reason ??= new KedgeError('ERR_KEDGE_CONNECTION', reason, { kedge: connector.name });
      }
      // Not processed, whatever the code (RFC 9113 §6.8); this comes before Node ends them with it.
      for (const stream of this.streams) {
        if ((stream.id ?? 0) > lastStreamId) stream.close(constants.NGHTTP2_REFUSED_STREAM);
      }
      if (this.state === 'connecting') {
        this.isTurnedAway = true;
        over(new Error('the kedge goes away'));
      } else this.drain();
    });
    session.on('remoteSettings', ({ maxConcurrentStreams = Number.POSITIVE_INFINITY }) => {
      clearTimeout(timer);
      this.owner.limitStreams(maxConcurrentStreams);
    });
    session.once('remoteSettings', () => {
      session.setLocalWindowSize(settings.windowBytes);
      session.unref();
      keepAlive(session, socket, {
        timeMs: settings.keepaliveTimeMs,
        timeoutMs: settings.keepaliveTimeoutMs,
        owner: this.owner.kedge,
        isNeeded: () => this.streams.size > 0 || settings.keepaliveWithoutCalls,
        frozen: () => this.freeze(settings.keepaliveTimeoutMs),
      });
      // A kedge that ends the connection at once says so right behind its SETTINGS.
      setImmediate(() => {
        if (this.state !== 'connecting') return;
        connector.proved(socket);
        this.idleSince = performance.now();
        this.setState('ready');
        this.unused();
      });
    });
  }

  private freeze(timeoutMs: number): void {
    const reason = `nothing arrived within ${timeoutMs} ms of a PING: the connection is frozen`;
    this.destroy(new KedgeError('ERR_KEDGE_CONNECTION', reason, { kedge: this.owner.connector.name }));
  }

  private fail(error: KedgeError): void {
    if (this.state === 'closed') return;
    this.failure = error;
    this.setState('closed');
  }

  private setState(state: SessionState): void {
    this.state = state;
    if (debug.grpc.enabled) debug.grpc('%s: connection %s, %d calls', this.owner.connector.name, state, this.load);
    this.owner.changed(this);
  }
}

type Close = ClientHttp2Stream['close'];

/** The `close()` of its streams. */
function close(this: ClientHttp2Stream, code?: number, callback?: Parameters<Close>[1]): void {
  const inherited: Close = Object.getPrototypeOf(this).close;
  inherited.call(this, code, callback);
  if (code !== undefined && code !== constants.NGHTTP2_NO_ERROR) destroySoon(this);
}
