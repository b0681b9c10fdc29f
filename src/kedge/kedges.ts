import { AsyncLocalStorage } from 'node:async_hooks';
import { LRUCache } from 'lru-cache';
import { debug } from '../support/debug.ts';
import { KedgeError } from '../support/errors.ts';
import { type Endpoint, Kedge, type KedgeOptions, type KedgeStats } from './kedge.ts';

/**
 * The kedges in use, at most `maxKedges` of them. The one that was used least recently makes room; it drains and is
 * never cut, and comes back as a new one if it is asked for again.
 */
export class Kedges {
  private readonly options: KedgeOptions;
  private readonly live: LRUCache<string, Kedge>;
  private readonly leaving = new Set<Kedge>();
  private pastHandshakes = 0;
  /** Most calls go where the last one went: this spares them the LRU. */
  private lastKey: string | undefined;
  private last: Kedge | undefined;
  private closed: KedgeError | undefined;
  /** What lives as long as a kedge must not run in the async context of the call that came first, or keep it. */
  private readonly inOwnContext = AsyncLocalStorage.snapshot();

  constructor(maxKedges: number, options: KedgeOptions) {
    this.options = options;
    this.live = new LRUCache({ max: maxKedges, dispose: (kedge) => this.leave(kedge) });
  }

  /** @throws {@link KedgeError} `ERR_KEDGE_IDENTITY`, and `ERR_KEDGE_CLOSED` from the end of the dialer on */
  get(endpoint: Endpoint): Kedge {
    if (endpoint.key === this.lastKey) return this.last!;
    let kedge = this.live.get(endpoint.key);
    if (kedge === undefined) {
      if (this.closed !== undefined) throw this.closed;
      kedge = this.inOwnContext(() => new Kedge(endpoint, this.options));
      this.live.set(endpoint.key, kedge);
    }
    this.lastKey = endpoint.key;
    this.last = kedge;
    return kedge;
  }

  /** The kedge of a {@link Endpoint.key}, if it is in use. */
  find(key: string): Kedge | undefined {
    return this.live.peek(key);
  }

  /**
   * The kedge that a call tries next: the first in the route's order that has not failed it and that can be expected to
   * answer; when that is none of them, the first that has not failed it (a dead kedge may be back). -1 after the last.
   * No kedge is opened for the question.
   */
  choose(endpoints: readonly Endpoint[], failed?: ReadonlySet<number>): number {
    if (failed !== undefined && this.closed !== undefined) return -1;
    if (endpoints.length === 1) return failed?.has(0) ? -1 : 0;
    let untried = -1;
    for (const [i, { key }] of endpoints.entries()) {
      if (failed?.has(i)) continue;
      if (untried === -1) untried = i;
      const kedge = key === this.lastKey ? this.last : this.live.get(key);
      if (kedge === undefined || kedge.admit()) return i;
    }
    return untried;
  }

  /** What {@link choose} would say, for who may not dial and so must not take the turn of a call that would find out. */
  likely(endpoints: readonly Endpoint[]): number {
    const index = endpoints.findIndex(({ key }) => this.find(key)?.breaker.isClosed !== false);
    return index === -1 ? 0 : index;
  }

  stats(): KedgeStats[] {
    return [...this.live.values(), ...this.leaving].map((kedge) => kedge.stats());
  }

  /** TLS handshakes since the start, with kedges that are gone. */
  get handshakes(): number {
    return this.stats().reduce((sum, kedge) => sum + kedge.handshakes, this.pastHandshakes);
  }

  /** When all calls are over: a dial that they left behind, or a look-up that cannot be cancelled, is not waited for. */
  async close(): Promise<void> {
    this.closed ??= new KedgeError('ERR_KEDGE_CLOSED', 'the dialer is closed');
    this.live.clear();
    for (const kedge of this.leaving) kedge.stopDialling(this.closed);
    await Promise.all([...this.leaving].map((kedge) => kedge.drain()));
  }

  destroy(error: Error): void {
    this.closed = new KedgeError('ERR_KEDGE_CLOSED', 'the dialer was destroyed', { cause: error });
    this.live.clear();
    for (const kedge of this.leaving) kedge.destroy(error);
  }

  private leave(kedge: Kedge): void {
    if (kedge === this.last) this.lastKey = undefined;
    debug.dial('%s: draining', kedge.address.name);
    this.leaving.add(kedge);
    kedge.drain().finally(() => {
      this.leaving.delete(kedge);
      this.pastHandshakes += kedge.stats().handshakes;
    });
  }
}
