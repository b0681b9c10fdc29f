import { constants } from 'node:http2';
import { type CallCredentials, type experimental, Metadata, type StatusObject, status } from '@grpc/grpc-js';
import { Call } from '../engine/calls.ts';
import type { Tokens } from '../engine/credentials.ts';
import type { Plan } from '../engine/plan.ts';
import { Race } from '../engine/race.ts';
import { reportedBy } from '../kedge-error-report.ts';
import { ownBytes } from '../rpc/call-headers.ts';
import type { Session } from '../rpc/session.ts';
import { debug } from '../support/debug.ts';
import { isKedgeError, KedgeError } from '../support/errors.ts';
import type { CallContext, CallInit } from './call-context.ts';
import { RouteCredentials } from './call-credentials.ts';
import { checkMetadata, setTokens } from './metadata.ts';
import { Outgoing } from './outgoing.ts';
import { markedOptions, type PickingCall } from './policy.ts';
import { type KedgeStatus, statusOf } from './status.ts';
import { StreamCall, type StreamEnd, type StreamListener, type StreamStatus } from './stream-call.ts';

type GrpcCall = experimental.CallStream;
type Listener = Parameters<GrpcCall['start']>[1];
type MessageContext = Parameters<GrpcCall['sendMessageWithContext']>[0];

/**
 * One call from `createCall()` to its status. grpc-js's own call does what calls do; this decides where it goes, adds what
 * the route adds, and says what the dialer knows of a failure.
 *
 * @remarks Large, for it keeps two contracts of grpc-js, that of a call and that of the listener of one: half its
 * methods.
 */
export class KedgeCall extends Call implements GrpcCall, Listener, PickingCall {
  readonly context: CallContext;
  metadata = new Metadata();
  private readonly init: CallInit;
  private credentials: CallCredentials | undefined;
  private authority: string;
  private plan: Plan | undefined;
  private race: Race | undefined;
  /** From `start()` on: before that grpc-js's would end, by its deadline, with nobody to tell. */
  private live: GrpcCall | undefined;
  private outgoing: Outgoing | undefined;
  private listener: Listener | undefined;
  /** How the caller ended it before anybody listened; interceptors may start a call long after it was made. */
  private cancelled: StatusObject | undefined;
  private tokens: Tokens | undefined;
  private fetching: Promise<Tokens> | undefined;
  /** Of its stream. */
  private session: Session | undefined;
  /** Hedging opens several. */
  private streams = 0;
  /** What a kedge or gateway says in the headers in the backend's place. */
  private reported: KedgeError | undefined;
  /** Why attempts failed, by the metadata of the statuses that say so. */
  private failures: WeakMap<Metadata, Pick<KedgeStatus, 'details' | 'cause'>> | undefined;

  constructor(context: CallContext, init: CallInit) {
    super(context.core);
    this.context = context;
    this.init = init;
    this.authority = init.authority;
    this.credentials = init.credentials;
  }

  get label(): string {
    return `${this.authority}${this.init.method}`;
  }

  // -- the caller's side

  start(metadata: Metadata, listener: Listener): void {
    const { context, init } = this;
    this.listener = listener;
    this.begin();
    if (this.cancelled !== undefined) {
      this.end(this.cancelled);
      return;
    }
    try {
      const { target, plan } = context.route(init.host);
      this.authority = target.authority;
      this.plan = plan!;
      this.race = new Race(context.core, plan!, context.poolOf);
      this.live = context.createLive(init, target.authority);
      this.outgoing = new Outgoing(this.live);
      this.metadata = this.prepare(metadata, plan!);
    } catch (error) {
      this.fail(error as Error);
      return;
    }
    this.pend();
    this.live.start(this.metadata, this);
  }

  sendMessageWithContext(context: MessageContext, message: Buffer): void {
    if (this.isOver) process.nextTick(() => context.callback?.());
    else this.outgoing!.send(context, message);
  }

  startRead(): void {
    if (!this.isOver) this.live!.startRead();
  }

  halfClose(): void {
    if (!this.isOver) this.outgoing!.end();
  }

  cancelWithStatus(code: status, details: string): void {
    if (this.live !== undefined) this.live.cancelWithStatus(code, details);
    else this.cancelled ??= { code, details, metadata: new Metadata() };
  }

  /** grpc-js's clients call this with the credentials of the call; the route's tokens and the channel's stay. */
  setCredentials(credentials: CallCredentials): void {
    this.credentials = this.init.credentials?.compose(credentials) ?? credentials;
  }

  getPeer(): string {
    return this.session?.peer ?? this.authority;
  }

  getCallNumber(): number {
    return this.live?.getCallNumber() ?? 0;
  }

  getAuthContext(): ReturnType<GrpcCall['getAuthContext']> {
    return this.live?.getAuthContext() ?? null;
  }

  // -- grpc-js's side

  onReceiveMetadata(metadata: Metadata): void {
    // Of what is no gRPC answer there will be a status by its HTTP code, without the headers.
    this.reported = reportedBy(metadata, { target: this.authority, kedge: this.race!.kedgeName });
    if (!this.isOver) this.listener!.onReceiveMetadata(metadata);
  }

  onReceiveMessage(message: unknown): void {
    if (!this.isOver) this.listener!.onReceiveMessage(message);
  }

  onReceiveStatus(received: StatusObject): void {
    if (this.isOver) return;
    const final = this.explained(received);
    this.finish();
    if (debug.grpc.enabled) debug.grpc('%s <- %s', this.label, status[received.code]);
    // Whoever refused them, the sources may have fresh ones for the next call; this one may have been acted upon.
    if (received.code === status.UNAUTHENTICATED && this.tokens !== undefined) {
      this.plan!.credentials.refused(this.tokens, 'unknown');
    }
    this.listener!.onReceiveStatus(final);
  }

  // -- the policy's side

  pick(): Session | 'over' | 'wait' | StatusObject {
    if (this.isOver) return 'over';
    const picked = this.race!.next();
    // Until it has a stream: its credentials may take their time, too.
    if (this.streams === 0) this.pend();
    if (isKedgeError(picked)) return this.none(picked);
    if (picked === 'wait') return picked;
    if (this.credentials === undefined || picked.isSecure) return picked;
    const reason = 'call credentials are not sent to a kedge over plain http';
    this.fail(new KedgeError('ERR_KEDGE_REQUEST', reason, { kedge: this.race!.kedgeName }));
    return 'over';
  }

  open(
    session: Session,
    metadata: Metadata,
    authority: string,
    listener: StreamListener,
    callNumber: number,
  ): StreamCall {
    const { context } = this;
    const { method } = this.init;
    const { at, kedgeName } = this.race!;
    if (debug.grpc.enabled) debug.grpc('%s -> kedge %s', this.label, kedgeName);
    const headers = metadata.toHttp2Headers();
    headers[':authority'] = authority;
    headers[':method'] = 'POST';
    headers[':path'] = method;
    headers['user-agent'] = context.userAgent;
    headers['content-type'] = 'application/grpc';
    headers['te'] = 'trailers';
    try {
      const stream = session.open(headers);
      this.race!.opened();
      this.placed();
      this.session = session;
      this.streams += 1;
      const onEnd = (end: StreamEnd | undefined, final: StreamStatus) => this.ended(end, final, session, at);
      return new StreamCall(stream, session, context.maxMessageBytes, callNumber, listener, onEnd);
    } catch (error) {
      // grpc-js makes another attempt at once, and would for ever if it were for these headers.
      if (session.isUsable) this.fail(error as Error);
      throw error;
    }
  }

  // -- the credentials' side

  /** The route's tokens, of which one was not at hand at the start. */
  tokensOf(): Promise<Tokens> {
    // Hedged attempts have one wait.
    this.fetching ??= this.tokens === undefined ? this.fetchTokens() : Promise.resolve(this.tokens);
    return this.fetching;
  }

  ownBytes(tokens: Tokens): number {
    return ownBytes(this.authority, this.init.method, tokens);
  }

  /** Ends the call with what went wrong before or outside the backend. */
  readonly fail = (error: Error, code?: status): void => {
    if (this.isOver) return;
    const final = statusOf(error, this.authority, code);
    if (debug.grpc.enabled) debug.grpc('%s <- %s', this.label, final.details);
    this.end(final);
    this.live?.cancelWithStatus(status.CANCELLED, 'the call is over');
  };

  /** What is sent, with the tokens that are at hand. */
  private prepare(metadata: Metadata, plan: Plan): Metadata {
    const { credentials } = plan;
    const tokens = credentials.peek();
    checkMetadata(metadata, credentials.bringsProxyAuth, tokens === undefined ? 0 : this.ownBytes(tokens));
    const sent = metadata.clone();
    sent.setOptions(markedOptions(metadata, this));
    if (credentials.replacesOwn) sent.remove('authorization');
    this.tokens = tokens;
    if (tokens !== undefined && this.credentials === undefined) setTokens(sent, tokens);
    else this.live!.setCredentials(new RouteCredentials(this.credentials, this));
    return sent;
  }

  private async fetchTokens(): Promise<Tokens> {
    this.tokens = await this.waitForTokens(this.plan!.credentials);
    return this.tokens;
  }

  /** No kedge can be had: grpc-js fails the call, tries again by the caller's policy, or has it wait. */
  private none(error: KedgeError): 'over' | StatusObject {
    const isPatient = this.metadata.getOptions().waitForReady === true && error.code !== 'ERR_KEDGE_CLOSED';
    const final = statusOf(error, this.authority);
    if (isPatient) {
      this.context.lookAgain();
    } else if (final.code !== status.UNAVAILABLE || error.code === 'ERR_KEDGE_CLOSED') {
      // Which grpc-js would not pass on as it is, for it did not come from the backend; or would try again for nothing.
      this.fail(error);
      return 'over';
    }
    this.failed(final.metadata, final.details, final.cause);
    return final;
  }

  /** A stream is over; without a status of the backend's the call may have another one. */
  private ended(end: StreamEnd | undefined, final: StreamStatus, session: Session, at: number): void {
    this.streams -= 1;
    if (this.isOver) return;
    // Without a stream only the dialer ends it: between two attempts of its retry policy, too.
    if (this.streams === 0) this.pend();
    if (end === undefined) return;
    const kedge = this.plan!.endpoints[at]!.address.name;
    if (end === 'reset') {
      const cause = this.causeOfReset(final, session, kedge);
      // Its text stays grpc-js's, for it says the code.
      if (cause !== undefined) this.failed(final.metadata, final.details, cause);
      return;
    }
    const cause = session.why?.for(this.authority, kedge) ?? this.lost(final.details, kedge);
    this.failed(final.metadata, cause.message, cause);
    // There is nobody to try again for, nor to wait for whatever else it waits for.
    if (cause.code === 'ERR_KEDGE_CLOSED') this.fail(cause);
    if (this.isOver) return;
    this.race!.turnedAway(at);
    if (this.streams === 0) this.session = undefined;
  }

  /** A kedge passes on that the backend cancelled, which is not for us to explain. */
  private causeOfReset(final: StreamStatus, session: Session, kedge: string): KedgeError | undefined {
    if (session.hasErred) return session.why?.for(this.authority, kedge);
    return final.rstCode === constants.NGHTTP2_CANCEL ? undefined : this.lost(final.details, kedge);
  }

  private lost(reason: string, kedge: string): KedgeError {
    return new KedgeError('ERR_KEDGE_CONNECTION', reason, { target: this.authority, kedge });
  }

  private failed(metadata: Metadata, details: string, cause: KedgeError): void {
    this.failures ??= new WeakMap();
    this.failures.set(metadata, { details, cause });
  }

  /** What grpc-js says, with what we know. */
  private explained(received: StatusObject): StatusObject {
    if (received.code === status.OK) return received;
    const { kedgeName } = this.race!;
    const reported = this.reported ?? reportedBy(received.metadata, { target: this.authority, kedge: kedgeName });
    if (reported !== undefined) return { ...received, cause: reported } as KedgeStatus;
    const failure = this.failures?.get(received.metadata);
    if (failure !== undefined) return { ...received, ...failure };
    const isSent = this.session !== undefined || kedgeName === undefined;
    if (received.code !== status.DEADLINE_EXCEEDED || isSent) return received;
    const where = this.isWaitingForTokens ? 'waiting for a token' : `waiting for a connection to kedge ${kedgeName}`;
    return { ...received, details: `Deadline exceeded while ${where}` };
  }

  private end(final: StatusObject): void {
    this.finish();
    // As grpc-js does: never from within start() or cancel().
    process.nextTick(() => this.listener!.onReceiveStatus(final));
  }

  private finish(): void {
    this.race?.release();
    this.outgoing?.drop();
    this.over(this.isWaitingForTokens ? new KedgeError('ERR_KEDGE_CLOSED', 'the call is over') : undefined);
  }
}
