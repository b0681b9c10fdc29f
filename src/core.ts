import { ExpiryWarnings } from './kedge/expiry.ts';
import { Kedges } from './kedge/kedges.ts';
import { type Resolved, Router } from './mapper/router.ts';
import type { ResolvedOptions } from './options.ts';
import { KedgeError } from './support/errors.ts';
import type { Wire } from './target.ts';

/** A call that no connection knows of yet, so that nobody else would end it. */
export interface WaitingCall {
  fail(error: Error): void;
}

/**
 * What the two wires of one dialer share: where targets go, the kedges, and the dialer's life. A call is counted from
 * the moment it is accepted until it is over, so that closing can wait for it wherever it stands.
 */
export class Core {
  readonly options: ResolvedOptions;
  readonly kedges: Kedges;
  readonly waiting = new Set<WaitingCall>();
  private readonly router: Router;
  private calls = 0;
  private idle: (() => void) | undefined;
  private closing: Promise<void> | undefined;

  constructor(options: ResolvedOptions) {
    this.options = options;
    this.router = new Router(options.mapper, options.maxTargets, options);
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

  get inFlight(): number {
    return this.calls;
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

  begin(): void {
    this.calls += 1;
  }

  end(): void {
    this.calls -= 1;
    if (this.calls === 0) this.idle?.();
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
    for (const call of this.waiting) this.fail(call, reason);
    this.kedges.destroy(reason);
    this.idle?.();
    return closed;
  }

  /** What the listener of one call throws must not keep the others from their end. */
  private fail(call: WaitingCall, reason: Error): void {
    try {
      call.fail(reason);
    } catch (cause) {
      this.options.onWarning(new Error('kedge-dialer: the listener of a call that was ended threw', { cause }));
    }
  }

  private async shutdown(): Promise<void> {
    if (this.calls > 0) {
      const { promise, resolve } = Promise.withResolvers<void>();
      this.idle = resolve;
      const timer = setTimeout(() => void this.destroy(late(this.options.drainTimeoutMs)), this.options.drainTimeoutMs);
      await promise;
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
