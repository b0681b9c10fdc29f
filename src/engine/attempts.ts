import type { Core } from './core.ts';
import { Endpoints } from './endpoints.ts';
import type { Plan } from './plan.ts';

/**
 * What is known of an attempt that ended.
 *
 * - `unsent`: the connection was never made; nothing of the request left.
 * - `unprocessed`: the kedge's GOAWAY leaves the request out, or its headers were never sent (RFC 9113 §6.8).
 * - `unserved`: the kedge closed an HTTP/2 connection on which it had not sent a byte, its SETTINGS neither.
 * - `refused`: REFUSED_STREAM (RFC 9113 §8.7).
 * - `stale`: an HTTP/1.1 connection that had served others ended without a byte of this answer; mostly it was closed before
 *   the request came (RFC 9112 §9.3.1).
 * - `lost`: nobody knows whether the kedge acted on it.
 * - `final`: it is about the request itself, or the time is up; another attempt would not help.
 */
export type Outcome = 'unsent' | 'unprocessed' | 'unserved' | 'refused' | 'stale' | 'lost' | 'final';

/** How often a request goes to the same kedge once more when there is no other: a draining one takes it on its next connection. */
const SAME_KEDGE: Readonly<Record<Outcome, number>> = {
  unsent: 0,
  unprocessed: 3,
  unserved: 1,
  refused: 1,
  stale: 1,
  lost: 0,
  final: 0,
};

/**
 * Within what time of its request a REFUSED_STREAM is believed for methods that are not idempotent, in ms. A kedge that
 * refuses does so when it reads the headers; there are gateways (HAProxy 2.6) that say the same when a backend fails with
 * the request in its hands.
 */
const AT_ONCE_MS = 250;

/** The attempts of one call of which the first has failed: whether there is another, and where. */
export class Attempts {
  private readonly core: Core;
  private readonly isIdempotent: boolean;
  private readonly endpoints: Endpoints;
  /** How often it went to the same kedge again. */
  private again = 0;
  private isRefused = false;
  private isReauthorized = false;

  constructor(core: Core, plan: Plan, isIdempotent: boolean) {
    this.core = core;
    this.isIdempotent = isIdempotent;
    this.endpoints = new Endpoints(core, plan);
  }

  /**
   * Which kedge may have the request next, after `outcome` at the one at `index`, `afterMs` after it was written; -1: none.
   *
   * @throws {@link KedgeError} when a kedge of the route cannot be used
   */
  next(outcome: Outcome, index: number, afterMs: number): number {
    const isUnsure = outcome === 'lost' || outcome === 'stale';
    if (outcome === 'final' || (isUnsure && !this.isIdempotent)) return -1;
    if (outcome === 'refused') {
      if (this.isRefused || (!this.isIdempotent && afterMs > AT_ONCE_MS)) return -1;
      // RFC 9113 §8.7: no more than once.
      this.isRefused = true;
    }
    this.endpoints.add(index);
    let next = this.endpoints.next();
    if (next === -1 && this.again < SAME_KEDGE[outcome]) {
      this.again += 1;
      next = index;
    }
    return next !== -1 && isUnsure && !this.core.budget.spend() ? -1 : next;
  }

  /** Whether a call whose token was refused may go out with a fresh one: once. */
  reauthorize(): boolean {
    if (this.isReauthorized) return false;
    this.isReauthorized = true;
    return true;
  }
}

/**
 * Bounds what retries add in a bad hour: each request earns a part of a retry, and each retry spends one (the "retry budget"
 * of Finagle and Envoy). A few are there from the start.
 */
export class RetryBudget {
  private readonly share: number;
  private tokens = 10;

  constructor(share: number) {
    this.share = share;
    if (share === 0) this.tokens = 0;
  }

  earn(): void {
    if (this.tokens < 100) this.tokens += this.share;
  }

  spend(): boolean {
    if (this.tokens < 1) return false;
    this.tokens -= 1;
    return true;
  }
}
