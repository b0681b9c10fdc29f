import type { connectivityState } from '@grpc/grpc-js';
import type { GrpcPool } from './pool.ts';

/** What is watched. */
export interface WatchedChannel {
  /** Of the kedges of its route that are in use. */
  pools(): GrpcPool[];
  state(): connectivityState;
  isClosed(): boolean;
}

interface Watcher {
  readonly from: connectivityState;
  readonly callback: (error?: Error) => void;
  timer: NodeJS.Timeout | undefined;
}

const MAX_TIMER_MS = 2 ** 31 - 1;
/** How often it looks for kedges that came into use, or are no longer, in ms: at first, and at last. */
const LOOK_MS = 100;
const MAX_LOOK_MS = 3_200;

/**
 * Who waits for a channel's state to change. Follows the pools of the route's kedges, across rotations; while nobody
 * waits it follows nothing. It brings no kedge into use.
 *
 * That a kedge was given up for others (`maxKedges`) is seen by looking, less and less often: who is told will dial it
 * again, and so have another one given up, whose watcher is told.
 */
export class Watched {
  private readonly channel: WatchedChannel;
  private readonly watchers = new Set<Watcher>();
  private pools: GrpcPool[] = [];
  private stops: (() => void)[] = [];
  private look: NodeJS.Timeout | undefined;
  private lookMs = LOOK_MS;

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
    this.watchers.add(watcher);
    this.follow();
    process.nextTick(() => this.check());
  }

  /** Calls back whoever has reason to be. */
  check(): void {
    if (this.watchers.size === 0) return;
    if (this.channel.isClosed()) {
      for (const watcher of [...this.watchers]) this.settle(watcher);
      return;
    }
    const pools = this.channel.pools();
    if (pools.length < this.pools.length) return;
    this.follow(pools);
    const state = this.channel.state();
    for (const watcher of [...this.watchers]) if (watcher.from !== state) this.settle(watcher);
  }

  private follow(pools = this.channel.pools()): void {
    for (const stop of this.stops) stop();
    this.pools = pools;
    this.stops = pools.map((pool) => pool.onChange(() => this.check()));
    this.lookLater();
  }

  private lookLater(): void {
    clearTimeout(this.look);
    // With jitter: many that lost their kedges together do not come back together.
    this.look = setTimeout(
      () => {
        const lost = this.channel.pools().length < this.pools.length;
        this.lookMs = lost ? Math.min(this.lookMs * 2, MAX_LOOK_MS) : LOOK_MS;
        this.pools = [];
        this.check();
      },
      this.lookMs * (0.5 + Math.random() / 2),
    ).unref();
  }

  private settle(watcher: Watcher, error?: Error): void {
    if (!this.watchers.delete(watcher)) return;
    clearTimeout(watcher.timer);
    if (this.watchers.size === 0) {
      clearTimeout(this.look);
      for (const stop of this.stops.splice(0)) stop();
    }
    // Not from within a pool's change: who is called back may well connect.
    process.nextTick(watcher.callback, error);
  }
}
