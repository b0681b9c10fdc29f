import type { IncomingHttpHeaders } from 'node:http';
import type { Duplex, Readable } from 'node:stream';
import type { Core } from '../core.ts';
import { debug } from '../debug.ts';
import type { Plan } from '../mapper/router.ts';
import type { Target } from '../target.ts';
import { callError, isInvalidRequest } from './errors.ts';
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
  private pool: HttpPool | undefined;
  /** The attempt under way, once its pool has started it. */
  private live: Controller | undefined;
  private hopIndex = 0;
  /** Whether the caller has been given this controller. */
  private started = false;
  private done = false;
  private isPaused = false;
  private tokenWait: AbortController | undefined;
  private bodyError: ((error: Error) => void) | undefined;
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
    try {
      checkPath(this.options, this.target);
      const { proxyAuth, backendAuth } = this.plan;
      const proxy = proxyAuth?.peek();
      const backend = backendAuth?.peek();
      if ((proxyAuth !== undefined && proxy === undefined) || (backendAuth !== undefined && backend === undefined)) {
        this.waitForTokens();
        return true;
      }
      this.build(proxy, backend);
      return this.attempt();
    } catch (error) {
      this.fail(error);
      return false;
    }
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

  onRequestUpgrade(_controller: Controller, statusCode: number, headers: IncomingHttpHeaders, socket: Duplex): void {
    if (this.done) {
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

  onResponseStart(
    _controller: Controller,
    statusCode: number,
    headers: IncomingHttpHeaders,
    statusText?: string,
  ): void {
    if (this.done) return;
    if (debug.http.enabled) debug.http('%s %s <- %d', this.options.method, this.target.authority, statusCode);
    this.handler.onResponseStart?.(this, statusCode, headers, statusText);
  }

  onResponseData(_controller: Controller, chunk: Buffer): void {
    if (!this.done) this.handler.onResponseData?.(this, chunk);
  }

  onResponseEnd(_controller: Controller, trailers: IncomingHttpHeaders): void {
    if (this.done) return;
    this.finish();
    this.handler.onResponseEnd?.(this, trailers);
  }

  onResponseError(_controller: Controller | null, error: Error): void {
    if (this.done) return;
    if (this.live === undefined && isInvalidRequest(error)) this.pool!.turnedDown();
    if (this.live === undefined && this.hopIndex + 1 < this.plan.hops.length && isDialError(error)) {
      // The attempt never began, so nothing of the request was sent: any request may go to the next kedge.
      this.hopIndex += 1;
      try {
        this.attempt();
      } catch (next) {
        this.fail(next);
      }
      return;
    }
    this.fail(error);
  }

  onBodySent(chunk: Buffer): void {
    if (!this.done) this.handler.onBodySent?.(chunk);
  }

  onRequestSent(): void {
    if (!this.done) this.handler.onRequestSent?.();
  }

  // -- stages

  private start(context: unknown): void {
    if (this.started) return;
    this.started = true;
    this.handler.onRequestStart?.(this, context);
  }

  /**
   * The caller gets its controller now, so that it can abort while the source is busy; a body stream that fails
   * meanwhile has nobody else who listens.
   */
  private waitForTokens(): void {
    const { body } = this.options;
    if (isStream(body)) {
      this.bodyError = (error) => this.fail(error);
      body.on('error', this.bodyError);
    }
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
        this.attempt();
      })
      .catch((error) => this.fail(error));
  }

  private endWait(): void {
    if (this.tokenWait === undefined) return;
    this.core.waiting.delete(this);
    this.tokenWait = undefined;
    if (this.bodyError !== undefined) (this.options.body as Readable).off('error', this.bodyError);
    this.bodyError = undefined;
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
    this.request = poolRequest(options, headers);
  }

  private attempt(): boolean {
    this.live = undefined;
    const hop = this.plan.hops[this.hopIndex]!;
    if (debug.http.enabled) {
      debug.http('%s %s -> kedge %s', this.options.method, this.target.authority, hop.address.name);
    }
    this.pool = this.pools.of(this.core.kedges.get(hop).generation);
    return this.pool.dispatch(this.request!, this, needsH1(this.options));
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
    this.core.end();
  }

  /**
   * undici orphans an HTTP/2 stream that is aborted in the tick it was opened in, and a later error on it ends the
   * process; so undici hears of an abort one turn later. The caller has had its answer by then.
   */
  private abandon(reason: Error): void {
    const { live } = this;
    if (live !== undefined) setImmediate(() => live.abort(reason));
    else if (isStream(this.options.body)) this.options.body.on('error', () => {}).destroy(reason);
  }
}

/** Failed before the request left: the connection was never made, or its queue was given up. */
function isDialError(error: Error): boolean {
  const { stage } = error as { stage?: unknown };
  return stage === 'dns' || stage === 'connect' || stage === 'tls';
}

function isStream(body: unknown): body is Readable {
  return typeof body === 'object' && body !== null && typeof (body as Partial<Readable>).on === 'function';
}
