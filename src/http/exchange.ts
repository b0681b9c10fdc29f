import type { IncomingHttpHeaders } from 'node:http';
import type { Duplex } from 'node:stream';
import { inspect } from 'node:util';
import type { Core } from '../core.ts';
import { debug } from '../debug.ts';
import { KedgeError } from '../errors.ts';
import type { Kedge } from '../kedge/kedge.ts';
import type { Plan } from '../mapper/router.ts';
import { header, reportedError } from '../reported.ts';
import type { Target } from '../target.ts';
import { isOneShot, isStream, ReplayBody } from './body.ts';
import { callError, isInvalidRequest } from './errors.ts';
import { isIdempotent, type Outcome, outcomeOf } from './failover.ts';
import { flatHeaders, type HeadersInput } from './headers.ts';
import type { HttpPool, HttpPools } from './pool.ts';
import { checkPath, type DispatchOptions, needsH1, type PoolRequest, poolRequest } from './request.ts';
import type { Dispatcher } from './undici.ts';

/** How often a request that its kedge turned away unprocessed is sent there again, when there is no other. */
const SAME_KEDGE_RETRIES = 3;

type Controller = Dispatcher.DispatchController;
type Handler = Dispatcher.DispatchHandler;

/**
 * One mapped request from `dispatch()` to its end. Towards undici's pools it is the handler, towards the caller the
 * controller, so that the caller's view stays whole while tokens are fetched and kedges are tried in turn.
 */
export class Exchange implements Handler, Controller {
  private readonly core: Core;
  private readonly pools: HttpPools;
  private readonly target: Target;
  private readonly plan: Plan;
  private readonly options: DispatchOptions;
  private readonly handler: Handler;
  private request: PoolRequest | undefined;
  private kedge: Kedge | undefined;
  private pool: HttpPool | undefined;
  /** The attempt under way, once its pool has started it. */
  private live: Controller | undefined;
  private hopIndex = 0;
  /** Kedges that failed this call, by their place in the route. */
  private failed: Set<number> | undefined;
  private attempts = 0;
  /** Bearer headers of the attempt under way, for a refusal of one. */
  private proxyAuth: string | undefined;
  private backendAuth: string | undefined;
  /** Whether a fresh token has been tried. */
  private reauthorized = false;
  private replay: ReplayBody | undefined;
  /** Whether the caller has been given this controller. */
  private started = false;
  /** Whether the caller has seen an answer: from there on nothing is sent again. */
  private answered = false;
  private done = false;
  private isPaused = false;
  private tokenWait: AbortController | undefined;
  aborted = false;
  reason: Error | null = null;

  constructor(core: Core, pools: HttpPools, target: Target, plan: Plan, options: DispatchOptions, handler: Handler) {
    this.core = core;
    this.pools = pools;
    this.target = target;
    this.plan = plan;
    this.options = options;
    this.handler = handler;
  }

  /** Returns false for backpressure, as `Dispatcher.dispatch()` does. */
  dispatch(): boolean {
    this.core.begin();
    this.pools.budget.earn();
    try {
      const { body } = this.options;
      // It may fail before anybody reads it: while a token is fetched, or a connection is made.
      if (isStream(body)) body.on('error', (error) => this.fail(error));
      checkPath(this.options, this.target);
      const { proxyAuth, backendAuth } = this.plan;
      const proxy = proxyAuth?.peek();
      const backend = backendAuth?.peek();
      if ((proxyAuth !== undefined && proxy === undefined) || (backendAuth !== undefined && backend === undefined)) {
        this.waitForTokens();
        return true;
      }
      this.build(proxy, backend);
      return this.attempt(this.core.kedges.choose(this.plan.hops));
    } catch (error) {
      this.fail(error);
      return false;
    }
  }

  /** Its headers hold tokens: whoever prints it sees where it goes. */
  [inspect.custom](): string {
    return `Exchange(${this.target.authority})`;
  }

  toJSON(): string {
    return this[inspect.custom]();
  }

  // -- the caller's controller

  get paused(): boolean {
    return this.isPaused;
  }

  get rawHeaders(): Controller['rawHeaders'] {
    return this.live?.rawHeaders ?? null;
  }

  get rawTrailers(): Controller['rawTrailers'] {
    return this.live?.rawTrailers ?? null;
  }

  pause(): void {
    this.isPaused = true;
    this.live?.pause();
  }

  resume(): void {
    this.isPaused = false;
    this.live?.resume();
  }

  abort(reason: Error): void {
    if (this.done) return;
    this.aborted = true;
    this.reason = reason ?? new DOMException('The request was aborted', 'AbortError');
    this.abandon(this.reason);
    this.fail(this.reason);
  }

  // -- the pool's handler

  onRequestStart(controller: Controller, context: unknown): void {
    this.live = controller;
    if (this.done) {
      this.abandon(this.reason ?? new DOMException('The request was aborted', 'AbortError'));
      return;
    }
    if (this.isPaused) controller.pause();
    this.start(context);
  }

  onRequestUpgrade(controller: Controller, statusCode: number, headers: IncomingHttpHeaders, socket: Duplex): void {
    if (this.done || controller !== this.live) {
      socket.destroy();
      return;
    }
    this.pool!.holdUpgraded(socket);
    this.finish();
    this.handler.onRequestUpgrade?.(this, statusCode, headers, socket);
  }

  onResponseStarted(): void {
    if (!this.done) this.handler.onResponseStarted?.();
  }

  onResponseStart(controller: Controller, statusCode: number, headers: IncomingHttpHeaders, statusText?: string): void {
    if (this.done || controller !== this.live) return;
    if (debug.http.enabled) debug.http('%s %s <- %d', this.options.method, this.target.authority, statusCode);
    if (statusCode >= 200) {
      this.kedge!.breaker.succeeded();
      if (statusCode >= 400 && this.divert(statusCode, headers)) return;
      this.answered = true;
    }
    try {
      this.handler.onResponseStart?.(this, statusCode, headers, statusText);
    } catch (error) {
      throw this.thrown(error);
    }
  }

  onResponseData(controller: Controller, chunk: Buffer): void {
    if (this.done || controller !== this.live) return;
    try {
      this.handler.onResponseData?.(this, chunk);
    } catch (error) {
      throw this.thrown(error);
    }
  }

  onResponseEnd(controller: Controller, trailers: IncomingHttpHeaders): void {
    if (this.done || controller !== this.live) return;
    this.finish();
    try {
      this.handler.onResponseEnd?.(this, trailers);
    } catch (error) {
      // undici's retry handler throws here what it wants to hear of as an error.
      this.handler.onResponseError?.(this, error as Error);
    }
  }

  onResponseError(controller: Controller | null, error: Error): void {
    // Of an attempt that was given up for another: nobody waits for it.
    if (this.done || (controller && controller !== this.live)) return;
    if (this.live === undefined && isInvalidRequest(error)) this.pool!.turnedDown();
    if (!this.answered && this.retry(outcomeOf(error, this.live !== undefined))) return;
    this.fail(error);
  }

  onBodySent(chunk: Buffer): void {
    if (!this.done) this.handler.onBodySent?.(chunk);
  }

  onRequestSent(): void {
    if (!this.done) this.handler.onRequestSent?.();
  }

  /** What the handler above throws ends the attempt, and comes back to it as it is. */
  private thrown(error: unknown): unknown {
    this.reason = error as Error;
    return error;
  }

  // -- stages

  private start(context: unknown): void {
    if (this.started) return;
    this.started = true;
    this.handler.onRequestStart?.(this, context);
  }

  /**
   * The caller gets its controller now, so that it can abort while the source is busy.
   */
  private waitForTokens(next?: number): void {
    this.tokenWait = new AbortController();
    const { signal } = this.tokenWait;
    this.core.waiting.add(this);
    this.start(null);
    if (this.done) return;
    const { proxyAuth, backendAuth } = this.plan;
    Promise.all([proxyAuth?.wait(signal), backendAuth?.wait(signal)])
      .then(([proxy, backend]) => {
        if (this.done) return;
        this.endWait();
        this.build(proxy, backend);
        this.attempt(next ?? this.core.kedges.choose(this.plan.hops));
      })
      .catch((error) => this.fail(error));
  }

  private endWait(): void {
    if (this.tokenWait === undefined) return;
    this.core.waiting.delete(this);
    this.tokenWait = undefined;
  }

  private build(proxyAuth: string | undefined, backendAuth: string | undefined): void {
    const { target, plan, options } = this;
    const headers = flatHeaders(options.headers as HeadersInput, {
      target,
      proxyAuth,
      backendAuth,
      overrideAuthorization: plan.overrideAuthorization,
      requestId: this.pools.requestId(),
    });
    this.proxyAuth = proxyAuth;
    this.backendAuth = backendAuth;
    this.request = poolRequest(options, headers);
    if (isOneShot(options.body)) {
      this.replay ??= new ReplayBody(options.body, this.core.options.failover.replayBytes);
      this.request.body = this.replay as never;
    }
  }

  private attempt(index: number): boolean {
    this.live = undefined;
    this.hopIndex = index;
    this.attempts += 1;
    const hop = this.plan.hops[index]!;
    if (debug.http.enabled) {
      debug.http('%s %s -> kedge %s', this.options.method, this.target.authority, hop.address.name);
    }
    this.kedge = this.core.kedges.get(hop);
    this.pool = this.pools.of(this.kedge.generation);
    return this.pool.dispatch(this.request!, this, needsH1(this.options));
  }

  /** Sends the request again where that is safe; false where the caller has to hear of the failure. */
  private retry(outcome: Outcome): boolean {
    const { failover } = this.core.options;
    const { hops } = this.plan;
    if (outcome === 'final') return false;
    if (outcome !== 'unsent' && this.replay?.replayable === false) return false;
    if (outcome === 'lost') {
      if (!isIdempotent(this.options.method, this.options.idempotent)) return false;
    }
    this.failed ??= new Set();
    this.failed.add(this.hopIndex);
    let next = this.failed.size < failover.attempts ? this.core.kedges.choose(hops, this.failed) : -1;
    // What a kedge turned away, a drained connection say, it may take on the next one.
    if (next === -1 && outcome === 'unprocessed' && this.attempts < hops.length + SAME_KEDGE_RETRIES)
      next = this.hopIndex;
    if (next === -1 || (outcome === 'lost' && !this.pools.budget.spend())) return false;
    if (debug.http.enabled) debug.http('%s %s: %s, again', this.options.method, this.target.authority, outcome);
    try {
      this.attempt(next);
    } catch (error) {
      this.fail(error);
    }
    return true;
  }

  /** An answer that is not the backend's, or that another attempt may better: true when it was dealt with here. */
  private divert(statusCode: number, headers: IncomingHttpHeaders): boolean {
    const { failover, http } = this.core.options;
    const live = this.live!;
    const reported = reportedError(header(headers, 'x-kedge-error'), header(headers, 'x-kedge-error-type'), {
      target: this.target.authority,
      kedge: this.kedge!.address.name,
    });
    if (statusCode === 407 || (statusCode === 401 && reported !== undefined)) {
      const fresh = this.plan.proxyAuth?.invalidate(this.proxyAuth) === true;
      if (fresh && !this.reauthorized && this.replay?.replayable !== false) {
        this.reauthorized = true;
        this.giveUp(live);
        this.waitForTokens(this.hopIndex);
        return true;
      }
    } else if (statusCode === 401) {
      this.plan.backendAuth?.invalidate(this.backendAuth);
    } else if (failover.statuses.has(statusCode) && this.retry('lost')) {
      this.giveUp(live);
      return true;
    }
    const refusal = `the kedge refused the call with ${statusCode}`;
    const context = { target: this.target.authority, kedge: this.kedge!.address.name, cause: reported };
    const error =
      statusCode === 407
        ? new KedgeError('ERR_KEDGE_UNAUTHORIZED', 'kedge', refusal, context)
        : http.throwOnKedgeError
          ? reported
          : undefined;
    if (error === undefined) return false;
    this.giveUp(live);
    this.fail(error);
    return true;
  }

  /** Ends an attempt whose answer nobody reads. */
  private giveUp(attempt: Controller): void {
    if (this.live === attempt) this.live = undefined;
    setImmediate(() => attempt.abort(new DOMException('Another attempt was made', 'AbortError')));
  }

  /** Ends the call for the caller, once. */
  fail(error: unknown): void {
    if (this.done) return;
    const final = error === this.reason ? this.reason : callError(error, this.target.authority, this.pool?.connector);
    if (debug.http.enabled) debug.http('%s %s <- %s', this.options.method, this.target.authority, final?.message);
    this.tokenWait?.abort(final);
    this.finish();
    this.handler.onResponseError?.(this, final as Error);
  }

  private finish(): void {
    this.done = true;
    this.endWait();
    void this.replay?.end();
    this.core.end();
  }

  /**
   * undici orphans an HTTP/2 stream that is aborted in the tick it was opened in, and a later error on it ends the
   * process; so undici hears of an abort one turn later. The caller has had its answer by then.
   */
  private abandon(reason: Error): void {
    const { live } = this;
    if (live !== undefined) setImmediate(() => live.abort(reason));
    else if (isStream(this.options.body)) this.options.body.destroy(reason);
  }
}
