import type { connectivityState } from '@grpc/grpc-js';
import { jittered } from '../support/backoff.ts';
import { MAX_INT32 } from '../support/timer.ts';

interface Watcher {
  readonly from: connectivityState;
  readonly callback: (error?: Error) => void;
  timer: NodeJS.Timeout | undefined;
}

/** How often it looks for kedges that came into use, or are no longer, in ms: at first, and at last. */
const LOOK_MS = 100;
const MAX_LOOK_MS = 3_200;

/**
 * Who waits for a channel's state to change. While somebody does it also looks by itself, for kedges that others brought
 * into use or had given up (`maxKedges`); less and less often, and with jitter: who is told will dial, and so have another
 * one given up, whose watcher is told.
 */
export class Connectivity {
  private readonly stateOf: () => connectivityState;
  private readonly watchers = new Set<Watcher>();
  private look: NodeJS.Timeout | undefined;
  private lookMs = LOOK_MS;

  constructor(stateOf: () => connectivityState) {
    this.stateOf = stateOf;
  }

  watch(from: connectivityState, deadline: number, callback: (error?: Error) => void): void {
    const watcher: Watcher = { from, callback, timer: undefined };
    const left = deadline - Date.now();
    if (left <= MAX_INT32) {
      const passed = () => this.settle(watcher, new Error('Deadline passed without connectivity state change'));
      watcher.timer = setTimeout(passed, Math.max(left, 0));
    }
    this.watchers.add(watcher);
    this.lookLater();
    process.nextTick(() => this.check());
  }

  /** Calls back whoever has reason to be. */
  check(): void {
    if (this.watchers.size === 0) return;
    const state = this.stateOf();
    for (const watcher of [...this.watchers]) if (watcher.from !== state) this.settle(watcher);
  }

  /** A kedge was given up: to be seen with the next look, and the later the more often that happens. */
  slowDown(): void {
    this.lookMs = Math.min(this.lookMs * 2, MAX_LOOK_MS);
  }

  private lookLater(): void {
    this.look ??= setTimeout(() => {
      this.look = undefined;
      this.check();
      if (this.watchers.size > 0) this.lookLater();
      else this.lookMs = LOOK_MS;
    }, jittered(this.lookMs)).unref();
  }

  private settle(watcher: Watcher, error?: Error): void {
    if (!this.watchers.delete(watcher)) return;
    clearTimeout(watcher.timer);
    if (this.watchers.size === 0) {
      clearTimeout(this.look);
      this.look = undefined;
    }
    // Not from within a pool's change: who is called back may well connect.
    process.nextTick(watcher.callback, error);
  }
}
