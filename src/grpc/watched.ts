import type { connectivityState } from '@grpc/grpc-js';
import type { Kedge } from '../kedge/kedge.ts';
import type { ResolvedOptions } from '../options.ts';
import { type GrpcPool, grpcPool } from './pool.ts';

/** What is watched. */
export interface WatchedChannel {
  readonly options: ResolvedOptions;
  /** The kedges of its route, connected or not. */
  kedges(): Kedge[];
  state(kedges: readonly Kedge[]): connectivityState;
  isClosed(): boolean;
}

interface Watcher {
  readonly from: connectivityState;
  readonly callback: (error?: Error) => void;
  timer: NodeJS.Timeout | undefined;
}

const MAX_TIMER_MS = 2 ** 31 - 1;

/**
 * Who waits for a channel's state to change. Follows the pools of the route's kedges, across rotations; while nobody
 * waits it follows nothing.
 */
export class Watched {
  private readonly channel: WatchedChannel;
  private readonly watchers = new Set<Watcher>();
  private kedges: Kedge[] = [];
  private pools: GrpcPool[] = [];
  private stops: (() => void)[] = [];

  constructor(channel: WatchedChannel) {
    this.channel = channel;
  }

  add(from: connectivityState, deadline: number, callback: (error?: Error) => void): void {
    const watcher: Watcher = { from, callback, timer: undefined };
    const left = deadline - Date.now();
    if (left <= MAX_TIMER_MS) {
      const passed = () => this.settle(watcher, new Error('Deadline passed without connectivity state change'));
      watcher.timer = setTimeout(passed, Math.max(left, 0));
    }
    if (this.watchers.size === 0) this.follow(this.channel.kedges());
    this.watchers.add(watcher);
    process.nextTick(() => this.check());
  }

  /** Calls back whoever has reason to be. */
  check(): void {
    if (this.watchers.size === 0) return;
    if (this.channel.isClosed()) {
      this.settleAll();
      return;
    }
    if (this.pools.some(({ closed }) => closed)) {
      const pools = this.kedges.map((kedge) => grpcPool(kedge, this.channel.options));
      if (pools.some(({ closed }) => closed)) {
        this.settleAll();
        return;
      }
      this.follow(this.kedges);
    }
    const state = this.channel.state(this.kedges);
    for (const watcher of [...this.watchers]) if (watcher.from !== state) this.settle(watcher);
  }

  private follow(kedges: Kedge[]): void {
    for (const stop of this.stops) stop();
    this.kedges = kedges;
    this.pools = kedges.map((kedge) => grpcPool(kedge, this.channel.options));
    this.stops = this.pools.map((pool) => pool.onChange(() => this.check()));
  }

  private settleAll(): void {
    for (const watcher of [...this.watchers]) this.settle(watcher);
  }

  private settle(watcher: Watcher, error?: Error): void {
    if (!this.watchers.delete(watcher)) return;
    clearTimeout(watcher.timer);
    if (this.watchers.size === 0) this.follow([]);
    // Not from within a pool's change: who is called back may well connect.
    process.nextTick(watcher.callback, error);
  }
}
