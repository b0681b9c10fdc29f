import { ExpiryWarnings } from '../kedge/expiry.ts';
import { Kedges } from '../kedge/kedges.ts';
import type { ResolvedOptions } from '../options.ts';
import { KedgeError } from '../support/errors.ts';
import type { Wire } from '../target.ts';
import { RetryBudget } from './attempts.ts';
import { type Call, Calls } from './calls.ts';
import type { Plan, Resolved } from './plan.ts';
import { Router } from './router.ts';

/** What the wires of one dialer share: where targets go, the kedges, the calls, and the dialer's life. */
export class Core {
  readonly options: ResolvedOptions;
  readonly kedges: Kedges;
  readonly calls = new Calls();
  readonly budget: RetryBudget;
  private readonly router: Router;
  private closing: Promise<void> | undefined;

  constructor(options: ResolvedOptions) {
    this.options = options;
    this.router = new Router(options.mapper, options.maxTargets, options);
    this.budget = new RetryBudget(options.failover.retryBudget);
    this.kedges = new Kedges(options.maxKedges, {
      timeouts: options.connect,
      maxConnectionAgeMs: options.connect.maxConnectionAgeMs,
      dnsTtlMs: options.connect.dnsTtlMs,
      breaker: options.failover.breaker,
      drainTimeoutMs: options.drainTimeoutMs,
      onWarning: options.onWarning,
      expiry: new ExpiryWarnings(options.onWarning),
    });
  }

  get closed(): boolean {
    return this.closing !== undefined;
  }

  /**
   * Where a new call goes.
   *
   * @throws {@link KedgeError} `ERR_KEDGE_CLOSED`, `ERR_KEDGE_TARGET`, `ERR_KEDGE_ROUTE`, `ERR_KEDGE_UNMAPPED`
   */
  resolve(wire: Wire, input: string | URL): Resolved {
    if (this.closing !== undefined) throw new KedgeError('ERR_KEDGE_CLOSED', 'the dialer is closed');
    const resolved = this.look(wire, input);
    if (resolved.plan === undefined && this.options.unmapped === 'reject') {
      const target = resolved.target.authority;
      throw new KedgeError('ERR_KEDGE_UNMAPPED', 'no mapper knows this target, and it may not go direct', {
        target,
      });
    }
    return resolved;
  }

  /** What {@link resolve} knows, without refusing anything that is unmapped. */
  look(wire: Wire, input: string | URL): Resolved {
    return this.router.resolve(wire, input);
  }

  /** The kedge that a call goes to first, by its place in the route. */
  first(plan: Plan): number {
    return this.kedges.choose(plan.hops);
  }

  /** The same for who does not call, and so must not take the turn of a call that would find out whether a kedge is back. */
  likely(plan: Plan): number {
    return this.kedges.likely(plan.hops);
  }

  /** Takes no new calls, lets those under way finish, then closes every connection. */
  close(): Promise<void> {
    this.closing ??= this.shutdown();
    return this.closing;
  }

  /** Fails the calls under way and closes every connection. */
  destroy(error?: Error): Promise<void> {
    const reason = error instanceof Error ? error : destroyed(error);
    const closed = this.close();
    this.endPending(reason);
    this.kedges.destroy(reason);
    this.calls.release();
    return closed;
  }

  /** Ends the calls that no connection would end, or those of them that are `meant`. */
  endPending(reason: Error, meant?: (call: Call) => boolean): void {
    const onThrow = (cause: unknown) =>
      this.options.onWarning(new Error('kedge-dialer: the listener of a call that was ended threw', { cause }));
    this.calls.fail(reason, onThrow, meant);
  }

  private async shutdown(): Promise<void> {
    if (this.calls.inFlight > 0) {
      const { drainTimeoutMs } = this.options;
      const timer = setTimeout(() => void this.destroy(late(drainTimeoutMs)), drainTimeoutMs);
      await this.calls.over();
      clearTimeout(timer);
    }
    await this.kedges.close();
  }
}

function destroyed(cause: unknown): KedgeError {
  return new KedgeError('ERR_KEDGE_CLOSED', 'the dialer was destroyed', { stage: 'kedge', cause: cause ?? undefined });
}

function late(drainTimeoutMs: number): KedgeError {
  const reason = `the call was still running ${drainTimeoutMs} ms after close()`;
  return new KedgeError('ERR_KEDGE_CLOSED', reason, { stage: 'kedge' });
}

const cores = new WeakMap<object, Core>();

/** Ties a dialer to its core, which the gRPC entry point needs and the public object does not show. */
export function setCore(dialer: object, core: Core): void {
  cores.set(dialer, core);
}

/** @throws {@link KedgeError} `ERR_KEDGE_OPTIONS` when `dialer` did not come from `createDialer()` */
export function coreOf(dialer: object): Core {
  const core = cores.get(dialer);
  if (core !== undefined) return core;
  throw new KedgeError('ERR_KEDGE_OPTIONS', 'takes a dialer that createDialer() of this package made');
}
