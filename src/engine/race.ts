import type { Hop } from '../kedge/kedge.ts';
import type { Session } from '../rpc/session.ts';
import type { SessionPool } from '../rpc/session-pool.ts';
import { isKedgeError, type KedgeError } from '../support/errors.ts';
import type { Core } from './core.ts';
import { Endpoints } from './endpoints.ts';
import type { Plan } from './plan.ts';

/** The open pool of a kedge; the wire decides with which settings, and sees to it that a call which waits asks again. */
export type PoolOf = (hop: Hop) => SessionPool;

/** A session that a call waits for. */
interface Place {
  readonly pool: SessionPool;
  readonly session: Session;
}

/**
 * Which kedges of its route one RPC has asked, and which it is waiting for: the first to be ready gets the call. A kedge
 * that is slow to connect keeps no call from the next one (as clients do with addresses, RFC 8305).
 */
export class Race {
  private readonly plan: Plan;
  private readonly poolOf: PoolOf;
  private readonly asked: Endpoints;
  /** By their place in the route; most calls never need it. */
  private waiting: Map<number, Place> | undefined;
  /** Picked, but not opened yet: what a call's credentials are fetched for keeps its room. */
  private picked: Session | undefined;
  private current = -1;
  private lastError: KedgeError | undefined;

  constructor(core: Core, plan: Plan, poolOf: PoolOf) {
    this.plan = plan;
    this.poolOf = poolOf;
    this.asked = new Endpoints(core, plan);
  }

  /** The kedge that it is at, or was last, by its place in the route. */
  get at(): number {
    return this.current;
  }

  /** `host:port` of that one. */
  get kedgeName(): string | undefined {
    return this.plan.hops[this.current]?.address.name;
  }

  /** The pools whose changes it waits for. */
  get pools(): SessionPool[] {
    return [...(this.waiting?.values() ?? [])].map(({ pool }) => pool);
  }

  /**
   * A session to open the call's stream on, `'wait'` until something changes, or why no kedge can be had.
   */
  next(): Session | 'wait' | KedgeError {
    this.opened();
    let isPatient = false;
    if (this.waiting !== undefined) {
      for (const index of [...this.waiting.keys()]) {
        const session = this.askAgain(index);
        if (isKedgeError(session)) continue;
        if (session.state === 'ready') return this.take(index, session);
        isPatient ||= session.isFresh;
      }
    }
    while (!isPatient) {
      const index = this.asked.next();
      if (index === -1) break;
      this.asked.add(index);
      const session = this.ask(index);
      if (isKedgeError(session)) continue;
      if (session.state === 'ready') return this.take(index, session);
      isPatient = session.isFresh;
    }
    if (this.waiting !== undefined && this.waiting.size > 0) return 'wait';
    // Whoever asks again, by its retry policy or because it waits until one is ready, may have any of them.
    this.asked.clear();
    const error = this.lastError;
    this.lastError = undefined;
    // None was left to ask: the dialer has been closed, say. With `asked` empty one is, and that gives a session, a wait or
    // an error, so that this is never done twice.
    return error ?? this.next();
  }

  /** A kedge turned the call away or was lost: another is asked first, if there is one. */
  turnedAway(at: number): void {
    this.asked.add(at);
    if (this.asked.areExhausted) this.asked.clear();
  }

  /** The stream is there, and takes the room itself. */
  opened(): void {
    this.picked?.unpick();
    this.picked = undefined;
  }

  /** The call is over. */
  release(): void {
    this.opened();
    if (this.waiting === undefined) return;
    for (const index of [...this.waiting.keys()]) {
      this.leave(index);
      // It has not failed.
      this.asked.delete(index);
    }
  }

  private askAgain(index: number): Session | KedgeError {
    const { pool, session } = this.waiting!.get(index)!;
    if (session.state === 'connecting') return pool.ready() ?? session;
    if (session.state === 'ready' && session.hasRoom) return session;
    this.leave(index);
    const { failure, isTurnedAway } = session;
    // Rather the next kedge than a full connection to this one. A kedge that said goodbye is asked for one more.
    if (failure !== undefined && !isTurnedAway && !pool.closed && this.asked.most > 1) {
      this.lastError = failure;
      return failure;
    }
    // Others that waited for it have taken all its streams, say.
    return this.ask(index);
  }

  private ask(index: number): Session | KedgeError {
    this.current = index;
    let pool: SessionPool;
    try {
      pool = this.poolOf(this.plan.hops[index]!);
    } catch (error) {
      // It cannot be used at all, without certificate files say; what another said is the better reason.
      this.lastError ??= error as KedgeError;
      return error as KedgeError;
    }
    const session = pool.choose();
    if (isKedgeError(session)) {
      this.lastError = session;
      return session;
    }
    if (session.state === 'ready') return session;
    session.wait();
    this.waiting ??= new Map();
    this.waiting.set(index, { pool, session });
    return session;
  }

  private take(index: number, session: Session): Session {
    session.pick();
    this.release();
    this.asked.delete(index);
    this.picked = session;
    this.current = index;
    return session;
  }

  private leave(index: number): void {
    const { session } = this.waiting!.get(index)!;
    this.waiting!.delete(index);
    session.unwait();
  }
}
