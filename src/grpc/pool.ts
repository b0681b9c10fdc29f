import type { ChannelOptions } from '@grpc/grpc-js';
import type { KedgeError } from '../errors.ts';
import type { WirePool } from '../kedge/generation.ts';
import type { Kedge } from '../kedge/kedge.ts';
import type { ResolvedOptions } from '../options.ts';
import { Connection, type ConnectionOwner, type ConnectionState } from './connection.ts';

/** Options of a client that connections may be shared by when they are equal. */
export interface SharedOptions {
  readonly key: string;
  readonly options: ChannelOptions;
}

/** How many open clients of a dialer have which options, by {@link SharedOptions.key}. */
const clients = new WeakMap<ResolvedOptions, Map<string, number>>();

/** A client was opened, or closed: the connections of options that nobody has any more are closed when they are idle. */
export function countClient(options: ResolvedOptions, { key }: SharedOptions, by: 1 | -1): void {
  let counts = clients.get(options);
  if (counts === undefined) {
    counts = new Map();
    clients.set(options, counts);
  }
  const count = (counts.get(key) ?? 0) + by;
  if (count > 0) counts.set(key, count);
  else counts.delete(key);
}

/** What a pool's connections amount to; `failed`: none, and nothing is dialled for a moment. */
export type PoolState = Exclude<ConnectionState, 'lost'> | 'idle' | 'failed';

/** How long a connection beyond the first, or one without a client, may have no calls before it is closed, in ms. */
const IDLE_MS = 30_000;
const SWEEP_MS = 2_500;
/** How long after a failed dial calls fail with its error rather than dial again, in ms: callers may retry at once. */
const COOL_MS = 250;
const STATES = ['ready', 'connecting'] as const;

/**
 * The gRPC connections of one generation: shared by every service behind the kedge whose clients use equal channel
 * options. Each call goes to the least loaded one; another opens only when all are full. All groups together have at most
 * `maxConnections`, but each that has calls has one.
 */
export class GrpcPool implements WirePool {
  private readonly kedge: Kedge;
  private readonly options: ResolvedOptions;
  private readonly owner: ConnectionOwner;
  private readonly groups = new Map<string, Connection[]>();
  /** Looks for idle connections while there are any. */
  private sweeper: NodeJS.Timeout | undefined;
  private readonly listeners = new Set<() => void>();
  private readonly kill = new Set<(error: Error) => void>();
  private cooling: { readonly error: KedgeError; readonly timer: NodeJS.Timeout } | undefined;
  /** Calls on one connection: ours to say, unless the kedge says fewer. */
  private maxStreams: number;
  private calls = 0;
  private drained: (() => void) | undefined;
  private closing = false;

  constructor(kedge: Kedge, options: ResolvedOptions) {
    const { grpc, connect } = options;
    this.kedge = kedge;
    this.options = options;
    this.maxStreams = grpc.maxStreamsPerConnection;
    this.owner = {
      connector: kedge.generation.connector,
      observer: kedge,
      timeouts: connect,
      streamLimit: (limit) => {
        this.maxStreams = Math.max(1, Math.min(limit, grpc.maxStreamsPerConnection));
      },
      changed: (connection) => this.changed(connection),
    };
  }

  get inFlight(): number {
    return this.calls;
  }

  /** Whether it takes no new calls: the kedge has another generation, or is itself given up. */
  get closed(): boolean {
    return this.closing;
  }

  /**
   * Reserves room for a call; `release()` gives it back. `onKill` ends the call when the pool is destroyed. Returns the
   * error of a dial that failed just now instead of dialling again.
   */
  acquire(shared: SharedOptions, onKill: (error: Error) => void): Connection | KedgeError {
    const connection = this.choose(shared);
    if (!(connection instanceof Connection)) {
      // Should this call be the breaker's probe, it has its answer.
      if (!this.kedge.breaker.isClosed) this.kedge.breaker.failed();
      return connection;
    }
    connection.calls += 1;
    this.calls += 1;
    this.kill.add(onKill);
    return connection;
  }

  release(_shared: SharedOptions, connection: Connection, onKill: (error: Error) => void): void {
    if (!this.kill.delete(onKill)) return;
    connection.calls -= 1;
    this.calls -= 1;
    if (connection.calls === 0) {
      connection.idleSince = performance.now();
      if (connection.state === 'lost') connection.close();
    }
    if (this.calls === 0) this.drained?.();
  }

  /** The kedge answers, on whichever connection. */
  answered(): void {
    this.kedge.breaker.succeeded();
  }

  /** The best state among the group's connections. */
  state(shared: SharedOptions, connect: boolean): PoolState {
    if (this.closing) return 'closed';
    const state = this.best(shared);
    if (!connect || state === 'ready' || state === 'connecting') return state;
    this.choose(shared);
    return this.best(shared);
  }

  /** Hears of every change of {@link state}. */
  onChange(listener: () => void): () => void {
    this.listeners.add(listener);
    return () => this.listeners.delete(listener);
  }

  async close(): Promise<void> {
    this.closing = true;
    this.notify();
    if (this.calls > 0) {
      const { promise, resolve } = Promise.withResolvers<void>();
      this.drained = resolve;
      await promise;
    }
    this.closeAll();
  }

  destroy(error: Error): void {
    this.closing = true;
    for (const kill of [...this.kill]) kill(error);
    this.closeAll();
    this.drained?.();
    this.notify();
  }

  private best(shared: SharedOptions): PoolState {
    const group = this.groups.get(shared.key) ?? [];
    const none = this.cooling === undefined ? 'idle' : 'failed';
    return STATES.find((state) => group.some((connection) => connection.state === state)) ?? none;
  }

  private choose(shared: SharedOptions): Connection | KedgeError {
    const group = this.groups.get(shared.key);
    const { maxStreams } = this;
    let best: Connection | undefined;
    let bestRank = Number.POSITIVE_INFINITY;
    if (group !== undefined) {
      for (const connection of group) {
        if (connection.state === 'lost') continue;
        const rank = rankOf(connection, maxStreams);
        if (rank >= bestRank) continue;
        best = connection;
        bestRank = rank;
      }
    }
    if (best !== undefined && (best.calls < maxStreams || !this.makeRoom())) return best;
    if (this.cooling !== undefined) return best ?? this.cooling.error;
    if (best === undefined) this.makeRoom();
    const opened = new Connection(this.owner, shared.options);
    this.sweeper ??= setInterval(() => this.sweep(), SWEEP_MS).unref();
    const own = this.groups.get(shared.key);
    if (own === undefined) this.groups.set(shared.key, [opened]);
    else own.push(opened);
    return opened;
  }

  /** Whether another connection may be opened; the one that has been idle longest makes room. */
  private makeRoom(): boolean {
    const open = [...this.groups.values()].flat().filter(({ state }) => state !== 'lost');
    if (open.length < this.options.grpc.maxConnections) return true;
    const [idle] = open.filter(({ calls }) => calls === 0).sort((a, b) => a.idleSince - b.idleSince);
    idle?.close();
    return idle !== undefined;
  }

  private changed(connection: Connection): void {
    if (connection.state === 'closed') {
      for (const [key, group] of this.groups) {
        const index = group.indexOf(connection);
        if (index !== -1) group.splice(index, 1);
        if (group.length === 0) this.groups.delete(key);
      }
      if (this.groups.size === 0) this.stopSweeping();
      if (connection.failure !== undefined) this.cool(connection.failure);
    }
    this.notify();
  }

  private cool(error: KedgeError): void {
    if (this.closing) return;
    clearTimeout(this.cooling?.timer);
    const timer = setTimeout(() => {
      this.cooling = undefined;
      this.notify();
    }, COOL_MS).unref();
    this.cooling = { error, timer };
  }

  private sweep(): void {
    const wanted = clients.get(this.options);
    const idleSince = performance.now() - IDLE_MS;
    for (const [key, group] of this.groups) {
      for (const connection of [...group]) {
        if (connection.calls > 0 || connection.idleSince > idleSince) continue;
        if (group.length > 1 || wanted?.has(key) !== true) connection.close();
      }
    }
  }

  private stopSweeping(): void {
    clearInterval(this.sweeper);
    this.sweeper = undefined;
  }

  private closeAll(): void {
    clearTimeout(this.cooling?.timer);
    this.cooling = undefined;
    for (const connection of [...this.groups.values()].flat()) connection.close();
    this.stopSweeping();
  }

  private notify(): void {
    for (const listener of [...this.listeners]) listener();
  }
}

/** Room first, then a connection that is there or about to be, then the least loaded. */
function rankOf({ calls, state }: Connection, maxStreams: number): number {
  const full = calls >= maxStreams ? 2 ** 40 : 0;
  const absent = state === 'ready' ? 0 : 2 ** 30;
  return full + absent + calls;
}

/** The pool of a kedge's generation, opened when its first call comes. */
export function grpcPool(kedge: Kedge, options: ResolvedOptions): GrpcPool {
  const { generation } = kedge;
  generation.grpc ??= new GrpcPool(kedge, options);
  return generation.grpc as GrpcPool;
}
