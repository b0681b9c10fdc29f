import type { Generation, WirePool } from '../kedge/generation.ts';
import type { Kedge } from '../kedge/kedge.ts';
import type { ResolvedOptions } from '../options.ts';
import { isKedgeError, KedgeError } from '../support/errors.ts';
import { Session, type SessionOwner, type SessionSettings } from './session.ts';

/** What a pool's sessions amount to; `failed`: none, and nothing is dialled for a moment. */
export type PoolState = 'ready' | 'connecting' | 'idle' | 'failed';

/** How long a session without calls is kept, in ms; the last one for as long as somebody may call. */
const IDLE_MS = 30_000;
const SWEEP_MS = 2_500;
/** How long after a failed dial calls get its error rather than another dial, in ms: callers may retry at once. */
const COOL_MS = 250;
/** How long a kedge may take to connect before calls ask the route's next one as well, in ms (RFC 8305 §5). */
const HEAD_START_MS = 250;

/** The pools of a generation, which have `maxConnections` together. */
const siblingsOf = new WeakMap<Generation, Set<SessionPool>>();

/**
 * The HTTP/2 connections of one generation for RPCs with equal settings, shared by every service behind the kedge. Each
 * call goes to the least loaded one; another opens only when all are full.
 *
 * @remarks Large, for who is chosen, who waits and who is dialled is one decision over all sessions.
 */
export class SessionPool implements WirePool, SessionOwner {
  readonly kedge: Kedge;
  readonly connector: Generation['connector'];
  readonly settings: SessionSettings;
  readonly handshakeTimeoutMs: number;
  streamLimit: number;
  private readonly limits: ResolvedOptions['grpc'];
  private readonly siblings: Set<SessionPool>;
  private readonly sessions = new Set<Session>();
  private readonly listeners = new Set<() => void>();
  private sweeper: NodeJS.Timeout | undefined;
  private cooling: { readonly error: KedgeError; readonly timer: NodeJS.Timeout } | undefined;
  private drained: (() => void) | undefined;
  private users = 0;
  private turnedAway = false;
  private closing = false;

  constructor(kedge: Kedge, settings: SessionSettings, { grpc, connect }: ResolvedOptions) {
    this.kedge = kedge;
    this.connector = kedge.generation.connector;
    this.settings = settings;
    this.limits = grpc;
    this.streamLimit = grpc.maxStreamsPerConnection;
    this.handshakeTimeoutMs = connect.handshakeTimeoutMs;
    const siblings = siblingsOf.get(kedge.generation) ?? new Set<SessionPool>();
    siblingsOf.set(kedge.generation, siblings.add(this));
    this.siblings = siblings;
  }

  get inFlight(): number {
    let sum = 0;
    for (const session of this.sessions) sum += session.load;
    return sum;
  }

  /** Whether it takes no new calls: the kedge has another generation, or is itself given up. */
  get closed(): boolean {
    return this.closing;
  }

  /** Whether nothing is left of it either. */
  get gone(): boolean {
    return this.closing && this.sessions.size === 0;
  }

  get state(): PoolState {
    let isConnecting = false;
    for (const { state } of this.sessions) {
      if (state === 'ready') return 'ready';
      isConnecting ||= state === 'connecting';
    }
    if (isConnecting) return 'connecting';
    return this.cooling === undefined ? 'idle' : 'failed';
  }

  /** The session that a call should take or wait for, or the error of a dial that failed just now. */
  choose(): Session | KedgeError {
    const best = this.best();
    if (best !== undefined && (best.load < this.streamLimit || !this.makeRoom())) return best;
    if (this.cooling === undefined) {
      if (best === undefined) this.makeRoom();
      return this.open();
    }
    if (best !== undefined) return best;
    // Should this call be the breaker's probe, it has its answer.
    if (!this.kedge.breaker.isClosed) this.kedge.breaker.failed();
    return this.cooling.error;
  }

  /** A session with room at once, for a call that waits for one that is being made. */
  ready(): Session | undefined {
    const best = this.best();
    return best?.state === 'ready' && best.load < this.streamLimit ? best : undefined;
  }

  /** Hears of every change after which a waiting call should look again. */
  onChange(listener: () => void): void {
    this.listeners.add(listener);
  }

  offChange(listener: () => void): void {
    this.listeners.delete(listener);
  }

  /** Somebody may call at any time: the last session stays, idle or not. */
  use(): void {
    this.users += 1;
  }

  unuse(): void {
    this.users -= 1;
  }

  limitStreams(limit: number): void {
    // At 0 calls wait for the kedge to allow some again (RFC 9113 §6.5.2).
    this.streamLimit = Math.max(1, Math.min(limit, this.limits.maxStreamsPerConnection));
  }

  async close(): Promise<void> {
    this.stop();
    for (const session of [...this.sessions]) session.drain();
    this.notify();
    if (this.sessions.size === 0) return;
    const { promise, resolve } = Promise.withResolvers<void>();
    this.drained = resolve;
    await promise;
  }

  destroy(error: Error): void {
    this.stop();
    const context = { kedge: this.connector.name, cause: error };
    const reason = isKedgeError(error) ? error : new KedgeError('ERR_KEDGE_CONNECTION', 'ended', context);
    for (const session of [...this.sessions]) session.destroy(reason);
    this.notify();
    this.drained?.();
  }

  /** Others have opened theirs beyond the bound while all were in use. */
  idle(session: Session): void {
    if (this.openSessions > this.limits.maxConnections) session.drain();
  }

  changed(session: Session): void {
    if (session.state === 'ready') this.turnedAway = false;
    if (session.state === 'closed') {
      this.sessions.delete(session);
      if (session.failure !== undefined && !this.closing) this.failed(session);
      if (this.sessions.size === 0) {
        clearInterval(this.sweeper);
        this.sweeper = undefined;
        this.drained?.();
      }
    }
    this.notify();
  }

  private stop(): void {
    this.closing = true;
    this.siblings.delete(this);
    clearTimeout(this.cooling?.timer);
    this.cooling = undefined;
  }

  /** Room first, then a connection that is there, then the least loaded. */
  private best(): Session | undefined {
    let best: Session | undefined;
    let bestRank = Number.POSITIVE_INFINITY;
    for (const session of this.sessions) {
      if (!session.isUsable) continue;
      const { load, state } = session;
      const rank = (load >= this.streamLimit ? 2 ** 40 : 0) + (state === 'ready' ? 0 : 2 ** 30) + load;
      if (rank >= bestRank) continue;
      best = session;
      bestRank = rank;
    }
    return best;
  }

  /** Of all pools of the generation. */
  private get openSessions(): number {
    let open = 0;
    for (const { sessions } of this.siblings) for (const { isUsable } of sessions) if (isUsable) open += 1;
    return open;
  }

  /** Whether another connection may be opened; the one that has been idle longest makes room. */
  private makeRoom(): boolean {
    if (this.openSessions < this.limits.maxConnections) return true;
    let idle: Session | undefined;
    for (const { sessions } of this.siblings) {
      for (const session of sessions) {
        const isIdle = session.isUsable && session.load === 0;
        if (isIdle && (idle === undefined || session.idleSince < idle.idleSince)) idle = session;
      }
    }
    idle?.drain();
    return idle !== undefined;
  }

  private open(): Session {
    const session = new Session(this);
    this.sessions.add(session);
    setTimeout(() => {
      // Told by the timer, not by a clock: Node's timers may be early, and nobody asks a second time.
      session.isFresh = false;
      if (session.state === 'connecting') this.notify();
    }, HEAD_START_MS).unref();
    this.sweeper ??= setInterval(() => this.sweep(), SWEEP_MS).unref();
    return session;
  }

  private sweep(): void {
    const idleSince = performance.now() - IDLE_MS;
    for (const session of this.sessions) {
      const isSpare = this.sessions.size > 1 || this.users === 0;
      if (isSpare && session.load === 0 && session.idleSince <= idleSince) session.drain();
    }
  }

  private failed({ failure, isTurnedAway, isUntold }: Session): void {
    // A kedge that is being replaced has the other one behind its address; one that always does this is a failure.
    const isForgiven = isTurnedAway && !this.turnedAway;
    this.turnedAway ||= isTurnedAway;
    if (isForgiven) return;
    if (isUntold) this.kedge.failed();
    clearTimeout(this.cooling?.timer);
    const timer = setTimeout(() => {
      this.cooling = undefined;
      this.notify();
    }, COOL_MS);
    this.cooling = { error: failure!, timer: timer.unref() };
  }

  private notify(): void {
    for (const listener of [...this.listeners]) listener();
  }
}

/** The pool of a kedge's generation for sessions with these settings. */
export function sessionPool(kedge: Kedge, settings: SessionSettings, options: ResolvedOptions): SessionPool {
  return kedge.generation.pool(settings.key, () => new SessionPool(kedge, settings, options));
}

/** The same, if somebody has opened it. */
export function peekSessionPool(kedge: Kedge, settings: SessionSettings): SessionPool | undefined {
  return kedge.generation.peek(settings.key) as SessionPool | undefined;
}
