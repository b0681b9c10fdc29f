import { AsyncLocalStorage } from 'node:async_hooks';
import type { Socket } from 'node:net';
import type { TLSSocket } from 'node:tls';
import { Connector, type DialObserver, type DialTimeouts } from '../dial/connector.ts';
import { Addresses } from '../dial/dns-cache.ts';
import type { KedgeAddress } from '../dial/kedge-address.ts';
import { type PeerPolicy, peerKey } from '../dial/peer.ts';
import type { AnyIdentity, AnySnapshot, IdentitySnapshot } from '../identity/identity.ts';
import { abandon } from '../support/abandon.ts';
import { debug } from '../support/debug.ts';
import { isKedgeError, KedgeError } from '../support/errors.ts';
import { after, at } from '../support/timer.ts';
import { Breaker, type BreakerOptions } from './breaker.ts';
import type { ExpiryWarnings } from './expiry.ts';
import { Generation } from './generation.ts';

/** One kedge of a route, with all that decides which connections may serve it. */
export interface Endpoint {
  /** Equal for endpoints that may share connections. */
  readonly key: string;
  readonly address: KedgeAddress;
  readonly identity: AnyIdentity | undefined;
  readonly peer: PeerPolicy;
}

/** What the dialer decides for all its kedges. */
export interface KedgeOptions {
  readonly timeouts: DialTimeouts;
  /** Infinity: for ever. */
  readonly maxConnectionAgeMs: number;
  /** Undefined: what the name servers say. */
  readonly dnsTtlMs: number | undefined;
  readonly breaker: BreakerOptions;
  readonly drainTimeoutMs: number;
  readonly onWarning: (warning: Error) => void;
  readonly expiry: ExpiryWarnings;
}

/** One kedge in {@link DialerStats}. */
export interface KedgeStats {
  /** `host:port`. */
  kedge: string;
  /** The certificate that new connections carry. */
  identity: Pick<IdentitySnapshot, 'subject' | 'serial' | 'notBefore' | 'notAfter'> | undefined;
  /** Grows with each rotation, from 1. */
  generation: number;
  /** Open connections, those of draining generations included. */
  connections: number;
  /** Calls under way. */
  inFlight: number;
  /** Completed TLS handshakes, and how many of those resumed an earlier session. */
  handshakes: number;
  resumed: number;
  /** Dials that failed. */
  failures: number;
  /** `open` while calls with another kedge avoid this one, `half-open` while one of them tries it. */
  breaker: 'closed' | 'open' | 'half-open';
}

const ids = new WeakMap<object, number>();
let lastId = 0;

/**
 * What connections may be shared by: the kedge, the name it proves, the identity shown to it and the policy that it is
 * held to. Never the target.
 */
export function endpoint(address: KedgeAddress, identity: AnyIdentity | undefined, peer: PeerPolicy): Endpoint {
  const key = [address.origin, address.verifyName, idOf(identity), peerKey(peer)].join(' ');
  return Object.freeze({ key, address, identity, peer });
}

function idOf(value: object | undefined): number {
  if (value === undefined) return 0;
  let id = ids.get(value);
  if (id === undefined) {
    lastId += 1;
    id = lastId;
    ids.set(value, id);
  }
  return id;
}

/**
 * One kedge as we know it: the generation that takes calls, and those that finish theirs.
 *
 * @remarks Large, for the reasons to replace a generation (identity, age, addresses, expiry) are weighed against each
 * other here.
 */
export class Kedge implements DialObserver {
  readonly address: KedgeAddress;
  readonly breaker: Breaker;
  private readonly endpoint: Endpoint;
  private readonly addresses: Addresses;
  /** Ends the watch over the live generation's certificate. */
  private stopExpiry: (() => void) | undefined;
  /** Whether that had expired when it was opened: nothing watches for its end, and who calls asks for another. */
  private hasExpired = false;
  private stopAge: (() => void) | undefined;
  private readonly options: KedgeOptions;
  private readonly counters = { handshakes: 0, resumed: 0, failures: 0 };
  private readonly draining = new Map<Generation, Promise<void>>();
  private readonly unsubscribe: (() => void) | undefined;
  private generations = 0;
  private live: Generation;
  private closing = false;
  /** Whoever brings the news of another certificate may do so from within a call. */
  private readonly inOwnContext = AsyncLocalStorage.snapshot();
  /** What {@link renew} was given last: it may be of no use. */
  private renewed: AnySnapshot | undefined;

  /** @throws {@link KedgeError} `ERR_KEDGE_IDENTITY` when the identity cannot be used for TLS */
  constructor(of: Endpoint, options: KedgeOptions) {
    this.endpoint = of;
    this.address = of.address;
    this.options = options;
    this.breaker = new Breaker(options.breaker);
    this.addresses = new Addresses((options.timeouts.proxy ?? of.address).hostname, options.dnsTtlMs, () =>
      this.followAddresses(),
    );
    this.live = this.open();
    this.unsubscribe = of.identity?.subscribe(() => this.inOwnContext(() => this.rotate()));
  }

  /** The generation that new calls use. */
  get generation(): Generation {
    if (this.hasExpired) this.renew();
    return this.live;
  }

  /** Whether it was given up, with the dialer or for other kedges. */
  get closed(): boolean {
    return this.closing;
  }

  /** Whether a call that has another kedge may try this one. */
  admit(): boolean {
    if (this.breaker.isClosed) return true;
    // A dial that is under way will tell; a second one to a kedge that may be dead would tell no more.
    return this.live.connector.dialling === 0 && this.breaker.admit();
  }

  stats(): KedgeStats {
    let connections = 0;
    let inFlight = 0;
    for (const generation of [this.live, ...this.draining.keys()]) {
      connections += generation.connector.sockets.size;
      inFlight += generation.inFlight;
    }
    return {
      kedge: this.address.name,
      identity: factsOf(this.live.identity),
      generation: this.live.id,
      connections,
      inFlight,
      ...this.counters,
      breaker: this.breaker.name,
    };
  }

  /** Takes no new calls; resolves when every generation is closed. */
  async drain(): Promise<void> {
    if (!this.closing) {
      this.stop();
      this.retire(this.live);
    }
    await Promise.all(this.draining.values());
  }

  /** Dials nothing from now on, when no call is left that could want it. */
  stopDialling(error: KedgeError): void {
    for (const generation of [this.live, ...this.draining.keys()]) generation.abandon(error);
  }

  destroy(error: Error): void {
    this.stop();
    for (const generation of [this.live, ...this.draining.keys()]) generation.destroy(error);
  }

  dialled(socket: Socket | TLSSocket): void {
    // It had expired by a clock that was wrong.
    if (this.hasExpired) this.watchExpiry(this.live.identity);
    if (!('isSessionReused' in socket)) return;
    this.counters.handshakes += 1;
    if (socket.isSessionReused()) this.counters.resumed += 1;
  }

  succeeded(): void {
    this.breaker.succeeded();
  }

  failed(): void {
    this.counters.failures += 1;
    this.breaker.failed();
  }

  private stop(): void {
    this.closing = true;
    this.addresses.close();
    this.stopAge?.();
    this.stopExpiry?.();
    try {
      this.unsubscribe?.();
    } catch (cause) {
      this.options.onWarning(new Error('kedge-dialer: an identity failed to unsubscribe', { cause }));
    }
  }

  /** A kedge that moved: connections to where it was are replaced, whether that still answers or not. */
  private followAddresses(): void {
    const connected = [...this.live.connector.sockets].map(({ remoteAddress }) => remoteAddress);
    if (connected.some((address) => !this.addresses.has(address))) this.rotate();
  }

  /** New calls meet a new generation from here on; the old one finishes its own. */
  private rotate(): void {
    if (this.closing) return;
    const old = this.live;
    try {
      this.live = this.open();
    } catch (error) {
      // The old identity still works, and failing every call would help nobody.
      this.options.onWarning(
        isKedgeError(error) ? error : new Error('kedge-dialer: rotation failed', { cause: error }),
      );
      this.age();
      return;
    }
    debug.identity('%s: generation %d replaces %d', this.address.name, this.live.id, old.id);
    this.retire(old);
  }

  private open(last?: AnySnapshot): Generation {
    const { address, identity, peer } = this.endpoint;
    const snapshot = last ?? (identity === undefined ? undefined : this.snapshot(identity));
    this.generations += 1;
    const connector = new Connector(address, snapshot, peer, this.addresses, this.options.timeouts, this);
    this.age();
    this.watchExpiry(snapshot);
    return new Generation(this.generations, snapshot, connector);
  }

  /** No connection outlives its certificate: from its end on, dials fail with a typed error, and so do the calls left. */
  private watchExpiry(snapshot: AnySnapshot | undefined): void {
    const stopLast = this.stopExpiry;
    this.stopExpiry = undefined;
    this.hasExpired = false;
    if (snapshot?.notAfter !== undefined) {
      this.hasExpired = snapshot.notAfter.getTime() <= Date.now();
      const stopWarning = this.options.expiry.watch(snapshot);
      const stopTimer = this.hasExpired ? () => {} : at(snapshot.notAfter, () => this.expire());
      this.stopExpiry = () => {
        stopWarning();
        stopTimer();
      };
    }
    // Not before: the same certificate stays watched, and is not warned of again.
    stopLast?.();
  }

  /** Where the identity has no other certificate, what follows has the same one: its dials say that it has expired. */
  private expire(): void {
    const old = this.live;
    this.rotate();
    if (this.live !== old || this.closing) return;
    this.live = this.open(old.identity);
    old.destroy(this.expired());
  }

  /** Not every identity tells that it has a certificate again, such as one whose file is only read when it is asked. */
  private renew(): void {
    const { identity } = this.endpoint;
    if (this.closing || identity === undefined) return;
    let next: AnySnapshot;
    try {
      next = this.snapshot(identity);
    } catch {
      return;
    }
    const isValid = next.notAfter === undefined || next.notAfter.getTime() > Date.now();
    if (!isValid || next === this.live.identity || next === this.renewed) return;
    this.renewed = next;
    this.inOwnContext(() => this.rotate());
  }

  private expired(): KedgeError {
    const context = { kedge: this.address.name, stage: 'kedge' } as const;
    return new KedgeError('ERR_KEDGE_IDENTITY_EXPIRED', 'the client certificate of the connection expired', context);
  }

  /** With jitter, so that many pods do not reconnect together. */
  private age(): void {
    this.stopAge?.();
    const { maxConnectionAgeMs } = this.options;
    if (maxConnectionAgeMs === Number.POSITIVE_INFINITY) return;
    const grown = () => {
      if (this.live.connector.sockets.size > 0) this.rotate();
      else this.age();
    };
    this.stopAge = after(maxConnectionAgeMs * (0.9 + Math.random() / 5), grown);
  }

  private snapshot(identity: AnyIdentity): AnySnapshot {
    try {
      const snapshot = identity.current();
      // Such as a promise, whose rejection nobody else would hear.
      abandon(snapshot);
      if (onlyTrusts(snapshot)) return snapshot;
      for (const date of [snapshot.notBefore, snapshot.notAfter]) {
        if (!(date instanceof Date)) throw new TypeError('`notBefore` and `notAfter` are Dates');
      }
      return snapshot;
    } catch (cause) {
      if (isKedgeError(cause)) throw cause;
      const context = { kedge: this.address.name, stage: 'tls', cause } as const;
      throw new KedgeError('ERR_KEDGE_IDENTITY', 'the identity has no certificate', context);
    }
  }

  /** The calls of an old generation have until the drain deadline, and never longer than their certificate. */
  private retire(generation: Generation): void {
    const { drainTimeoutMs } = this.options;
    const context = { kedge: this.address.name, stage: 'kedge' } as const;
    // Stage `kedge`, both: they may meet calls that the kedge has seen, and no such call may be taken for a failed dial.
    const late = new KedgeError(
      'ERR_KEDGE_CONNECTION',
      `the call was still running ${drainTimeoutMs} ms after its connection began to drain`,
      context,
    );
    const { identity } = generation;
    const stop = identity?.notAfter && at(identity.notAfter, () => generation.destroy(this.expired()));
    const drained = generation.drain(drainTimeoutMs, late).finally(() => {
      stop?.();
      this.draining.delete(generation);
    });
    this.draining.set(generation, drained);
  }
}

/** CAs, and nothing of a certificate. */
function onlyTrusts({ ca, cert, key, pfx, notBefore, notAfter }: AnySnapshot): boolean {
  return ca !== undefined && [cert, key, pfx, notBefore, notAfter].every((part) => part === undefined);
}

function factsOf(snapshot: AnySnapshot | undefined): KedgeStats['identity'] {
  if (snapshot?.notAfter === undefined) return undefined;
  const { subject, serial, notBefore, notAfter } = snapshot;
  return { subject, serial, notBefore, notAfter };
}
