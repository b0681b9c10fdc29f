import type { Core } from '../engine/core.ts';
import type { KedgeStats } from '../kedge/kedge.ts';
import { debug } from '../support/debug.ts';
import { isKedgeError, KedgeError } from '../support/errors.ts';
import { hide } from '../support/redact.ts';
import { HttpCall } from './call.ts';
import { callError } from './errors.ts';
import type { Fallback } from './fallback.ts';
import { isLegacy, LegacyAdapter } from './handler-versions.ts';
import { HttpPools } from './pools.ts';
import type { DispatchOptions } from './request.ts';
import { Dispatcher } from './undici.ts';

/** undici's types lack these. */
type Limits = Dispatcher & { readonly webSocketOptions?: unknown; readonly eventSourceOptions?: unknown };

/**
 * The undici `Dispatcher` of a dialer: mapped requests go to their kedge, all others to the fallback. It takes the
 * handlers of undici 6, 7 and 8, so it serves the built-in fetch of every Node line.
 *
 * TypeScript's `private`, not `#`: undici's `compose()` wraps dispatchers in a Proxy, through which `#` does not work.
 */
export class HttpDispatcher extends Dispatcher {
  private readonly core: Core;
  private readonly fallback: Fallback;
  private readonly pools: HttpPools;

  constructor(core: Core, fallback: Fallback) {
    super();
    this.core = core;
    this.fallback = fallback;
    this.pools = new HttpPools(core.options, this);
    // Requests with their headers are somewhere below.
    hide(this, 'KedgeDispatcher');
  }

  override dispatch(options: DispatchOptions, handler: Dispatcher.DispatchHandler): boolean {
    if (typeof handler !== 'object' || handler === null) {
      throw new KedgeError('ERR_KEDGE_REQUEST', 'dispatch() takes a handler object');
    }
    try {
      const origin: unknown = options?.origin;
      if (typeof origin !== 'string' && !(origin instanceof URL)) {
        throw new KedgeError('ERR_KEDGE_TARGET', 'the request has no origin');
      }
      const { target, plan } = this.core.resolve('http', origin);
      if (plan === undefined) return this.fallback.dispatch(this, options, handler);
      const modern = isLegacy(handler) ? new LegacyAdapter(handler) : handler;
      return new HttpCall(this.core, this.pools, target, plan, options, modern).dispatch();
    } catch (error) {
      return refuse(handler, error);
    }
  }

  /** Whether it takes no new calls. */
  get closed(): boolean {
    return this.core.closed;
  }

  /** The kedges in use, as `dialer.stats()` has them. */
  get stats(): KedgeStats[] {
    return this.core.kedges.stats();
  }

  /** Connects to the kedge of a target. */
  async warm(input: string | URL): Promise<void> {
    const { target, plan } = this.core.resolve('http', input);
    if (plan === undefined) return;
    const kedge = this.core.kedges.get(plan.endpoints[this.core.first(plan)]!);
    try {
      await this.pools.of(kedge.generation).warm();
    } catch (error) {
      throw callError(error, target.authority, kedge.generation.connector);
    }
  }

  /** What undici's `WebSocket` and `EventSource` ask their dispatcher for: undici's own limits. */
  get webSocketOptions(): unknown {
    return (this.fallback.own as Limits).webSocketOptions;
  }

  get eventSourceOptions(): unknown {
    return (this.fallback.own as Limits).eventSourceOptions;
  }

  override close(): Promise<void>;
  override close(callback: () => void): void;
  override close(callback?: () => void): Promise<void> | void {
    return settle(this.core.close(), callback);
  }

  override destroy(): Promise<void>;
  override destroy(error: Error | null): Promise<void>;
  override destroy(callback: () => void): void;
  override destroy(error: Error | null, callback: () => void): void;
  override destroy(error?: Error | null | (() => void), callback?: () => void): Promise<void> | void {
    const reason = typeof error === 'function' ? undefined : (error ?? undefined);
    return settle(this.core.destroy(reason), typeof error === 'function' ? error : callback);
  }
}

function settle(promise: Promise<void>, callback: (() => void) | undefined): Promise<void> | void {
  if (callback === undefined) return promise;
  promise.then(() => callback());
}

/** A request that never began: as undici does, the handler hears of it, and only a handler that cannot is thrown at. */
function refuse(handler: Dispatcher.DispatchHandler, error: unknown): false {
  if (isKedgeError(error)) debug.http('%s', error.message);
  const listener = isLegacy(handler) ? new LegacyAdapter(handler) : handler;
  if (listener.onResponseError === undefined) throw error;
  listener.onResponseError(null as never, error as Error);
  return false;
}
