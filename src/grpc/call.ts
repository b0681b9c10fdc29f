import { inspect } from 'node:util';
import {
  type CallCredentials,
  type Deadline,
  type experimental,
  Metadata,
  propagate,
  type StatusObject,
  status,
} from '@grpc/grpc-js';
import type { Core } from '../core.ts';
import { debug } from '../debug.ts';
import { KedgeError } from '../errors.ts';
import type { Plan, Resolved } from '../mapper/router.ts';
import type { Connection, Waiter } from './connection.ts';
import { type CallTokens, ComposedCredentials, checkMetadata, setTokens } from './metadata.ts';
import { type GrpcPool, grpcPool, type SharedOptions } from './pool.ts';
import { type KedgeStatus, statusOf } from './status.ts';

type Call = experimental.CallStream;
type Listener = Parameters<Call['start']>[1];
type MessageContext = Parameters<Call['sendMessageWithContext']>[0];
type AuthContext = ReturnType<Call['getAuthContext']>;
/** The server call that a client call was made in. */
export type ParentCall = {
  on(event: 'cancelled', listener: () => void): unknown;
  removeListener(event: 'cancelled', listener: () => void): unknown;
  getDeadline(): Deadline;
};

/** The arguments of `createCall()`, and what the channel adds. */
export interface CallInit {
  readonly core: Core;
  readonly resolved: Resolved;
  readonly shared: SharedOptions;
  /** From the caller's channel credentials. */
  readonly channelCredentials: CallCredentials | undefined;
  readonly method: string;
  readonly deadline: Deadline;
  readonly host: string | null | undefined;
  readonly parentCall: ParentCall | null;
  readonly propagateFlags: number | null | undefined;
}

const MAX_TIMER_MS = 2 ** 31 - 1;
/** grpc-js's own words for a call whose connection failed; it has no code for them. */
const LOST = /^(?:No connection established|Name resolution failed|Connection dropped|Failed to connect)/;
let lastCallNumber = 0;

/**
 * One call from `createCall()` to its status. Until a connection is there it is held here, so that it can move to the
 * route's next kedge; then every method is passed to grpc-js's own call.
 */
export class KedgeCall implements Call, Listener, Waiter {
  private waitForReady = false;
  private readonly init: CallInit;
  private readonly callNumber: number;
  private plan: Plan | undefined;
  private authority: string;
  private hopIndex = 0;
  /** Kedges that failed this call, by their place in the route. */
  private readonly failedHops = new Set<number>();
  private callerCredentials: CallCredentials | undefined;
  private metadata: Metadata | undefined;
  private listener: Listener | undefined;
  private tokens: CallTokens | undefined;
  private tokenWait: AbortController | undefined;
  private pool: GrpcPool | undefined;
  private connection: Connection | undefined;
  private live: Call | undefined;
  private ended = false;
  private cancelled: StatusObject | undefined;
  // What the caller did while the call was held.
  private messages: [MessageContext, Buffer][] = [];
  private halfClosed = false;
  private reading = false;
  private deadlineTimer: NodeJS.Timeout | undefined;
  private onParentCancelled: (() => void) | undefined;

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
    this.waitForReady = metadata.getOptions().waitForReady ?? false;
    core.begin();
    if (this.cancelled !== undefined) {
      this.end(this.cancelled);
      return;
    }
    try {
      const { plan } = this.route();
      this.plan = plan;
      checkMetadata(metadata, plan.proxyAuth !== undefined);
      const proxyAuth = plan.proxyAuth?.peek();
      const backendAuth = plan.backendAuth?.peek();
      if (
        (plan.proxyAuth !== undefined && proxyAuth === undefined) ||
        (plan.backendAuth !== undefined && backendAuth === undefined)
      ) {
        this.waitForTokens(plan);
        return;
      }
      this.tokens = { proxyAuth, backendAuth, overrideAuthorization: plan.overrideAuthorization };
      this.attempt(core.kedges.choose(plan.hops));
    } catch (error) {
      this.fail(error as Error);
    }
  }

  sendMessageWithContext(context: MessageContext, message: Buffer): void {
    if (this.live !== undefined) this.live.sendMessageWithContext(context, message);
    else if (!this.ended) this.messages.push([context, message]);
  }

  startRead(): void {
    if (this.live !== undefined) this.live.startRead();
    else this.reading = true;
  }

  halfClose(): void {
    if (this.live !== undefined) this.live.halfClose();
    else this.halfClosed = true;
  }

  cancelWithStatus(code: status, details: string): void {
    if (this.live !== undefined) this.live.cancelWithStatus(code, details);
    else if (this.listener === undefined) this.cancelled ??= { code, details, metadata: new Metadata() };
    else this.end({ code, details, metadata: new Metadata() });
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
    if (!this.ended) this.listener!.onReceiveMetadata(metadata);
  }

  onReceiveMessage(message: unknown): void {
    if (!this.ended) this.listener!.onReceiveMessage(message);
  }

  onReceiveStatus(received: StatusObject): void {
    if (this.ended) return;
    this.finish();
    if (debug.grpc.enabled) debug.grpc('%s%s <- %s', this.authority, this.init.method, status[received.code]);
    if (received.code === status.UNAVAILABLE && LOST.test(received.details)) {
      const context = { target: this.authority, kedge: this.kedgeName };
      const cause = new KedgeError('ERR_KEDGE_CONNECTION', 'kedge', received.details, context);
      this.listener!.onReceiveStatus({ ...received, details: cause.message, cause } as KedgeStatus);
      return;
    }
    this.listener!.onReceiveStatus(received);
  }

  // -- the connection's side

  ready(connection: Connection): void {
    if (!this.ended) this.goLive(connection);
  }

  failed(error: KedgeError): boolean {
    if (this.ended) return true;
    const { core } = this.init;
    this.failedHops.add(this.hopIndex);
    const { size } = this.failedHops;
    const next = size < core.options.failover.attempts ? core.kedges.choose(this.plan!.hops, this.failedHops) : -1;
    if (next === -1) {
      if (this.waitForReady) return false;
      this.fail(error);
      return true;
    }
    // Nothing of the call has been sent.
    this.releaseConnection();
    try {
      this.attempt(next);
    } catch (thrown) {
      this.fail(thrown as Error);
    }
    return true;
  }

  /** Ends the call with what went wrong before or outside the backend. */
  readonly fail = (error: Error): void => {
    if (this.ended) return;
    const final = statusOf(error, this.authority);
    if (debug.grpc.enabled) debug.grpc('%s%s <- %s', this.authority, this.init.method, final.details);
    this.live?.cancelWithStatus(status.CANCELLED, 'the connection is gone');
    this.end(final);
  };

  // -- stages

  /** A `host` of the call's own is mapped like any other target, so it cannot carry tokens elsewhere. */
  private route(): { plan: Plan } {
    const { core, host, resolved } = this.init;
    if (core.closed) throw new KedgeError('ERR_KEDGE_CLOSED', 'map', 'the dialer is closed');
    const own = host === undefined || host === null || host === this.authority ? resolved : core.resolve('grpc', host);
    this.authority = own.target.authority;
    if (own.plan !== undefined) return { plan: own.plan };
    throw new KedgeError('ERR_KEDGE_UNMAPPED', 'map', 'the host of a call through a kedge is a kedge destination');
  }

  private waitForTokens(plan: Plan): void {
    const { core } = this.init;
    this.tokenWait = new AbortController();
    const { signal } = this.tokenWait;
    core.waiting.add(this);
    this.hold();
    Promise.all([plan.proxyAuth?.wait(signal), plan.backendAuth?.wait(signal)])
      .then(([proxyAuth, backendAuth]) => {
        if (this.ended) return;
        core.waiting.delete(this);
        this.tokenWait = undefined;
        this.tokens = { proxyAuth, backendAuth, overrideAuthorization: plan.overrideAuthorization };
        this.attempt(core.kedges.choose(plan.hops));
      })
      .catch(this.fail);
  }

  private attempt(index: number): void {
    const { core, shared } = this.init;
    this.hopIndex = index;
    const hop = this.plan!.hops[index]!;
    if (!hop.address.secure && this.callerCredentials !== undefined) {
      const reason = 'call credentials are not sent to a kedge over plain http';
      throw new KedgeError('ERR_KEDGE_REQUEST', 'request', reason, { kedge: hop.address.name });
    }
    if (debug.grpc.enabled) debug.grpc('%s%s -> kedge %s', this.authority, this.init.method, hop.address.name);
    this.pool = grpcPool(core.kedges.get(hop).generation, core.options);
    this.connection = this.pool.acquire(shared, this.fail);
    if (this.connection.state === 'ready') {
      this.goLive(this.connection);
      return;
    }
    this.hold();
    this.connection.wait(this);
  }

  /** Deadline and parent, which grpc-js sees to as soon as the call is its own. */
  private hold(): void {
    if (this.deadlineTimer !== undefined || this.onParentCancelled !== undefined) return;
    const { parentCall, propagateFlags } = this.init;
    const flags = propagateFlags ?? propagate.DEFAULTS;
    let deadline = Number(this.init.deadline);
    if (parentCall !== null) {
      if ((flags & propagate.DEADLINE) !== 0) deadline = Math.min(deadline, Number(parentCall.getDeadline()));
      if ((flags & propagate.CANCELLATION) !== 0) {
        this.onParentCancelled = () => this.cancelWithStatus(status.CANCELLED, 'Cancelled by parent call');
        parentCall.on('cancelled', this.onParentCancelled);
      }
    }
    const left = deadline - Date.now();
    if (left > MAX_TIMER_MS) return;
    const exceeded = () => {
      const where =
        this.kedgeName === undefined ? 'waiting for a token' : `waiting for a connection to kedge ${this.kedgeName}`;
      this.cancelWithStatus(status.DEADLINE_EXCEEDED, `Deadline exceeded while ${where}`);
    };
    this.deadlineTimer = setTimeout(exceeded, Math.max(left, 0));
  }

  private letGo(): void {
    clearTimeout(this.deadlineTimer);
    this.deadlineTimer = undefined;
    if (this.onParentCancelled !== undefined) this.init.parentCall!.removeListener('cancelled', this.onParentCancelled);
    this.onParentCancelled = undefined;
  }

  private goLive(connection: Connection): void {
    this.letGo();
    const { method, deadline, parentCall, propagateFlags } = this.init;
    const call = connection.channel.createCall(method, deadline, this.authority, parentCall as never, propagateFlags);
    const metadata = this.metadata!.clone();
    const tokens = this.tokens!;
    if (this.callerCredentials === undefined) {
      setTokens(metadata, tokens);
    } else {
      // The backend's token waits for what the caller's credentials give: theirs wins.
      if (tokens.overrideAuthorization && tokens.backendAuth !== undefined) metadata.remove('authorization');
      setTokens(metadata, { ...tokens, backendAuth: undefined });
      const hasOwn = metadata.get('authorization').length > 0;
      call.setCredentials(new ComposedCredentials(this.callerCredentials, tokens, hasOwn));
    }
    this.live = call;
    call.start(metadata, this);
    if (this.reading) call.startRead();
    for (const [context, message] of this.messages) call.sendMessageWithContext(context, message);
    this.messages = [];
    if (this.halfClosed) call.halfClose();
  }

  private get kedgeName(): string | undefined {
    return this.pool === undefined ? undefined : this.plan?.hops[this.hopIndex]?.address.name;
  }

  private releaseConnection(): void {
    if (this.connection === undefined) return;
    this.connection.forget(this);
    this.pool!.release(this.init.shared, this.connection, this.fail);
    this.connection = undefined;
  }

  private end(final: StatusObject): void {
    if (this.ended) return;
    this.tokenWait?.abort(new KedgeError('ERR_KEDGE_CLOSED', 'token', 'the call is over'));
    this.finish();
    // As grpc-js does: never from within start() or cancel().
    process.nextTick(() => this.listener!.onReceiveStatus(final));
  }

  private finish(): void {
    this.ended = true;
    this.messages = [];
    this.letGo();
    this.releaseConnection();
    this.init.core.waiting.delete(this);
    this.init.core.end();
  }
}
