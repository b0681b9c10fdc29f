import { randomBytes } from 'node:crypto';
import type { EventEmitter } from 'node:events';
import type { Socket } from 'node:net';
import type { Duplex } from 'node:stream';
import type { TLSSocket } from 'node:tls';
import { KedgeError } from '../errors.ts';
import { type Connector, type DialCallback, dialError } from '../kedge/connector.ts';
import type { Generation, WirePool } from '../kedge/generation.ts';
import type { ResolvedOptions } from '../options.ts';
import { closeAsCancelled } from './cancel.ts';
import { RetryBudget, watchLoss } from './failover.ts';
import type { PoolRequest } from './request.ts';
import { Client, type Dispatcher, Pool } from './undici.ts';
import { watchPings } from './watchdog.ts';

type Handler = Dispatcher.DispatchHandler;

const ALPN = { auto: ['h2', 'http/1.1'], h2: ['h2'], h1: ['http/1.1'] } as const;

/**
 * How long a failed dial answers for those that its pool queued behind it, in ms. undici dials once for each of them, so
 * without this a thousand requests to a silent kedge would fail one connect timeout after another.
 */
const FAILURE_MEMORY_MS = 100;

interface Held {
  readonly request: PoolRequest;
  readonly handler: Handler & { readonly over?: boolean };
}

/**
 * The HTTP connections of one generation. The first request dials; what the kedge negotiates decides how many connections
 * the pool may open, and until then requests are held here, so that they fail together when the kedge is down.
 */
export class HttpPool implements WirePool {
  private readonly generation: Generation;
  private readonly options: ResolvedOptions['http'];
  private readonly events: EventEmitter;
  /** Whatever was negotiated. */
  private negotiated: Pool | undefined;
  /** HTTP/1.1 only: for upgrades and CONNECT, and for all when the kedge has no HTTP/2. */
  private h1: Pool | undefined;
  private held: Held[] = [];
  private probe: Promise<KedgeError | undefined> | undefined;
  /** The connection that the first request dialled, until the pool asks for it. */
  private spare: Socket | TLSSocket | undefined;
  private readonly clients = new Set<Client>();
  /** Connections that an upgrade took out of their pool. */
  private readonly upgraded = new Set<Duplex>();
  private failure: KedgeError | undefined;
  private failureEnds = 0;
  /** Connections that were lost or said goodbye. */
  losses = 0;

  constructor(generation: Generation, options: ResolvedOptions['http'], events: EventEmitter) {
    this.generation = generation;
    this.options = options;
    this.events = events;
  }

  get connector(): Connector {
    return this.generation.connector;
  }

  get inFlight(): number {
    let size = this.held.length + this.upgraded.size + (this.negotiated?.stats.size ?? 0);
    if (this.h1 !== this.negotiated) size += this.h1?.stats.size ?? 0;
    return size;
  }

  dispatch(request: PoolRequest, handler: Handler, h1Only: boolean): boolean {
    if (h1Only) return this.h1Pool().dispatch(request, handler);
    if (this.negotiated !== undefined) return this.negotiated.dispatch(request, handler);
    this.held.push({ request, handler });
    this.probe ??= this.negotiate();
    return true;
  }

  /**
   * undici takes the `false` with which a client turns down an invalid request for "busy until I say drain", which it
   * never says: one bad header would stop the pool for good. So it is said here.
   */
  turnedDown(): void {
    setImmediate(() => {
      for (const client of this.clients) {
        if (client.destroyed || client.closed) this.clients.delete(client);
        else (client as EventEmitter).emit('drain', new URL(this.connector.origin), [client]);
      }
    });
  }

  /** An upgraded connection is a call under way for as long as it is open. */
  holdUpgraded(socket: Duplex): void {
    this.upgraded.add(socket);
    socket.once('close', () => this.upgraded.delete(socket));
  }

  async close(): Promise<void> {
    await this.probe;
    const pools = new Set([this.negotiated, this.h1]);
    // close() rejects only where destroy() was faster, and then there is nothing left to wait for.
    const closed = [...pools].map((pool) => pool?.close().catch(() => {}));
    const upgraded = [...this.upgraded].map((socket) => new Promise((resolve) => socket.once('close', resolve)));
    await Promise.all([...closed, ...upgraded]);
  }

  destroy(error: Error): void {
    this.rejectHeld(error);
    void this.negotiated?.destroy(error);
    void this.h1?.destroy(error);
    for (const socket of this.upgraded) socket.destroy(error);
  }

  /** Dials ahead of the first request, which then finds the connection there. */
  async warm(): Promise<void> {
    if (this.negotiated !== undefined) return;
    this.probe ??= this.negotiate();
    const failed = await this.probe;
    if (failed !== undefined) throw failed;
  }

  private negotiate(): Promise<KedgeError | undefined> {
    return new Promise((resolve) => {
      this.connector.connect(ALPN[this.options.protocol], (error, socket) => {
        this.probe = undefined;
        const failed = error ?? this.withoutH2(socket!);
        if (failed !== undefined) {
          this.rejectHeld(failed);
        } else {
          const { h2Connections } = this.options;
          this.spare = socket!;
          this.negotiated = isH2(socket!) ? this.open(h2Connections, this.options.protocol) : this.h1Pool();
          const held = this.held;
          this.held = [];
          for (const { request, handler } of held) if (!handler.over) this.negotiated.dispatch(request, handler);
        }
        resolve(failed);
      });
    });
  }

  /** The error of a kedge without HTTP/2 where the options ask for nothing else. */
  private withoutH2(socket: Socket | TLSSocket): KedgeError | undefined {
    if (this.options.protocol !== 'h2' || isH2(socket)) return undefined;
    socket.destroy();
    const kedge = this.connector.name;
    return dialError(new KedgeError('ERR_KEDGE_TLS', 'tls', 'the kedge does not offer HTTP/2', { kedge }));
  }

  private rejectHeld(error: Error): void {
    const held = this.held;
    this.held = [];
    for (const { handler } of held) handler.onResponseError?.(null as never, error);
  }

  private h1Pool(): Pool {
    this.h1 ??= this.open(this.options.h1Connections, 'h1');
    return this.h1;
  }

  private open(connections: number, protocol: keyof typeof ALPN): Pool {
    const { maxConcurrentStreams, windowBytes, keepAliveTimeoutMs, pingIntervalMs } = this.options;
    const h2Options = {
      maxConcurrentStreams,
      // undici validates `settings.initialWindowSize` and then ignores it; this one, which its types lack, counts.
      initialWindowSize: windowBytes,
      connectionWindowSize: windowBytes,
      pingInterval: pingIntervalMs,
    };
    const pool = new Pool(this.connector.origin, {
      connections,
      allowH2: protocol !== 'h1',
      keepAliveTimeout: keepAliveTimeoutMs,
      h2Options,
      factory: (origin, options: object) => {
        const client: Client = new Client(origin, {
          ...options,
          connect: (_options, callback) => this.connect(protocol, client, callback as DialCallback),
        });
        this.clients.add(client);
        return client;
      },
    });
    pool.on('disconnect', () => {
      this.losses += 1;
    });
    for (const event of ['drain', 'connect', 'disconnect', 'connectionError'] as const) {
      pool.on(event as 'connect', (...details: readonly unknown[]) => this.events.emit(event, ...details));
    }
    return pool;
  }

  private connect(protocol: keyof typeof ALPN, client: Client, callback: DialCallback): void {
    const { spare } = this;
    if (spare !== undefined && !spare.destroyed && (protocol !== 'h1' || !isH2(spare))) {
      this.spare = undefined;
      setImmediate(callback, null, this.adopt(client, spare));
      return;
    }
    if (this.failure !== undefined && performance.now() < this.failureEnds) {
      setImmediate(callback, this.failure, null);
      return;
    }
    this.connector.connect(ALPN[protocol], (error, socket) => {
      this.failure = error ?? undefined;
      this.failureEnds = performance.now() + FAILURE_MEMORY_MS;
      callback(error, socket === null ? null : this.adopt(client, socket));
    });
  }

  /** What undici and Node leave undone on an HTTP/2 connection. */
  private adopt(client: Client, socket: Socket | TLSSocket): Socket | TLSSocket {
    watchLoss(socket, isH2(socket));
    if (!isH2(socket)) return socket;
    closeAsCancelled(socket);
    watchPings(client, socket, this.options.pingIntervalMs, () => {
      const reason = `no answer to PINGs every ${this.options.pingIntervalMs} ms: the connection is frozen`;
      return new KedgeError('ERR_KEDGE_CONNECTION', 'kedge', reason, { kedge: this.connector.name });
    });
    return socket;
  }
}

function isH2(socket: Socket | TLSSocket): boolean {
  return (socket as Partial<TLSSocket>).alpnProtocol === 'h2';
}

/** The pools of all generations, opened when a first request comes. */
export class HttpPools {
  private readonly options: ResolvedOptions['http'];
  private readonly events: EventEmitter;
  readonly budget: RetryBudget;
  private readonly requestIdPrefix = `kd-${randomBytes(8).toString('hex')}-`;
  private requests = 0;

  constructor({ http, failover }: ResolvedOptions, events: EventEmitter) {
    this.options = http;
    this.events = events;
    this.budget = new RetryBudget(failover.retryBudget);
  }

  of(generation: Generation): HttpPool {
    generation.http ??= new HttpPool(generation, this.options, this.events);
    return generation.http as HttpPool;
  }

  /** A value for `X-Kedge-Request-ID`, unless the options say that none is sent. */
  requestId(): string | undefined {
    if (!this.options.requestId) return undefined;
    this.requests += 1;
    return this.requestIdPrefix + this.requests;
  }
}
