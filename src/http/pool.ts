import { AsyncLocalStorage } from 'node:async_hooks';
import type { EventEmitter } from 'node:events';
import type { ClientHttp2Stream } from 'node:http2';
import type { Socket } from 'node:net';
import type { Duplex } from 'node:stream';
import type { TLSSocket } from 'node:tls';
import type { Connector, DialCallback } from '../dial/connector.ts';
import { dialError } from '../dial/dial-error.ts';
import type { Generation, WirePool } from '../kedge/generation.ts';
import type { ResolvedOptions } from '../options.ts';
import { KedgeError } from '../support/errors.ts';

import { isH2, tend } from './h2.ts';
import { silence, watchLoss } from './outcome.ts';
import { CONNECT_ONLY, inPieces, type PoolRequest } from './request.ts';
import { Client, type Dispatcher, Pool } from './undici.ts';

type Handler = Dispatcher.DispatchHandler;

const ALPN = { auto: ['h2', 'http/1.1'], h2: ['h2'], h1: ['http/1.1'] } as const;
type Protocol = keyof typeof ALPN;

/**
 * How long a failed dial answers for those that its pool queued behind it, in ms. undici dials once for each of them, so
 * without this a thousand requests to a silent kedge would fail one connect timeout after another.
 */
const FAILURE_MEMORY_MS = 100;

interface Held {
  readonly request: PoolRequest;
  readonly handler: Handler & { readonly over?: boolean };
  readonly h1Only: boolean;
  /** Runs what belongs to the call where its caller is: who traces calls would take it for another one's otherwise. */
  readonly run: (call: () => void) => void;
}

/**
 * The HTTP connections of one generation. The first request dials; what the kedge negotiates decides how many connections
 * the pool may open, and until then requests are held here, so that they fail together when the kedge is down.
 *
 * @remarks Large, for two pools of undici, one for all and one for HTTP/1.1, are opened by one dial and end together.
 */
export class HttpPool implements WirePool {
  private readonly generation: Generation;
  private readonly options: ResolvedOptions['http'];
  private readonly events: EventEmitter;
  private negotiated: Pool | undefined;
  /** HTTP/1.1 only: for upgrades and CONNECT, and for all when the kedge has no HTTP/2. */
  private h1: Pool | undefined;
  private held: Held[] = [];
  /** Whether undici is ending the requests of a client whose dial failed. */
  private isFailing = false;
  private probe: Promise<void> | undefined;
  /** What the first request dialled, until the pool asks for it. */
  private spare: Socket | TLSSocket | undefined;
  private readonly clients = new Set<Client>();
  /** Connections that an upgrade took out of their pool. */
  private readonly upgraded = new Set<Duplex>();
  /** Failed dials by what they offered: that a kedge takes no HTTP/1.1 says nothing of its HTTP/2. */
  private readonly failures = new Map<Protocol, { readonly error: KedgeError; readonly until: number }>();
  private readonly destroyed = Promise.withResolvers<unknown>();
  private life: 'open' | 'closing' | 'destroyed' = 'open';
  /** Whether the kedge has greeted us on one of its HTTP/2 connections. */
  private hasSpoken = false;
  /** The call that was started last: the stream that undici opens next is its own. */
  opening: { stream: ClientHttp2Stream | undefined } | undefined;

  constructor(generation: Generation, options: ResolvedOptions['http'], events: EventEmitter) {
    this.generation = generation;
    this.options = options;
    this.events = events;
  }

  get connector(): Connector {
    return this.generation.connector;
  }

  get inFlight(): number {
    // undici goes on counting the requests that waited in a pool when it was destroyed.
    if (this.life === 'destroyed') return 0;
    let size = this.held.length + this.upgraded.size + (this.negotiated?.stats.size ?? 0);
    if (this.h1 !== this.negotiated) size += this.h1?.stats.size ?? 0;
    return size;
  }

  dispatch(request: PoolRequest, handler: Handler, h1Only: boolean): boolean {
    const pool = h1Only ? this.h1Pool() : this.negotiated;
    if (pool !== undefined && !this.isFailing)
      return pool.dispatch(pool === this.h1 ? inPieces(request) : request, handler);
    this.held.push({ request, handler, h1Only, run: AsyncLocalStorage.snapshot() });
    if (pool === undefined) this.probe ??= this.negotiate();
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
    if (this.life === 'open') this.life = 'closing';
    await this.probe;
    const pools = new Set([this.negotiated, this.h1]);
    // close() rejects only where destroy() was faster, and then there is nothing left to wait for.
    const closed = [...pools].map((pool) => pool?.close().catch(() => {}));
    // undici's close() never ends where requests waited in the pool and destroy() took them (`kClosedResolve`, pool-base.js).
    await Promise.race([Promise.all([...closed, this.upgradedClosed()]), this.destroyed.promise]);
  }

  private upgradedClosed(): Promise<unknown> {
    return Promise.all([...this.upgraded].map((socket) => new Promise((resolve) => socket.once('close', resolve))));
  }

  /** What undici still keeps belongs to calls that are over. Those that were upgraded are waited for. */
  abandon(error: Error): void {
    this.destroyed.resolve(Promise.all([this.destroyPools(error), this.upgradedClosed()]));
  }

  destroy(error: Error): void {
    this.life = 'destroyed';
    this.rejectHeld(error);
    this.destroyed.resolve(this.destroyPools(error));
    for (const socket of this.upgraded) socket.destroy(error);
  }

  /** A turn later: undici may be in the middle of a write, and would go on with what is gone (`_resume()`, client.js). */
  private async destroyPools(error: Error): Promise<void> {
    const pools = [...new Set([this.negotiated, this.h1])];
    await new Promise((resolve) => setImmediate(resolve));
    await Promise.all(pools.map((pool) => pool?.destroy(error)));
  }

  /**
   * The kedge has never said a word. Before its SETTINGS undici writes one request on each connection and queues the others, to
   * dial again for each of them: they end together, and may go to another kedge.
   */
  private giveUp(): void {
    const pool = this.negotiated;
    if (this.hasSpoken || pool === undefined) return;
    this.negotiated = undefined;
    const error = new KedgeError('ERR_KEDGE_CONNECTION', 'the kedge spoke no HTTP/2', { kedge: this.connector.name });
    setImmediate(() => void pool.destroy(silence(error)));
  }

  /**
   * Connects ahead of the next request, unless a connection is there. A request that turns back before undici writes it
   * puts the connection where all others are: it is read, timed out and does not keep the process.
   */
  warm(): Promise<void> {
    return new Promise((resolve, reject) => {
      if ((this.negotiated?.stats.connected ?? 0) > 0) {
        resolve();
        return;
      }
      const onRequestStart = () => {
        // For a CONNECT undici has waited until the kedge has spoken.
        for (const socket of this.connector.sockets) if (socket.bytesRead > 0) this.connector.proved(socket);
        resolve();
        throw new Error('connected, which is all that was asked for');
      };
      const onResponseError = (_controller: unknown, error: Error) => reject(error);
      // undici wants to have an `onRequestUpgrade` and does not call it.
      this.dispatch(CONNECT_ONLY, { onRequestStart, onResponseError, onRequestUpgrade() {} }, false);
    });
  }

  private negotiate(): Promise<void> {
    return new Promise((resolve) => {
      this.connector.connect(ALPN[this.options.protocol], (error, socket) => {
        this.probe = undefined;
        const failed = error ?? this.withoutH2(socket!);
        if (failed !== undefined) {
          this.rejectHeld(failed);
        } else {
          const { h2Connections, protocol } = this.options;
          this.spare = socket!;
          const pool = isH2(socket!) ? this.open(h2Connections, protocol) : this.h1Pool();
          this.negotiated = pool;
          this.releaseHeld();
          // Those who wanted it may be gone, and nobody reads it.
          setImmediate(() => {
            if (this.spare !== socket) return;
            this.spare = undefined;
            socket.destroy();
          });
        }
        resolve();
      });
    });
  }

  private releaseHeld(): void {
    this.release(({ request, handler, h1Only }) => {
      if (!handler.over) this.dispatch(request, handler, h1Only);
    });
  }

  /**
   * undici asserts that a client has no request when it has ended those of a failed dial (nodejs/undici lib/dispatcher/client.js,
   * `onError()`), but who hears of the end of one may make another at once, and the assertion would end the process.
   */
  private fail(callback: DialCallback, error: KedgeError): void {
    this.isFailing = true;
    try {
      callback(error, null);
    } finally {
      this.isFailing = false;
      this.releaseHeld();
    }
  }

  /** The error of a kedge without HTTP/2 where the options ask for nothing else. */
  private withoutH2(socket: Socket | TLSSocket): KedgeError | undefined {
    if (this.options.protocol !== 'h2' || isH2(socket)) return undefined;
    socket.destroy();
    const kedge = this.connector.name;
    return dialError(new KedgeError('ERR_KEDGE_TLS', 'the kedge does not offer HTTP/2', { kedge }));
  }

  private rejectHeld(error: Error): void {
    this.release(({ handler }) => handler.onResponseError?.(null as never, error));
  }

  /** What one call throws is nothing to the others. */
  private release(end: (call: Held) => void): void {
    const held = this.held;
    this.held = [];
    for (const call of held) {
      try {
        call.run(() => end(call));
      } catch (error) {
        process.nextTick(() => {
          throw error;
        });
      }
    }
  }

  private h1Pool(): Pool {
    this.h1 ??= this.open(this.options.h1Connections, 'h1');
    return this.h1;
  }

  private open(connections: number, protocol: Protocol): Pool {
    const { maxConcurrentStreams, windowBytes, keepAliveTimeoutMs } = this.options;
    const h2Options = {
      maxConcurrentStreams,
      // undici validates `settings.initialWindowSize` and then ignores it; this one, which its types lack, counts.
      initialWindowSize: windowBytes,
      connectionWindowSize: windowBytes,
      // Ours go on while a connection drains, and have a limit.
      pingInterval: 0,
    };
    const pool = new Pool(this.connector.origin, {
      connections,
      allowH2: protocol !== 'h1',
      keepAliveTimeout: keepAliveTimeoutMs,
      h2Options,
      factory: (origin, options: object) => {
        const client = new Client(origin, {
          ...options,
          connect: (_options, callback) => this.connect(protocol, callback as DialCallback),
        });
        this.clients.add(client);
        // After this the pool has no more use for it.
        client.once('connectionError', () => this.clients.delete(client));
        return client;
      },
    });
    for (const event of ['drain', 'connect', 'disconnect', 'connectionError'] as const) {
      pool.on(event as 'connect', (...details: readonly unknown[]) => this.events.emit(event, ...details));
    }
    return pool;
  }

  private connect(protocol: Protocol, callback: DialCallback): void {
    const { spare } = this;
    if (spare !== undefined && !spare.destroyed && (protocol !== 'h1' || !isH2(spare))) {
      this.spare = undefined;
      setImmediate(callback, null, this.adopt(spare));
      return;
    }
    const failure = this.failures.get(protocol);
    if (failure !== undefined && performance.now() < failure.until) {
      setImmediate(() => this.fail(callback, failure.error));
      return;
    }
    this.connector.connect(ALPN[protocol], (error, socket) => {
      if (error === null) {
        this.failures.delete(protocol);
        callback(null, this.adopt(socket!));
        return;
      }
      this.failures.set(protocol, { error, until: performance.now() + FAILURE_MEMORY_MS });
      this.fail(callback, error);
    });
  }

  private adopt(socket: Socket | TLSSocket): Socket | TLSSocket {
    const { connector } = this;
    watchLoss(socket, isH2(socket));
    if (!isH2(socket)) {
      connector.proved(socket);
      return socket;
    }
    let isOver = false;
    const ended = () => {
      // Its SETTINGS come unasked (RFC 9113 §3.4), unless it was us who had no use for it any more.
      if (isOver || socket.bytesRead > 0 || this.life !== 'open') return;
      isOver = true;
      connector.disproved(socket);
      this.giveUp();
    };
    // Before undici hears of it: what it gives back is not to come to the same pool.
    for (const event of ['end', 'error', 'close']) socket.once(event, ended);
    const { pingIntervalMs } = this.options;
    const frozen = () => {
      const reason = `nothing arrived for ${2 * pingIntervalMs} ms, no answer to a PING either: the connection is frozen`;
      return new KedgeError('ERR_KEDGE_CONNECTION', reason, { kedge: connector.name });
    };
    tend(
      socket,
      pingIntervalMs,
      frozen,
      () => {
        this.hasSpoken = true;
        connector.proved(socket);
      },
      (stream) => {
        if (this.opening !== undefined) this.opening.stream = stream;
        this.opening = undefined;
      },
    );
    return socket;
  }
}
