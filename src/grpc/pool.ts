import type { ChannelOptions } from '@grpc/grpc-js';
import type { Generation, WirePool } from '../kedge/generation.ts';
import type { ResolvedOptions } from '../options.ts';
import { Connection, type ConnectionState } from './connection.ts';

/** Options of a client that connections may be shared by when they are equal. */
export interface SharedOptions {
  readonly key: string;
  readonly options: ChannelOptions;
}

/** How long a connection beyond the first may have no calls before it is closed, in ms. */
const IDLE_MS = 30_000;
const STATES: readonly ConnectionState[] = ['ready', 'connecting', 'failed', 'idle'];

/**
 * The gRPC connections of one generation: shared by every service behind the kedge whose clients use equal channel
 * options. Each call goes to the least loaded one; another opens only when all are full.
 */
export class GrpcPool implements WirePool {
  private readonly generation: Generation;
  private readonly options: ResolvedOptions;
  private readonly groups = new Map<string, Connection[]>();
  private readonly idleTimers = new Map<Connection, NodeJS.Timeout>();
  private readonly listeners = new Set<() => void>();
  private readonly kill = new Set<(error: Error) => void>();
  private calls = 0;
  private drained: (() => void) | undefined;
  private closing = false;

  constructor(generation: Generation, options: ResolvedOptions) {
    this.generation = generation;
    this.options = options;
  }

  get inFlight(): number {
    return this.calls;
  }

  /** Reserves room for a call; `release()` gives it back. `onKill` ends the call when the pool is destroyed. */
  acquire(shared: SharedOptions, onKill: (error: Error) => void): Connection {
    const connection = this.choose(shared);
    connection.calls += 1;
    this.calls += 1;
    this.kill.add(onKill);
    const timer = this.idleTimers.get(connection);
    if (timer !== undefined) {
      clearTimeout(timer);
      this.idleTimers.delete(connection);
    }
    return connection;
  }

  release(shared: SharedOptions, connection: Connection, onKill: (error: Error) => void): void {
    if (!this.kill.delete(onKill)) return;
    connection.calls -= 1;
    this.calls -= 1;
    if (connection.calls === 0) this.unused(shared, connection);
    if (this.calls === 0) this.drained?.();
  }

  /** The best state among the group's connections, and what changes it. */
  state(shared: SharedOptions, connect: boolean): ConnectionState {
    if (this.closing) return 'closed';
    const group = this.groups.get(shared.key) ?? [];
    if (connect && !group.some(({ state }) => state === 'ready' || state === 'connecting'))
      this.choose(shared).connect();
    const states = new Set((this.groups.get(shared.key) ?? []).map(({ state }) => state));
    return STATES.find((state) => states.has(state)) ?? 'idle';
  }

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

  private choose(shared: SharedOptions): Connection {
    const group = this.group(shared.key);
    const { maxConnections, maxStreamsPerConnection } = this.options.grpc;
    let best: Connection | undefined;
    for (const connection of group) {
      if (connection.state === 'closed') continue;
      if (best === undefined || rank(connection, maxStreamsPerConnection) < rank(best, maxStreamsPerConnection))
        best = connection;
    }
    if (best !== undefined && (best.calls < maxStreamsPerConnection || group.length >= maxConnections)) return best;
    return this.open(shared, group);
  }

  private open(shared: SharedOptions, group: Connection[]): Connection {
    const { timeoutMs, handshakeTimeoutMs } = this.options.connect;
    const connection = new Connection(this.generation.connector, shared.options, timeoutMs + handshakeTimeoutMs, {
      changed: () => {
        // A failed connection that nobody waits for would dial on in the background; the next call opens a new one.
        if (connection.state === 'failed' && connection.calls === 0) connection.close();
        if (connection.state === 'closed') this.remove(group, connection);
        this.notify();
      },
    });
    group.push(connection);
    return connection;
  }

  private unused(shared: SharedOptions, connection: Connection): void {
    const group = this.group(shared.key);
    if (connection.state === 'failed' || connection.state === 'closed') {
      connection.close();
      this.remove(group, connection);
      return;
    }
    if (group.length > 1 && !this.closing) {
      const timer = setTimeout(() => {
        this.idleTimers.delete(connection);
        if (group.length > 1) connection.close();
      }, IDLE_MS).unref();
      this.idleTimers.set(connection, timer);
    }
  }

  private group(key: string): Connection[] {
    let group = this.groups.get(key);
    if (group === undefined) {
      group = [];
      this.groups.set(key, group);
    }
    return group;
  }

  private remove(group: Connection[], connection: Connection): void {
    const index = group.indexOf(connection);
    if (index !== -1) group.splice(index, 1);
  }

  private closeAll(): void {
    for (const timer of this.idleTimers.values()) clearTimeout(timer);
    this.idleTimers.clear();
    for (const connection of [...this.groups.values()].flat()) connection.close();
  }

  private notify(): void {
    for (const listener of [...this.listeners]) listener();
  }
}

/** Room first, then a connection that is there, then the least loaded. */
function rank({ calls, state }: Connection, maxStreams: number): number {
  const full = calls >= maxStreams ? 2 ** 40 : 0;
  const absent = state === 'ready' ? 0 : state === 'failed' ? 2 ** 31 : 2 ** 30;
  return full + absent + calls;
}

/** The pool of a generation, opened when its first call comes. */
export function grpcPool(generation: Generation, options: ResolvedOptions): GrpcPool {
  generation.grpc ??= new GrpcPool(generation, options);
  return generation.grpc as GrpcPool;
}
