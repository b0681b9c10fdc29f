import type { IncomingHttpHeaders } from 'node:http';
import { Attempts, type Outcome } from '../engine/attempts.ts';
import { Call } from '../engine/calls.ts';
import type { Core } from '../engine/core.ts';
import type { Tokens } from '../engine/credentials.ts';
import type { Plan } from '../engine/plan.ts';
import { header, reportedError } from '../kedge-error-report.ts';
import { debug } from '../support/debug.ts';
import { codeOf, KedgeError } from '../support/errors.ts';
import type { Target } from '../target.ts';
import { Attempt } from './attempt.ts';
import { isOneShot, isStream, ReplayBody } from './body.ts';
import { asError, callError } from './errors.ts';
import { flatHeaders, type HeadersInput } from './headers.ts';
import { isIdempotent } from './outcome.ts';
import type { HttpPools } from './pools.ts';
import { checkPath, type DispatchOptions, needsH1, type PoolRequest, poolRequest } from './request.ts';
import type { Dispatcher } from './undici.ts';
import { verdictOn } from './verdict.ts';

type Controller = Dispatcher.DispatchController;
type Handler = Dispatcher.DispatchHandler;

/**
 * One mapped request from `dispatch()` to its end. It is the controller that the caller holds, whose view stays whole while
 * tokens are fetched and kedges are tried in turn; each {@link Attempt} tells it what came of it.
 *
 * @remarks Large by its fields: four are undici's contract of a controller, six are what the call was given.
 */
export class HttpCall extends Call implements Controller {
  readonly handler: Handler;
  private readonly pools: HttpPools;
  private readonly target: Target;
  private readonly plan: Plan;
  private readonly options: DispatchOptions;
  /** What is sent, and with which tokens. */
  private request: PoolRequest | undefined;
  private tokens: Tokens | undefined;
  /** A body that can be read once, kept for another attempt. */
  private replay: ReplayBody | undefined;
  /** The last one. */
  private attempt: Attempt | undefined;
  /** What was tried, once something has failed. */
  private attempts: Attempts | undefined;
  /** Whether the caller has been given this controller. */
  private isStarted = false;
  paused = false;
  aborted = false;
  reason: Error | null = null;

  constructor(core: Core, pools: HttpPools, target: Target, plan: Plan, options: DispatchOptions, handler: Handler) {
    super(core);
    this.pools = pools;
    this.target = target;
    this.plan = plan;
    this.options = options;
    this.handler = handler;
  }

  /** Returns false for backpressure, as `Dispatcher.dispatch()` does. */
  dispatch(): boolean {
    this.begin();
    this.core.budget.earn();
    try {
      const { body } = this.options;
      // It may fail before anybody reads it: while a token is fetched, or a connection is made.
      if (isStream(body)) body.on('error', (error) => this.abort(asError(error)));
      if (isOneShot(body)) this.replay = new ReplayBody(body, this.core.options.failover.replayBytes);
      checkPath(this.options, this.target);
      const tokens = this.plan.credentials.peek();
      if (tokens !== undefined) return this.send(tokens, this.core.first(this.plan));
      this.sendLater();
      return true;
    } catch (error) {
      this.fail(error);
      return false;
    }
  }

  override get label(): string {
    return `${this.options.method} ${this.target.authority}`;
  }

  // -- the caller's controller

  get rawHeaders(): Controller['rawHeaders'] {
    return this.attempt?.rawHeaders ?? null;
  }

  get rawTrailers(): Controller['rawTrailers'] {
    return this.attempt?.rawTrailers ?? null;
  }

  pause(): void {
    this.paused = true;
    this.attempt?.pause();
  }

  resume(): void {
    this.paused = false;
    this.attempt?.resume();
  }

  abort(reason: Error): void {
    if (this.isOver) return;
    this.aborted = true;
    this.reason = reason ?? new DOMException('The request was aborted', 'AbortError');
    const { body } = this.options;
    // Streams from before Node 0.10 cannot be destroyed.
    if (this.attempt?.abort(this.reason) !== true && isStream(body)) body.destroy?.(this.reason);
    this.fail(this.reason);
  }

  // -- what its attempts tell it

  /** Gives the caller its controller, once. */
  start(context: unknown): void {
    if (this.isStarted || this.isOver) return;
    this.isStarted = true;
    try {
      this.handler.onRequestStart?.(this, context);
    } catch (error) {
      this.fail(this.thrown(error));
    }
  }

  failed(attempt: Attempt, error: Error, outcome: Outcome): void {
    if (this.retry(attempt, outcome)) return;
    this.fail(this.replay?.brokeWith(error) ? this.thrown(error) : error);
  }

  /** What the caller's handler or body throws ends the call, and comes back to the caller as it is. */
  thrown(error: unknown): Error {
    this.reason = asError(error);
    return this.reason;
  }

  /** Deals with an answer that is not the backend's, or that another attempt may better; false: it is the caller's. */
  divert(attempt: Attempt, statusCode: number, headers: IncomingHttpHeaders): boolean {
    const { failover, http } = this.core.options;
    const context = { target: this.target.authority, kedge: attempt.kedge.address.name };
    const reported = reportedError(header(headers, 'x-kedge-error'), header(headers, 'x-kedge-error-type'), context);
    const verdict = verdictOn(statusCode, reported !== undefined, failover.statuses);
    if (verdict === 'kedge-token' && this.reauthorize(attempt)) return true;
    if (verdict === 'elsewhere' && this.retry(attempt, 'lost')) return true;
    if (verdict === 'backend-token') {
      // Not where the caller's own header went out in its place.
      const sent = this.request!.headers as readonly (string | undefined)[];
      if (sent.includes(this.tokens!.backendAuth)) this.plan.credentials.refused(this.tokens!, 'backend');
    }
    const refusal = `the kedge refused the call with ${statusCode}`;
    const error =
      statusCode === 407 && this.plan.credentials.bringsProxyAuth
        ? new KedgeError('ERR_KEDGE_UNAUTHORIZED', refusal, { ...context, cause: reported })
        : http.throwOnKedgeError
          ? reported
          : undefined;
    if (error === undefined) return false;
    attempt.giveUp();
    this.fail(error);
    return true;
  }

  /** The call is over; the caller hears of it from whoever says so. */
  finish(reason?: unknown): void {
    this.attempt?.end();
    this.over(reason);
    void this.replay?.end();
  }

  /** Ends the call for the caller, once. */
  fail(error: unknown): void {
    if (this.isOver) return;
    const isOwn = error === this.reason;
    const final = isOwn ? this.reason : callError(error, this.target.authority, this.attempt?.pool.connector);
    if (debug.http.enabled) debug.http('%s <- %s', this.label, final?.message);
    this.finish(final);
    this.handler.onResponseError?.(this, final as Error);
  }

  // -- stages

  private send(tokens: Tokens, index: number): boolean {
    const { target, options } = this;
    this.tokens = tokens;
    const requestId = this.pools.requestId();
    const headers = flatHeaders(options.headers as HeadersInput, { target, tokens, requestId });
    this.request = poolRequest(options, headers, this.replay);
    return this.tryAt(index);
  }

  /** The caller gets its controller now, so that it can abort while the source is busy. */
  private sendLater(index?: number): void {
    this.pend();
    this.start(null);
    if (this.isOver) return;
    this.waitForTokens(this.plan.credentials)
      .then((tokens) => {
        if (this.isOver) return;
        this.placed();
        this.send(tokens, index ?? this.core.first(this.plan));
      })
      .catch((error) => this.fail(error));
  }

  private tryAt(index: number): boolean {
    const kedge = this.core.kedges.get(this.plan.endpoints[index]!);
    if (debug.http.enabled) debug.http('%s -> kedge %s', this.label, kedge.address.name);
    const attempt = new Attempt(this, index, kedge, this.pools.of(kedge.generation));
    this.attempt = attempt;
    const isFree = attempt.pool.dispatch(this.request!, attempt, needsH1(this.options));
    // Who waits for a connection may give up: undici has no ear for an abort before this.
    this.start(null);
    return isFree;
  }

  /** Sends the request again where that is safe; false where the caller has to hear of the failure. */
  private retry(attempt: Attempt, outcome: Outcome): boolean {
    if (outcome !== 'unsent' && this.replay?.replayable === false) return false;
    try {
      const next = this.furtherAttempts.next(outcome, attempt.index, attempt.ageMs);
      if (next === -1) return false;
      if (debug.http.enabled) debug.http('%s: %s, again', this.label, outcome);
      attempt.giveUp();
      this.tryAt(next);
    } catch (error) {
      // The dialer was destroyed: what it was destroyed with is what the caller hears.
      if (codeOf(error) === 'ERR_KEDGE_CLOSED') return false;
      this.fail(error);
    }
    return true;
  }

  /** With a fresh token for the same kedge, once. */
  private reauthorize(attempt: Attempt): boolean {
    const isFresh = this.plan.credentials.refused(this.tokens!, 'kedge');
    if (!isFresh || this.replay?.replayable === false || !this.furtherAttempts.reauthorize()) return false;
    attempt.giveUp();
    this.sendLater(attempt.index);
    return true;
  }

  private get furtherAttempts(): Attempts {
    const { method, idempotent } = this.options;
    this.attempts ??= new Attempts(this.core, this.plan, isIdempotent(method, idempotent));
    return this.attempts;
  }
}
