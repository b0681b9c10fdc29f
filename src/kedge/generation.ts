import type { Connector } from '../dial/connector.ts';
import type { AnySnapshot } from '../identity/identity.ts';
import type { KedgeError } from '../support/errors.ts';

/** What a wire keeps for a generation: its connections and the calls on them. */
export interface WirePool {
  /** Takes no new calls; resolves when its calls are done and its connections closed. */
  close(): Promise<void>;
  /** Closes what is left, where no call is. */
  abandon?(error: Error): void;
  /** Fails its calls with `error` and closes its connections now. */
  destroy(error: Error): void;
  /** Calls that were given to this pool and are not over. */
  readonly inFlight: number;
}

/**
 * Everything that holds one client identity for one kedge: TLS context, sessions and pools. Replacing the generation is
 * the only way in which connections are replaced, so no connection can outlive its identity by accident.
 */
export class Generation {
  readonly id: number;
  readonly identity: AnySnapshot | undefined;
  readonly connector: Connector;
  /** Opened by the first call of a wire. */
  http: WirePool | undefined;
  private readonly shared = new Map<string, WirePool>();

  constructor(id: number, identity: AnySnapshot | undefined, connector: Connector) {
    this.id = id;
    this.identity = identity;
    this.connector = connector;
  }

  /** The pool of this key, opened when it is first asked for. */
  pool<P extends WirePool>(key: string, open: () => P): P {
    let pool = this.shared.get(key);
    if (pool === undefined) {
      pool = open();
      this.shared.set(key, pool);
    }
    return pool as P;
  }

  /** The pool of this key, if it is open. */
  peek(key: string): WirePool | undefined {
    return this.shared.get(key);
  }

  get inFlight(): number {
    return this.pools().reduce((sum, { inFlight }) => sum + inFlight, 0);
  }

  /** Lets the calls finish; what is left after `deadlineMs` is destroyed with `late`. */
  async drain(deadlineMs: number, late: Error): Promise<void> {
    const timer = setTimeout(() => this.destroy(late), deadlineMs);
    await Promise.all(this.pools().map((pool) => pool.close()));
    clearTimeout(timer);
    // What is left belongs to no call: an upgraded connection, or one that was still being dialled.
    this.connector.destroy();
  }

  /** Dials nothing from now on: no call is left that could want it. */
  abandon(error: KedgeError): void {
    this.connector.stopDialling(error);
    for (const pool of this.pools()) pool.abandon?.(error);
  }

  destroy(error: Error): void {
    for (const pool of this.pools()) pool.destroy(error);
    this.connector.destroy(error);
  }

  private pools(): WirePool[] {
    return this.http === undefined ? [...this.shared.values()] : [this.http, ...this.shared.values()];
  }
}
