import { jittered } from '../support/backoff.ts';

/** How a {@link Breaker} behaves. */
export interface BreakerOptions {
  /** Failed dials in a row that open it. */
  readonly failures: number;
  /** How long it stays open at first, in ms; doubled with each failure, with jitter. */
  readonly backoffMs: number;
  readonly maxBackoffMs: number;
}

type State =
  | { readonly is: 'closed'; readonly failures: number }
  | { readonly is: 'open' | 'half-open'; readonly backoffMs: number; readonly until: number };

const CLOSED: State = { is: 'closed', failures: 0 };

/**
 * One opinion about a kedge for all wires: while it cannot be dialled, calls that could go elsewhere do, and one of them
 * now and then tries it again. Calls that have no other kedge do not ask.
 */
export class Breaker {
  private readonly options: BreakerOptions;
  private state: State = CLOSED;

  constructor(options: BreakerOptions) {
    this.options = options;
  }

  get isClosed(): boolean {
    return this.state.is === 'closed';
  }

  /** For people. */
  get name(): State['is'] {
    return this.state.is;
  }

  /**
   * Whether a call may try this kedge. When the time has come, the one that asks is the probe. Not every probe learns
   * something (it may be aborted, or find a connection that is there), so after a while the next one that asks is it.
   */
  admit(now = performance.now()): boolean {
    const { state } = this;
    if (state.is === 'closed') return true;
    if (now < state.until) return false;
    this.state = { is: 'half-open', backoffMs: state.backoffMs, until: now + state.backoffMs };
    return true;
  }

  succeeded(): void {
    if (this.state !== CLOSED) this.state = CLOSED;
  }

  failed(now = performance.now()): void {
    const { failures, backoffMs, maxBackoffMs } = this.options;
    const { state } = this;
    if (state.is === 'closed' && state.failures + 1 < failures) {
      this.state = { is: 'closed', failures: state.failures + 1 };
      return;
    }
    // Calls that were on their way when it opened say nothing new.
    if (state.is === 'open' && now < state.until) return;
    const next = Math.min(state.is === 'closed' ? backoffMs : state.backoffMs * 2, maxBackoffMs);
    this.state = { is: 'open', backoffMs: next, until: now + jittered(next) };
  }
}
