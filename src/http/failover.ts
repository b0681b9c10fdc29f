import type { Socket } from 'node:net';
import type { Core } from '../core.ts';
import { isDialError } from '../kedge/connector.ts';
import type { Hop } from '../kedge/kedge.ts';
import { codeOf, isKedgeError } from '../support/errors.ts';
import { isLost, isUnparsable } from './errors.ts';

/**
 * What an error says of the attempt that it ended.
 *
 * - `unsent`: the connection was never made; nothing of the request left.
 * - `unprocessed`: the kedge's GOAWAY leaves the request out, or its headers were never sent (RFC 9113 §6.8).
 * - `unserved`: the kedge closed an HTTP/2 connection on which it had not sent a byte, its SETTINGS neither.
 * - `refused`: REFUSED_STREAM (RFC 9113 §8.7).
 * - `stale`: an HTTP/1.1 connection that had served others ended; mostly it was closed before the request came.
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

/** RFC 9110 §9.2.2, with QUERY (draft-ietf-httpbis-safe-method-w-body). */
const IDEMPOTENT = new Set(['GET', 'HEAD', 'OPTIONS', 'TRACE', 'PUT', 'DELETE', 'QUERY']);
const NGHTTP2_FRAME_SIZE_ERROR = 6;
const NGHTTP2_REFUSED_STREAM = 7;

/** Our own reasons for ending a connection under its calls; a closed dialer is not one of them. */
const ENDED = new Set(['ERR_KEDGE_CONNECTION', 'ERR_KEDGE_IDENTITY_EXPIRED']);

/** What lost connections had done by then, by the error that their requests are given. */
const losses = new WeakMap<Error, 'unserved' | 'stale'>();

/** Remembers what a connection had done when it is lost, which its requests cannot see. */
export function watchLoss(socket: Socket, isH2: boolean): void {
  socket.once('error', (error) => {
    // Only an orderly end proves that there was nothing to read: a reset discards what was.
    if (!isH2 && socket.bytesRead > 0 && !isUnparsable(error)) losses.set(error, 'stale');
    else if (isH2 && socket.bytesRead === 0 && /other side closed/.test(error.message)) losses.set(error, 'unserved');
  });
}

/** What ends an attempt that undici would send again by itself on the connection that refused it. */
export function refusedStream(): Error {
  const error = new Error('Stream closed with error code NGHTTP2_REFUSED_STREAM');
  return Object.assign(error, { code: 'ERR_HTTP2_STREAM_ERROR', http2ErrorCode: NGHTTP2_REFUSED_STREAM });
}

/** What ends a stream that a GOAWAY leaves out; undici says it like this. */
export function leftOut(code: number): Error {
  const error = new Error(`HTTP/2: "GOAWAY" frame received with code ${code}`);
  return Object.assign(error, { code: 'UND_ERR_SOCKET' });
}

export function outcomeOf(error: unknown, started: boolean): Outcome {
  // A dial that fails after the start: undici had taken the request back from a connection that turned it away.
  if (isDialError(error)) return started ? 'unprocessed' : 'unsent';
  const code = codeOf(error);
  const lost = isLost(code) || (isKedgeError(error) && ENDED.has(code));
  if (!started) return lost ? 'unsent' : 'final';
  const { http2ErrorCode, message } = (error ?? {}) as { http2ErrorCode?: unknown; message?: unknown };
  if (http2ErrorCode === NGHTTP2_REFUSED_STREAM && code === 'ERR_HTTP2_STREAM_ERROR') return 'refused';
  // undici has no codes for these; the first comes only for streams that the kedge's GOAWAY leaves out.
  if (/"GOAWAY" frame received/.test(String(message))) return 'unprocessed';
  const frame = unsentHeaders(message);
  if (frame !== undefined) return frame === NGHTTP2_FRAME_SIZE_ERROR ? 'final' : 'unprocessed';
  return losses.get(error as Error) ?? (lost ? 'lost' : 'final');
}

/** nghttp2's code for HEADERS that it did not send: it has read a GOAWAY meanwhile, or they are too long for a frame. */
export function unsentHeaders(message: unknown): number | undefined {
  const match = /"frameError" received - type 1, code ([0-9]+)/.exec(String(message));
  return match === null ? undefined : Number(match[1]);
}

export function isIdempotent(method: string, idempotent: boolean | undefined): boolean {
  return idempotent ?? IDEMPOTENT.has(method);
}

/** The attempts of one call of which the first has failed. */
export class Attempts {
  private readonly core: Core;
  private readonly hops: readonly Hop[];
  private readonly idempotent: boolean;
  /** Kedges that failed the call, by their place in the route. */
  private readonly failed = new Set<number>();
  /** How often it went to the same kedge again. */
  private again = 0;
  private refused = false;

  constructor(core: Core, hops: readonly Hop[], idempotent: boolean) {
    this.core = core;
    this.hops = hops;
    this.idempotent = idempotent;
  }

  /**
   * Which kedge may have the request next, after `outcome` at the one at `hop`, `afterMs` after it was written; -1: none.
   *
   * @throws {@link KedgeError} when a kedge of the route cannot be used
   */
  next(outcome: Outcome, hop: number, afterMs: number, budget: RetryBudget): number {
    const unsure = outcome === 'lost' || outcome === 'stale';
    if (outcome === 'final' || (unsure && !this.idempotent)) return -1;
    if (outcome === 'refused') {
      if (this.refused || (!this.idempotent && afterMs > AT_ONCE_MS)) return -1;
      // RFC 9113 §8.7: no more than once.
      this.refused = true;
    }
    this.failed.add(hop);
    const { failover } = this.core.options;
    let next = this.failed.size < failover.attempts ? this.core.kedges.choose(this.hops, this.failed) : -1;
    if (next === -1 && this.again < SAME_KEDGE[outcome]) {
      this.again += 1;
      next = hop;
    }
    return next !== -1 && unsure && !budget.spend() ? -1 : next;
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
