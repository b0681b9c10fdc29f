import { inspect } from 'node:util';
import type { Core } from './core.ts';
import type { Credentials, Tokens } from './credentials.ts';

/**
 * The calls of one dialer that are not over, so that closing can wait for them wherever they stand, and those among them
 * that only the dialer can end.
 */
export class Calls {
  /** Calls that no connection knows of. */
  private readonly pending = new Set<Call>();
  private count = 0;
  private idle: (() => void) | undefined;

  get inFlight(): number {
    return this.count;
  }

  begin(): void {
    this.count += 1;
  }

  end(call: Call): void {
    this.pending.delete(call);
    this.count -= 1;
    if (this.count === 0) this.idle?.();
  }

  pend(call: Call): void {
    this.pending.add(call);
  }

  placed(call: Call): void {
    this.pending.delete(call);
  }

  /** Ends those that no connection would end, or those of them that are `meant`; `onThrow` hears what their listeners throw. */
  fail(reason: Error, onThrow: (cause: unknown) => void, meant?: (call: Call) => boolean): void {
    for (const call of this.pending) {
      if (meant?.(call) === false) continue;
      try {
        call.fail(reason);
      } catch (cause) {
        // It must not keep the others from their end.
        onThrow(cause);
      }
    }
  }

  /** Resolves when the last is over; {@link release} is sooner. */
  async over(): Promise<void> {
    if (this.count === 0) return;
    const { promise, resolve } = Promise.withResolvers<void>();
    this.idle = resolve;
    await promise;
  }

  release(): void {
    this.idle?.();
  }
}

/**
 * One call, from its beginning to its end. What a wire adds is its library's contract; when a call counts, who can end it
 * and what it waits for is said here once.
 */
export abstract class Call {
  readonly core: Core;
  protected isOver = false;
  protected isWaitingForTokens = false;
  private ending: AbortController | undefined;
  private endedBy: unknown;

  constructor(core: Core) {
    this.core = core;
  }

  /** What people may see of it: its headers hold tokens. */
  abstract get label(): string;

  [inspect.custom](): string {
    return `${this.constructor.name}(${this.label})`;
  }

  toJSON(): string {
    return this[inspect.custom]();
  }

  /** Ends it for its caller, if it is not over. */
  abstract fail(error: Error): void;

  /** From here on the dialer's `close()` waits for it. */
  protected begin(): void {
    this.core.calls.begin();
  }

  /** It waits for something that is not a connection's to end: until {@link placed} the dialer's end is its own. */
  protected pend(): void {
    this.core.calls.pend(this);
  }

  /** A connection has it, and ends it with itself. */
  protected placed(): void {
    this.core.calls.placed(this);
  }

  /** Ends it, once. What still waits on its behalf is told `reason`; without one nothing does. */
  protected over(reason?: unknown): void {
    if (this.isOver) return;
    this.isOver = true;
    this.endedBy = reason;
    this.core.calls.end(this);
    if (reason !== undefined) this.ending?.abort(reason);
  }

  /** For what waits on its behalf: aborts when the call is over. */
  protected get signal(): AbortSignal {
    if (this.ending === undefined) {
      this.ending = new AbortController();
      if (this.isOver) this.ending.abort(this.endedBy);
    }
    return this.ending.signal;
  }

  /** The tokens of its route, one of which is not at hand. Until it has a connection it pends. */
  protected async waitForTokens(credentials: Credentials): Promise<Tokens> {
    this.isWaitingForTokens = true;
    try {
      return await credentials.wait(this.signal);
    } finally {
      this.isWaitingForTokens = false;
    }
  }
}
