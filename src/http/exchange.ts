import type { IncomingHttpHeaders } from 'node:http';
import type { ClientHttp2Stream } from 'node:http2';
import type { Duplex } from 'node:stream';
import { inspect } from 'node:util';
import type { Core } from '../core.ts';
import type { Kedge } from '../kedge/kedge.ts';
import type { Plan } from '../mapper/router.ts';
import { header, reportedError } from '../reported.ts';
import { debug } from '../support/debug.ts';
import { codeOf, KedgeError } from '../support/errors.ts';
import type { Target } from '../target.ts';
import { isOneShot, isStream, ReplayBody } from './body.ts';
import { asError, callError, isInvalidRequest } from './errors.ts';
import { Attempts, isIdempotent, type Outcome, outcomeOf, refusedStream } from './failover.ts';
import { isRefused } from './h2.ts';
import { flatHeaders, type HeadersInput } from './headers.ts';
import type { HttpPool, HttpPools } from './pool.ts';
import { checkPath, type DispatchOptions, needsH1, type PoolRequest, poolRequest } from './request.ts';
import type { Dispatcher } from './undici.ts';

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
  /** Its HTTP/2 stream. */
  stream: ClientHttp2Stream | undefined;
  private hopIndex = 0;
  /** What was tried, once something has failed. */
  private attempts: Attempts | undefined;
  /** When the attempt under way was started. */
  private startedAt = 0;
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
      if (isStream(body)) body.on('error', (error) => this.abort(asError(error)));
      if (isOneShot(body)) this.replay = new ReplayBody(body, this.core.options.failover.replayBytes);
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

  /** Whether it has ended, maybe before its connection was there. */
  get over(): boolean {
    return this.done;
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

  /**
   * undici asks this right before it writes a request, and drops the request when this throws: nothing of a call that is
   * over by now leaves, and its connection stays.
   */
  onRequestStart(controller: Controller, context: unknown): void {
    const refused = isRefused(this.stream);
    this.start(context);
    if (this.done) throw this.reason ?? new DOMException('The call is over', 'AbortError');
    this.live = controller;
    // A second start is undici's own retry, which of a refused stream may not be safe.
    if (refused) throw refusedStream();
    this.stream = undefined;
    this.pool!.opening = this;
    this.startedAt = performance.now();
    if (this.isPaused) controller.pause();
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
    this.fail(this.replay?.brokeWith(error) ? this.thrown(error) : error);
  }

  onBodySent(chunk: Buffer): void {
    if (!this.done) this.handler.onBodySent?.(chunk);
  }

  onRequestSent(): void {
    if (!this.done) this.handler.onRequestSent?.();
  }

  /** What the caller's handler or body throws ends the call, and comes back to the caller as it is. */
  private thrown(error: unknown): Error {
    this.reason = asError(error);
    return this.reason;
  }

  // -- stages

  private start(context: unknown): void {
    if (this.started || this.done) return;
    this.started = true;
    try {
      this.handler.onRequestStart?.(this, context);
    } catch (error) {
      this.fail(this.thrown(error));
    }
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
    if (this.replay !== undefined) this.request.body = this.replay as never;
  }

  private attempt(index: number): boolean {
    this.live = undefined;
    this.stream = undefined;
    this.hopIndex = index;
    const hop = this.plan.hops[index]!;
    if (debug.http.enabled) {
      debug.http('%s %s -> kedge %s', this.options.method, this.target.authority, hop.address.name);
    }
    this.kedge = this.core.kedges.get(hop);
    this.pool = this.pools.of(this.kedge.generation);
    const isFree = this.pool.dispatch(this.request!, this, needsH1(this.options));
    // Who waits for a connection may give up: undici has no ear for an abort before this.
    this.start(null);
    return isFree;
  }

  /** Sends the request again where that is safe; false where the caller has to hear of the failure. */
  private retry(outcome: Outcome, instead?: Controller): boolean {
    if (outcome !== 'unsent' && this.replay?.replayable === false) return false;
    const { method, idempotent } = this.options;
    this.attempts ??= new Attempts(this.core, this.plan.hops, isIdempotent(method, idempotent));
    try {
      const afterMs = performance.now() - this.startedAt;
      const next = this.attempts.next(outcome, this.hopIndex, afterMs, this.pools.budget);
      if (next === -1) return false;
      if (debug.http.enabled) debug.http('%s %s: %s, again', method, this.target.authority, outcome);
      if (instead !== undefined) this.giveUp(instead);
      this.attempt(next);
    } catch (error) {
      // The dialer was destroyed: what it was destroyed with is what the caller hears.
      if (codeOf(error) === 'ERR_KEDGE_CLOSED') return false;
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
      // Not where the caller's own header went out in its place.
      const sent = this.request!.headers as readonly (string | undefined)[];
      if (sent.includes(this.backendAuth)) this.plan.backendAuth?.invalidate(this.backendAuth);
    } else if (failover.statuses.has(statusCode) && this.retry('lost', live)) {
      return true;
    }
    const refusal = `the kedge refused the call with ${statusCode}`;
    const context = { target: this.target.authority, kedge: this.kedge!.address.name, cause: reported };
    const error =
      statusCode === 407 && this.plan.proxyAuth !== undefined
        ? new KedgeError('ERR_KEDGE_UNAUTHORIZED', refusal, context)
        : http.throwOnKedgeError
          ? reported
          : undefined;
    if (error === undefined) return false;
    this.giveUp(live);
    this.fail(error);
    return true;
  }

  /** Ends an attempt whose answer nobody reads; at once, or undici might start it again beside the one that follows. */
  private giveUp(attempt: Controller): void {
    this.live = undefined;
    attempt.abort(new DOMException('Another attempt was made', 'AbortError'));
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
    if (this.pool?.opening === this) this.pool.opening = undefined;
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
