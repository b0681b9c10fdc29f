import { inspect } from 'node:util';
import { type CallCredentials, type experimental, Metadata, type StatusObject, status } from '@grpc/grpc-js';
import type { Core } from '../core.ts';
import { debug } from '../debug.ts';
import { isKedgeError, KedgeError } from '../errors.ts';
import type { Plan, Resolved } from '../mapper/router.ts';
import { reportedBy } from '../reported.ts';
import { RouteTokens } from './call-tokens.ts';
import type { Connection, Waiter } from './connection.ts';
import { type CallBounds, Hold } from './hold.ts';
import type { MethodConfig } from './method-config.ts';
import { Outbox } from './outbox.ts';
import { type GrpcPool, grpcPool, type SharedOptions } from './pool.ts';
import {
  isLost,
  isUnsent,
  type KedgeStatus,
  lostStatus,
  maySpeakOfSession,
  previousAttempts,
  statusOf,
} from './status.ts';

type Call = experimental.CallStream;
type Listener = Parameters<Call['start']>[1];
type MessageContext = Parameters<Call['sendMessageWithContext']>[0];
type AuthContext = ReturnType<Call['getAuthContext']>;
/** The arguments of `createCall()`, and what the channel adds. */
export interface CallInit extends CallBounds {
  readonly core: Core;
  readonly resolved: Resolved;
  readonly shared: SharedOptions;
  /** Without grpc-js's retries: for what is left of a retry policy that another kedge has begun to use up. */
  readonly sharedOnce: SharedOptions;
  /** From the caller's channel credentials. */
  readonly channelCredentials: CallCredentials | undefined;
  readonly method: string;
  readonly config: MethodConfig;
  /** The calls of the channel that are held; it ends them when it is closed. */
  readonly held: Set<KedgeCall>;
  readonly host: string | null | undefined;
}

/** A connection that a call has a place on. */
interface Place {
  readonly hopIndex: number;
  readonly pool: GrpcPool;
  readonly shared: SharedOptions;
  readonly connection: Connection;
  /** Its streams are newer, see {@link Processed}. */
  mark: number;
}

/** How long a kedge may take to connect before the call asks the route's next one as well, in ms (RFC 8305 §5). */
const HEAD_START_MS = 250;
/** How long a call with `waitForReady` rests when every kedge of its route has failed it, in ms. */
const REST_MS = 300;
let lastCallNumber = 0;

/**
 * One call from `createCall()` to its status. Until a connection is there it is held here, so that it can move to the
 * route's next kedge; then every method is passed to grpc-js's own call.
 */
export class KedgeCall implements Call, Listener, Waiter {
  private readonly init: CallInit;
  private readonly callNumber: number;
  private plan: Plan | undefined;
  private authority: string;
  /** The kedge it is at, or was last. */
  private hopIndex = -1;
  /** The kedges of the route that were tried, once there was reason to try another. */
  private askedHops: Set<number> | undefined;
  private callerCredentials: CallCredentials | undefined;
  private metadata: Metadata | undefined;
  private listener: Listener | undefined;
  private deadline = Number.POSITIVE_INFINITY;
  private tokens: RouteTokens | undefined;
  private tokenWait: AbortController | undefined;
  /** Several while kedges are connecting; the first to be ready gets the call. */
  private places: Place[] = [];
  private headStart: NodeJS.Timeout | undefined;
  private live: Call | undefined;
  private ended = false;
  /** The backend's headers are here, and what a kedge or gateway says in them in the backend's place. */
  private answered = false;
  private reported: KedgeError | undefined;
  /** How often it may have been executed, on kedges that it left. */
  private executions = 0;
  /** How the caller ended it before anybody listened, or on grpc-js's call. */
  private cancelled: StatusObject | undefined;
  private readonly outbox = new Outbox();
  private held: Hold | undefined;
  private rest: NodeJS.Timeout | undefined;

  constructor(init: CallInit) {
    this.init = init;
    this.callerCredentials = init.channelCredentials;
    this.authority = init.resolved.target.authority;
    lastCallNumber += 1;
    this.callNumber = lastCallNumber;
  }

  /** Its headers hold tokens: whoever prints it sees where it goes. */
  [inspect.custom](): string {
    return `KedgeCall(${this.authority}${this.init.method})`;
  }

  toJSON(): string {
    return this[inspect.custom]();
  }

  /** Before `start()`: the call ends with this as soon as somebody listens. */
  refuse(error: KedgeError): void {
    this.cancelled = statusOf(error, this.authority);
  }

  // -- the caller's side

  start(metadata: Metadata, listener: Listener): void {
    const { core } = this.init;
    this.metadata = metadata;
    this.listener = listener;
    core.begin();
    if (this.cancelled !== undefined) {
      this.end(this.cancelled);
      return;
    }
    try {
      const { config, deadline, method } = this.init;
      this.deadline = Math.min(Number(deadline), Date.now() + config.timeoutMs);
      const plan = this.route();
      this.plan = plan;
      if (plan.hops.length > 1) this.outbox.keepUpTo(core.options.failover.replayBytes);
      this.tokens = new RouteTokens(plan, this.authority, method);
      this.tokens.check(metadata);
    } catch (error) {
      this.fail(error as Error);
      return;
    }
    if (this.tokens.areThere) this.attempt();
    else this.waitForTokens(this.tokens);
  }

  sendMessageWithContext(context: MessageContext, message: Buffer): void {
    if (!this.ended) this.outbox.send(context, message);
  }

  startRead(): void {
    this.outbox.startRead();
  }

  halfClose(): void {
    this.outbox.halfClose();
  }

  cancelWithStatus(code: status, details: string): void {
    const given = { code, details, metadata: new Metadata() };
    if (this.live === undefined) {
      this.end(given);
    } else {
      this.cancelled = given;
      this.live.cancelWithStatus(code, details);
    }
  }

  /** grpc-js's clients call this with the credentials of the call; the route's tokens and the channel's stay. */
  setCredentials(credentials: CallCredentials): void {
    this.callerCredentials = this.init.channelCredentials?.compose(credentials) ?? credentials;
  }

  getPeer(): string {
    return this.live?.getPeer() ?? this.authority;
  }

  getCallNumber(): number {
    return this.callNumber;
  }

  getAuthContext(): AuthContext {
    return this.live?.getAuthContext() ?? null;
  }

  // -- grpc-js's side

  onReceiveMetadata(metadata: Metadata): void {
    this.outbox.commit();
    this.places[0]?.pool.answered();
    this.answered = true;
    // Of what is no gRPC answer grpc-js makes a status by its HTTP code, and forgets the headers.
    this.reported = reportedBy(metadata, { target: this.authority, kedge: this.kedgeName });
    if (!this.ended) this.listener!.onReceiveMetadata(metadata);
  }

  onReceiveMessage(message: unknown): void {
    if (!this.ended) this.listener!.onReceiveMessage(message);
  }

  onReceiveStatus(received: StatusObject): void {
    if (this.ended) return;
    if (this.mayMove(received) && this.moveOnFrom()) return;
    const final = this.explain(received);
    this.finish();
    if (debug.grpc.enabled) debug.grpc('%s%s <- %s', this.authority, this.init.method, status[received.code]);
    if (received.code === status.UNAUTHENTICATED) this.tokens!.invalidate();
    this.listener!.onReceiveStatus(final);
  }

  // -- the connection's side

  ready(connection: Connection): void {
    if (this.ended) return;
    const place = this.places.find((each) => each.connection === connection)!;
    for (const other of this.places) if (other !== place) this.leave(other);
    this.places = [place];
    try {
      this.goLive(place);
    } catch (error) {
      // Others wait for the same connection.
      this.fail(error as Error);
    }
  }

  failed(connection: Connection, error: KedgeError): void {
    if (this.ended) return;
    const index = this.places.findIndex((each) => each.connection === connection);
    const [place] = this.places.splice(index, 1);
    this.leave(place!);
    this.moveOn(error);
  }

  /** Ends the call with what went wrong before or outside the backend. */
  readonly fail = (error: Error, code?: status): void => {
    if (this.ended) return;
    const final = statusOf(error, this.authority, code);
    if (debug.grpc.enabled) debug.grpc('%s%s <- %s', this.authority, this.init.method, final.details);
    this.live?.cancelWithStatus(status.CANCELLED, 'the connection is gone');
    this.end(final);
  };

  // -- stages

  /** A `host` of the call's own is mapped like any other target, so it cannot carry tokens elsewhere. */
  private route(): Plan {
    const { core, host, resolved } = this.init;
    if (core.closed) throw new KedgeError('ERR_KEDGE_CLOSED', 'map', 'the dialer is closed');
    const own = host === undefined || host === null || host === this.authority ? resolved : core.resolve('grpc', host);
    this.authority = own.target.authority;
    if (own.plan !== undefined) return own.plan;
    throw new KedgeError('ERR_KEDGE_UNMAPPED', 'map', 'the host of a call through a kedge is a kedge destination');
  }

  private waitForTokens(tokens: RouteTokens): void {
    this.tokenWait = new AbortController();
    this.init.core.waiting.add(this);
    this.hold();
    tokens
      .wait(this.tokenWait.signal)
      .then(() => {
        if (this.ended) return;
        this.tokenWait = undefined;
        tokens.check(this.metadata!);
        this.attempt();
      })
      .catch(this.fail);
  }

  private attempt(next?: number): void {
    const { core, method } = this.init;
    core.waiting.delete(this);
    let place: Place;
    try {
      const hopIndex = next ?? core.kedges.choose(this.plan!.hops);
      this.hopIndex = hopIndex;
      const hop = this.plan!.hops[hopIndex]!;
      if (!hop.address.secure && this.callerCredentials !== undefined) {
        const reason = 'call credentials are not sent to a kedge over plain http';
        throw new KedgeError('ERR_KEDGE_REQUEST', 'request', reason, { kedge: hop.address.name });
      }
      if (debug.grpc.enabled) debug.grpc('%s%s -> kedge %s', this.authority, method, hop.address.name);
      const pool = grpcPool(core.kedges.get(hop), core.options);
      const shared = this.executions === 0 ? this.init.shared : this.init.sharedOnce;
      const connection = pool.acquire(shared, this.fail);
      if (isKedgeError(connection)) {
        this.moveOn(connection);
        return;
      }
      place = { hopIndex, pool, shared, connection, mark: 0 };
    } catch (error) {
      // Certificate files may come yet, as a kedge may.
      if (isKedgeError(error) && error.code === 'ERR_KEDGE_IDENTITY') this.restOrFail(error);
      else this.fail(error as Error);
      return;
    }
    this.places.push(place);
    const { connection } = place;
    if (connection.state === 'ready') {
      this.ready(connection);
      return;
    }
    this.hold();
    connection.wait(this);
    if (this.plan!.hops.length > 1) this.giveHeadStart(connection);
  }

  /** A kedge that is slow to connect keeps no call from the next one (as clients do with addresses, RFC 8305). */
  private giveHeadStart(connection: Connection): void {
    clearTimeout(this.headStart);
    const left = HEAD_START_MS - (performance.now() - connection.since);
    const askNext = () => {
      const next = this.nextHop();
      if (next !== -1) this.attempt(next);
    };
    if (left <= 0) askNext();
    else this.headStart = setTimeout(askNext, left);
  }

  /** After a failure: nothing of the call has been sent. */
  private moveOn(error: KedgeError): void {
    const next = this.nextHop();
    if (next !== -1) this.attempt(next);
    else this.restOrFail(error);
  }

  private restOrFail(error: KedgeError): void {
    if (this.places.length > 0) return;
    if (this.metadata!.getOptions().waitForReady) {
      this.askedHops = undefined;
      this.hold();
      this.init.core.waiting.add(this);
      this.rest = setTimeout(() => this.attempt(), REST_MS);
    } else this.fail(error);
  }

  /** -1 also where a kedge cannot be made any more: the call has a better reason to end than that. */
  private nextHop(): number {
    const { kedges, options } = this.init.core;
    this.askedHops ??= new Set();
    this.askedHops.add(this.hopIndex);
    if (this.askedHops.size >= options.failover.attempts) return -1;
    try {
      return kedges.choose(this.plan!.hops, this.askedHops);
    } catch {
      return -1;
    }
  }

  /**
   * Whether another kedge may be asked: nothing of the answer has come, and the call cannot have run, or may run again by
   * the caller's own retry policy. What grpc-js did of that within this kedge counts.
   */
  private mayMove(received: StatusObject): boolean {
    if (!this.outbox.isKept || this.cancelled !== undefined) return false;
    const { config } = this.init;
    const previous = previousAttempts(received);
    const unsent = isUnsent(received) || (previous === 0 && this.isUnprocessed(received));
    if (!unsent && !(config.retriesUnavailable && isLost(received))) return false;
    const executions = this.executions + previous + (unsent ? 0 : 1);
    if (executions > 0 && executions >= config.maxAttempts) return false;
    this.executions = executions;
    return true;
  }

  private isUnprocessed(received: StatusObject): boolean {
    const [place] = this.places;
    return place !== undefined && maySpeakOfSession(received) && place.connection.processed.noneAfter(place.mark);
  }

  private moveOnFrom(): boolean {
    const next = this.nextHop();
    if (next === -1) return false;
    this.live = undefined;
    this.outbox.disconnect();
    for (const place of this.places.splice(0)) this.leave(place);
    this.hold();
    this.attempt(next);
    return true;
  }

  private hold(): void {
    const { deadline } = this;
    const { held, parentCall, propagateFlags } = this.init;
    held.add(this);
    this.held ??= new Hold(
      { deadline, parentCall, propagateFlags },
      () => {
        const where =
          this.kedgeName === undefined ? 'waiting for a token' : `waiting for a connection to kedge ${this.kedgeName}`;
        this.cancelWithStatus(status.DEADLINE_EXCEEDED, `Deadline exceeded while ${where}`);
      },
      () => this.cancelWithStatus(status.CANCELLED, 'Cancelled by parent call'),
    );
  }

  private letGo(): void {
    clearTimeout(this.headStart);
    this.init.held.delete(this);
    this.held?.release();
    this.held = undefined;
  }

  private goLive(place: Place): void {
    this.letGo();
    const { connection } = place;
    this.hopIndex = place.hopIndex;
    place.mark = connection.processed.mark;
    const { method, parentCall, propagateFlags } = this.init;
    const call = connection.createCall(method, this.deadline, this.authority, parentCall, propagateFlags);
    const metadata = this.metadata!.clone();
    this.tokens!.give(call, metadata, this.callerCredentials, this.fail);
    this.live = call;
    call.start(metadata, this);
    this.outbox.connect(call);
  }

  /** What grpc-js received, with its cause where that is the connection, or the kedge in the backend's place. */
  private explain(received: StatusObject): StatusObject {
    const { authority: target, kedgeName: kedge } = this;
    if (received.code === status.OK) return received;
    const cause = this.reported ?? reportedBy(received.metadata, { target, kedge });
    if (cause !== undefined) return { ...received, cause } as KedgeStatus;
    // A backend may well say "Connection dropped" after its headers; then the connection is still there.
    if (this.answered && this.places[0]?.connection.state === 'ready') return received;
    return lostStatus(received, target, kedge);
  }

  private get kedgeName(): string | undefined {
    return this.plan?.hops[this.hopIndex]?.address.name;
  }

  private leave({ pool, shared, connection }: Place): void {
    connection.forget(this);
    pool.release(shared, connection, this.fail);
  }

  private end(final: StatusObject): void {
    if (this.ended) return;
    if (this.listener === undefined) {
      // Interceptors may start a call long after it was made.
      this.cancelled ??= final;
      return;
    }
    this.tokenWait?.abort(new KedgeError('ERR_KEDGE_CLOSED', 'token', 'the call is over'));
    this.finish();
    // As grpc-js does: never from within start() or cancel().
    process.nextTick(() => this.listener!.onReceiveStatus(final));
  }

  private finish(): void {
    this.ended = true;
    this.outbox.close();
    this.letGo();
    clearTimeout(this.rest);
    for (const place of this.places) this.leave(place);
    this.init.core.waiting.delete(this);
    this.init.core.end();
  }
}
