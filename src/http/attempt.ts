import type { IncomingHttpHeaders } from 'node:http';
import type { ClientHttp2Stream } from 'node:http2';
import type { Duplex } from 'node:stream';
import { inspect } from 'node:util';
import type { Kedge } from '../kedge/kedge.ts';
import { debug } from '../support/debug.ts';
import type { HttpCall } from './call.ts';
import { asError, isInvalidRequest } from './errors.ts';
import { isRefused } from './h2.ts';
import { outcomeOf, refusedStream } from './outcome.ts';
import type { HttpPool } from './pool.ts';
import type { Dispatcher } from './undici.ts';

type Controller = Dispatcher.DispatchController;
type Handler = Dispatcher.DispatchHandler;

/**
 * One attempt of a call at one kedge: what its pool is given as the handler. An attempt that is over hears nothing any more,
 * so that none of a call's attempts can be taken for another.
 *
 * @remarks Large by its methods: nine are undici's contract of a handler.
 */
export class Attempt implements Handler {
  readonly kedge: Kedge;
  readonly pool: HttpPool;
  /** The kedge by its place in the route. */
  readonly index: number;
  private readonly call: HttpCall;
  /**
   * `queued`: nothing of it was written · `sent`: undici writes or has written it · `begun`: a byte of the answer is here ·
   * `answered`: the caller has seen an answer, and from there on nothing is sent again · `failed`: undici is done with it ·
   * `over`: the call is, too.
   */
  private state: 'queued' | 'sent' | 'begun' | 'answered' | 'failed' | 'over' = 'queued';
  private controller: Controller | undefined;
  private sentAt = 0;
  /** Its HTTP/2 stream. */
  stream: ClientHttp2Stream | undefined;

  constructor(call: HttpCall, index: number, kedge: Kedge, pool: HttpPool) {
    this.call = call;
    this.index = index;
    this.kedge = kedge;
    this.pool = pool;
  }

  /** Its call's headers hold tokens: whoever prints it sees where it goes. */
  [inspect.custom](): string {
    return `Attempt(${this.kedge.address.name})`;
  }

  toJSON(): string {
    return this[inspect.custom]();
  }

  /** Whether it has ended, maybe before its connection was there. */
  get over(): boolean {
    return this.state === 'over';
  }

  private get isUnderWay(): boolean {
    return this.state === 'sent' || this.state === 'begun' || this.state === 'answered';
  }

  /** Since it was written, in ms. */
  get ageMs(): number {
    return performance.now() - this.sentAt;
  }

  get rawHeaders(): Controller['rawHeaders'] {
    return this.controller?.rawHeaders ?? null;
  }

  get rawTrailers(): Controller['rawTrailers'] {
    return this.controller?.rawTrailers ?? null;
  }

  pause(): void {
    this.controller?.pause();
  }

  resume(): void {
    this.controller?.resume();
  }

  /** Nobody reads its answer; at once, or undici might start it again beside the one that follows. */
  giveUp(): void {
    const { isUnderWay } = this;
    this.end();
    if (isUnderWay) this.controller!.abort(new DOMException('Another attempt was made', 'AbortError'));
  }

  /**
   * Its caller has given up; returns whether undici had it. undici orphans an HTTP/2 stream that is aborted in the tick it
   * was opened in, and a later error on it ends the process; so undici hears of it one turn later. The caller has had its
   * answer by then.
   */
  abort(reason: Error): boolean {
    const { isUnderWay } = this;
    this.end();
    if (isUnderWay) setImmediate(() => this.controller!.abort(reason));
    return isUnderWay;
  }

  /** The call needs it no more. */
  end(): void {
    this.state = 'over';
    if (this.pool.opening === this) this.pool.opening = undefined;
  }

  // -- the pool's handler

  /**
   * undici asks this right before it writes a request, and drops the request when this throws: nothing of a call that is
   * over by now leaves, and its connection stays.
   */
  onRequestStart(controller: Controller, context: unknown): void {
    // A second start is undici's own retry, which of a refused stream may not be safe.
    const refused = isRefused(this.stream);
    this.call.start(context);
    if (this.state === 'over') throw this.call.reason ?? new DOMException('The call is over', 'AbortError');
    this.controller = controller;
    this.state = 'sent';
    if (refused) throw refusedStream();
    this.stream = undefined;
    this.pool.opening = this;
    this.sentAt = performance.now();
    if (this.call.paused) controller.pause();
  }

  onRequestUpgrade(_controller: Controller, statusCode: number, headers: IncomingHttpHeaders, socket: Duplex): void {
    if (this.state === 'over') {
      socket.destroy();
      return;
    }
    this.pool.holdUpgraded(socket);
    this.call.finish();
    this.call.handler.onRequestUpgrade?.(this.call, statusCode, headers, socket);
  }

  onResponseStarted(): void {
    if (this.state === 'over') return;
    if (this.state === 'sent') this.state = 'begun';
    this.tell('onResponseStarted');
  }

  onResponseStart(_controller: Controller, statusCode: number, headers: IncomingHttpHeaders, text?: string): void {
    if (this.state === 'over') return;
    if (debug.http.enabled) debug.http('%s <- %d', this.call.label, statusCode);
    if (statusCode >= 200) {
      this.kedge.breaker.succeeded();
      if (statusCode >= 400 && this.call.divert(this, statusCode, headers)) return;
      this.state = 'answered';
    }
    const { call } = this;
    try {
      call.handler.onResponseStart?.(call, statusCode, headers, text);
    } catch (error) {
      throw call.thrown(error);
    }
  }

  onResponseData(_controller: Controller, chunk: Buffer): void {
    if (this.state === 'over') return;
    const { call } = this;
    try {
      call.handler.onResponseData?.(call, chunk);
    } catch (error) {
      throw call.thrown(error);
    }
  }

  onResponseEnd(_controller: Controller, trailers: IncomingHttpHeaders): void {
    if (this.state === 'over') return;
    const { call } = this;
    call.finish();
    try {
      call.handler.onResponseEnd?.(call, trailers);
    } catch (error) {
      // undici's retry handler throws here what it wants to hear of as an error.
      call.handler.onResponseError?.(call, error as Error);
    }
  }

  onResponseError(_controller: Controller | null, error: Error): void {
    const { state } = this;
    if (state === 'over') return;
    this.state = 'failed';
    if (state === 'queued' && isInvalidRequest(error)) this.pool.turnedDown();
    // Of an answer that the caller has seen nothing is sent again.
    const outcome = state === 'answered' ? 'final' : outcomeOf(error, state !== 'queued', state === 'begun');
    this.call.failed(this, error, outcome);
  }

  onBodySent(chunk: Buffer): void {
    if (this.state !== 'over') this.tell('onBodySent', chunk);
  }

  onRequestSent(): void {
    if (this.state !== 'over') this.tell('onRequestSent');
  }

  /** Over HTTP/2 undici does not expect that these throw. */
  private tell(what: 'onResponseStarted' | 'onRequestSent' | 'onBodySent', chunk?: Buffer): void {
    try {
      this.call.handler[what]?.(chunk!);
    } catch (error) {
      this.call.abort(asError(error));
    }
  }
}
