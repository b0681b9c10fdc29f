import {
  type ClientHttp2Stream,
  constants,
  type IncomingHttpHeaders,
  type IncomingHttpStatusHeader,
  type OutgoingHttpHeaders,
} from 'node:http2';
import { Code, ConnectError } from '@connectrpc/connect';
import { Call } from '../engine/calls.ts';
import type { Core } from '../engine/core.ts';
import { keepsOwn, type Tokens } from '../engine/credentials.ts';
import type { Plan } from '../engine/plan.ts';
import { type PoolOf, Race } from '../engine/race.ts';
import { checkCallHeaders, ownBytes } from '../rpc/call-headers.ts';
import type { Session } from '../rpc/session.ts';
import type { SessionPool } from '../rpc/session-pool.ts';
import { debug } from '../support/debug.ts';
import { isKedgeError } from '../support/errors.ts';
import { after } from '../support/timer.ts';
import { connectError, watchCall } from './call-stream.ts';

/** Milliseconds of the units of `grpc-timeout` (gRPC over HTTP2, "Requests"). */
const UNITS: Readonly<Record<string, number>> = { H: 3_600_000, M: 60_000, S: 1000, m: 1, u: 0.001, n: 0.000_001 };

/**
 * One call from `request()` to the end of its stream. Until it has one, its caller, its own timeout and the end of the dialer
 * end it: transports give such a call up by themselves, and here it learns not to be sent any more.
 */
export class ConnectCall extends Call {
  readonly label: string;
  private readonly target: string;
  private readonly plan: Plan;
  private readonly poolOf: PoolOf;
  private stream: ClientHttp2Stream | undefined;
  private failure: { readonly error: unknown } | undefined;

  constructor(core: Core, target: string, plan: Plan, poolOf: PoolOf) {
    super(core);
    this.label = target;
    this.target = target;
    this.plan = plan;
    this.poolOf = poolOf;
  }

  /** Until its caller has the stream. */
  fail(error: unknown): void {
    if (this.stream === undefined) {
      this.over(error);
      return;
    }
    this.failure ??= { error };
    // Whose end is the call's.
    this.stream.close(constants.NGHTTP2_CANCEL);
  }

  /** Its stream; rejects with a `ConnectError`. */
  async open(
    method: string,
    path: string,
    own: OutgoingHttpHeaders,
    caller: AbortSignal | undefined,
  ): Promise<ClientHttp2Stream> {
    this.begin();
    this.pend();
    const stopWatching = this.watch(own, caller);
    try {
      const stream = await this.opened(method, path, own);
      if (this.failure !== undefined) throw this.failure.error;
      return stream;
    } catch (error) {
      this.over(error);
      throw connectError(error, this.target);
    } finally {
      stopWatching();
      this.placed();
    }
  }

  /** Ends it with what its caller says, or when its time is up; returns the way to stop that. */
  private watch(own: OutgoingHttpHeaders, caller: AbortSignal | undefined): () => void {
    const abort = () =>
      this.fail(new ConnectError('the call was aborted', Code.Canceled, undefined, undefined, caller?.reason));
    const late = () => this.fail(new ConnectError('the operation timed out', Code.DeadlineExceeded));
    const timeoutMs = timeoutOf(own);
    const stopTimer = timeoutMs === undefined ? undefined : after(timeoutMs, late);
    if (caller?.aborted) abort();
    else caller?.addEventListener('abort', abort);
    return () => {
      caller?.removeEventListener('abort', abort);
      stopTimer?.();
    };
  }

  /** On the first kedge of the route that can be had; a call that was begun is never sent again. */
  private async opened(method: string, path: string, own: OutgoingHttpHeaders): Promise<ClientHttp2Stream> {
    const { target, plan } = this;
    const { credentials } = plan;
    const tokens = credentials.peek() ?? (await this.waitForTokens(credentials));
    checkCallHeaders(own, credentials.bringsProxyAuth, ownBytes(target, path, tokens));
    const headers = {
      ...own,
      ':method': method,
      ':path': path,
      ':scheme': 'https',
      ':authority': target,
      ...tokenHeaders(own, tokens),
    };
    const race = new Race(this.core, plan, this.poolOf);
    try {
      for (;;) {
        this.signal.throwIfAborted();
        const session = race.next();
        if (isKedgeError(session)) throw session;
        if (session === 'wait') await changeOf(race.pools, this.signal);
        else {
          const stream = openOn(session, headers);
          if (stream !== undefined) return this.follow(stream, session, race.kedgeName, own, tokens);
        }
      }
    } finally {
      race.release();
    }
  }

  /** In the tick that it was opened in: whatever ends the stream may do so before its caller has it. */
  private follow(
    stream: ClientHttp2Stream,
    session: Session,
    kedge: string | undefined,
    own: OutgoingHttpHeaders,
    tokens: Tokens,
  ): ClientHttp2Stream {
    const { target, plan } = this;
    if (debug.grpc.enabled) debug.grpc('%s%s -> kedge %s', target, stream.sentHeaders[':path'], kedge);
    this.stream = stream;
    // Which must not end the process.
    stream.on('error', () => {});
    const judge = (answer: IncomingHttpHeaders & IncomingHttpStatusHeader) => {
      const { ':status': status, 'grpc-status': grpcStatus } = answer;
      // The next call may have fresh ones.
      if (status === 401 || status === 407 || grpcStatus === '16') plan.credentials.refused(tokens, 'unknown');
    };
    stream.once('response', judge);
    stream.once('trailers', judge);
    watchCall({ stream, session, target, kedge, contentType: own['content-type'] }, () => {
      session.ended(stream);
      this.over();
    });
    return stream;
  }
}

function timeoutOf(headers: OutgoingHttpHeaders): number | undefined {
  const connect = Number(headers['connect-timeout-ms']);
  if (connect > 0) return connect;
  const [, digits, unit] = /^(\d{1,8})([HMSmun])$/.exec(String(headers['grpc-timeout'])) ?? [];
  return digits === undefined ? undefined : Number(digits) * UNITS[unit!]!;
}

function tokenHeaders(own: OutgoingHttpHeaders, tokens: Tokens): OutgoingHttpHeaders {
  const added: OutgoingHttpHeaders = {};
  if (tokens.proxyAuth !== undefined) added['proxy-authorization'] = tokens.proxyAuth;
  const isOwn = own['authorization'] !== undefined && keepsOwn(tokens);
  if (tokens.backendAuth !== undefined && !isOwn) added['authorization'] = tokens.backendAuth;
  return added;
}

/** Resolves when something changes in one of the pools, or when `signal` aborts. */
async function changeOf(pools: readonly SessionPool[], signal: AbortSignal): Promise<void> {
  const { promise, resolve } = Promise.withResolvers<void>();
  const wake = () => resolve();
  for (const pool of pools) pool.onChange(wake);
  signal.addEventListener('abort', wake);
  await promise;
  signal.removeEventListener('abort', wake);
  for (const pool of pools) pool.offChange(wake);
}

/** Undefined where the session has begun to close. */
function openOn(session: Session, headers: OutgoingHttpHeaders): ClientHttp2Stream | undefined {
  try {
    return session.open(headers);
  } catch (error) {
    // Otherwise it was thrown for this call's own headers.
    if (session.isUsable) throw error;
    return undefined;
  }
}
