import type {
  ClientHttp2Stream,
  ClientSessionRequestOptions,
  IncomingHttpHeaders,
  IncomingHttpStatusHeader,
  OutgoingHttpHeaders,
} from 'node:http2';
import type { Core } from '../core.ts';
import { type CallTokens, checkCallHeaders, ownBytes } from '../kedge/call-headers.ts';
import type { Plan, Resolved } from '../mapper/router.ts';
import { Attempts } from '../rpc/attempts.ts';
import { type Session, type SessionSettings, sessionSettings } from '../rpc/session.ts';
import { type SessionPool, sessionPool } from '../rpc/session-pool.ts';
import { debug } from '../support/debug.ts';
import { isKedgeError, KedgeError } from '../support/errors.ts';
import { hide } from '../support/redact.ts';
import type { Wire } from '../target.ts';
import { connectError, type OpenCall, watchCall } from './call-stream.ts';
import { Wait } from './wait.ts';

/** The part of connect-node's session manager that its transports use. */
export interface ConnectSessionManager {
  /** The origin of the transport's `baseUrl`. */
  authority: string;
  /**
   * Opens the stream of one call. Of the options `signal` counts: a call that still waits for a token or a connection when it
   * aborts is not sent. Rejects with a `ConnectError` whose `cause` is a `KedgeError`.
   */
  request(
    method: string,
    path: string,
    headers: OutgoingHttpHeaders,
    options?: ClientSessionRequestOptions,
  ): Promise<ClientHttp2Stream>;
  notifyResponseByteRead(stream: ClientHttp2Stream): void;
}

/** Opens the streams of one transport on shared connections to the kedges of its route. */
export class KedgeSessionManager implements ConnectSessionManager {
  readonly authority: string;
  private readonly core: Core;
  private readonly url: URL;
  private readonly settings: SessionSettings;
  private readonly pools = new WeakSet<SessionPool>();

  constructor(core: Core, baseUrl: string | URL) {
    const url = typeof baseUrl === 'string' || baseUrl instanceof URL ? URL.parse(String(baseUrl)) : null;
    if (url === null) throw new KedgeError('ERR_KEDGE_TARGET', 'the base URL is not a URL');
    this.core = core;
    this.url = url;
    this.settings = sessionSettings({ ...core.options.grpc, keepaliveWithoutCalls: false });
    // What a transport compares its own base URL with.
    this.authority = url.origin;
    hide(this, `KedgeSessionManager(${url.host})`);
    core.resolve('http', url);
  }

  async request(
    method: string,
    path: string,
    headers: OutgoingHttpHeaders,
    { signal }: ClientSessionRequestOptions = {},
  ): Promise<ClientHttp2Stream> {
    const { core } = this;
    core.begin();
    const wait = new Wait(core, headers, signal);
    try {
      const call = await this.open(method, path, headers, wait.signal);
      watchCall(call, () => {
        call.session.ended(call.stream);
        core.end();
      });
      return call.stream;
    } catch (error) {
      core.end();
      throw connectError(error, this.url.host);
    } finally {
      wait.end();
    }
  }

  /** Keep-alive is the pool's business. */
  notifyResponseByteRead(): void {}

  private async open(
    method: string,
    path: string,
    headers: OutgoingHttpHeaders,
    signal: AbortSignal,
  ): Promise<OpenCall> {
    const { target, plan } = this.resolve(wireOf(headers['content-type']));
    if (plan === undefined) {
      throw new KedgeError('ERR_KEDGE_UNMAPPED', 'no mapper knows this target', { target: target.authority });
    }
    const tokens = await tokensOf(plan, signal);
    checkCallHeaders(headers, plan.proxyAuth !== undefined, ownBytes(target.authority, path, tokens));
    const sent: OutgoingHttpHeaders = {
      ...headers,
      ':method': method,
      ':path': path,
      ':scheme': 'https',
      ':authority': target.authority,
    };
    if (tokens.proxyAuth !== undefined) sent['proxy-authorization'] = tokens.proxyAuth;
    const keepsOwn = headers['authorization'] !== undefined && !tokens.overrideAuthorization;
    if (tokens.backendAuth !== undefined && !keepsOwn) sent['authorization'] = tokens.backendAuth;
    const call = await this.dial(plan, target.authority, sent, signal);
    const judge = (answer: IncomingHttpHeaders & IncomingHttpStatusHeader) => {
      const { ':status': status, 'grpc-status': grpcStatus } = answer;
      // Who refused is not told apart: both sources may have fresh tokens for the next call.
      if (status !== 401 && status !== 407 && grpcStatus !== '16') return;
      plan.proxyAuth?.invalidate(tokens.proxyAuth);
      plan.backendAuth?.invalidate(tokens.backendAuth);
    };
    call.stream.once('response', judge);
    call.stream.once('trailers', judge);
    return call;
  }

  private resolve(wire: Wire): Resolved {
    const { origin, protocol, hostname, port } = this.url;
    // A URL leaves its own default port out, and gRPC has another.
    const host = `${hostname}:${port || (protocol === 'http:' ? 80 : 443)}`;
    return this.core.resolve(wire, wire === 'grpc' ? host : origin);
  }

  /** The first kedge of the route that can be had; a call that was begun is never sent again. */
  private async dial(plan: Plan, target: string, headers: OutgoingHttpHeaders, signal: AbortSignal): Promise<OpenCall> {
    const { core } = this;
    const attempts = new Attempts(core, plan, (hop) => {
      return this.join(sessionPool(core.kedges.get(hop), this.settings, core.options));
    });
    try {
      for (;;) {
        const session = attempts.next();
        if (isKedgeError(session)) throw session;
        if (session === 'wait') {
          await changeOf(attempts.pools, signal);
          continue;
        }
        const stream = openOn(session, headers);
        if (stream === undefined) continue;
        const { kedgeName: kedge } = attempts;
        if (debug.grpc.enabled) debug.grpc('%s%s -> kedge %s', target, headers[':path'], kedge);
        // What ends it before its caller has it must not end the process.
        stream.on('error', () => {});
        return { stream, session, target, kedge, contentType: headers['content-type'] };
      }
    } finally {
      attempts.release();
    }
  }

  /** Its transport may call at any time: the last session of a pool stays open for it. */
  private join(pool: SessionPool): SessionPool {
    if (!this.pools.has(pool)) {
      this.pools.add(pool);
      pool.use();
    }
    return pool;
  }
}

async function tokensOf(plan: Plan, signal: AbortSignal): Promise<CallTokens> {
  const [proxyAuth, backendAuth] = await Promise.all([plan.proxyAuth?.wait(signal), plan.backendAuth?.wait(signal)]);
  signal.throwIfAborted();
  return { proxyAuth, backendAuth, overrideAuthorization: plan.overrideAuthorization };
}

/** Resolves when something changes in one of the pools; rejects with the reason of `signal`. */
async function changeOf(pools: readonly SessionPool[], signal: AbortSignal): Promise<void> {
  signal.throwIfAborted();
  const { promise, resolve } = Promise.withResolvers<void>();
  const wake = () => resolve();
  for (const pool of pools) pool.onChange(wake);
  signal.addEventListener('abort', wake);
  await promise;
  signal.removeEventListener('abort', wake);
  for (const pool of pools) pool.offChange(wake);
  signal.throwIfAborted();
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

/** `application/grpc` and its kinds, but not gRPC-Web, as kedges tell. */
function wireOf(contentType: unknown): Wire {
  return /^application\/grpc(?:[+;]|$)/.test(String(contentType)) ? 'grpc' : 'http';
}
