import type {
  ClientHttp2Stream,
  ClientSessionRequestOptions,
  IncomingHttpHeaders,
  IncomingHttpStatusHeader,
  OutgoingHttpHeaders,
} from 'node:http2';
import { type Code, ConnectError } from '@connectrpc/connect';
import type { Core } from '../core.ts';
import { debug } from '../debug.ts';
import { isKedgeError, KedgeError } from '../errors.ts';
import { hide } from '../hide.ts';
import { type CallTokens, checkCallHeaders, ownBytes } from '../kedge/call-headers.ts';
import type { Plan, Resolved } from '../mapper/router.ts';
import { rpcCode } from '../rpc-code.ts';
import type { Wire } from '../target.ts';
import { sessionPool } from './pool.ts';
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

  constructor(core: Core, baseUrl: string | URL) {
    const url = typeof baseUrl === 'string' ? URL.parse(baseUrl) : new URL(baseUrl);
    if (url === null) throw new KedgeError('ERR_KEDGE_TARGET', 'map', 'the base URL is not a URL');
    this.core = core;
    this.url = url;
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
      const stream = await this.open(method, path, headers, wait.signal);
      stream.once('close', () => core.end());
      return stream;
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
  ): Promise<ClientHttp2Stream> {
    const { target, plan } = this.resolve(wireOf(headers['content-type']));
    if (plan === undefined) {
      throw new KedgeError('ERR_KEDGE_UNMAPPED', 'map', 'no mapper knows this target', { target: target.authority });
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
    const stream = await this.dial(plan, target.authority, sent, signal);
    const judge = ({
      ':status': status,
      'grpc-status': grpcStatus,
    }: IncomingHttpHeaders & IncomingHttpStatusHeader) => {
      // Who refused is not told apart: both sources may have fresh tokens for the next call.
      if (status !== 401 && status !== 407 && grpcStatus !== '16') return;
      plan.proxyAuth?.invalidate(tokens.proxyAuth);
      plan.backendAuth?.invalidate(tokens.backendAuth);
    };
    stream.once('response', judge);
    stream.once('trailers', judge);
    return stream;
  }

  private resolve(wire: Wire): Resolved {
    const { origin, protocol, hostname, port } = this.url;
    // A URL leaves its own default port out, and gRPC has another.
    const host = `${hostname}:${port || (protocol === 'http:' ? 80 : 443)}`;
    return this.core.resolve(wire, wire === 'grpc' ? host : origin);
  }

  /** The first kedge of the route that can be had; a call that was begun is never sent again. */
  private async dial(
    plan: Plan,
    target: string,
    headers: OutgoingHttpHeaders,
    signal: AbortSignal,
  ): Promise<ClientHttp2Stream> {
    const { kedges, options } = this.core;
    const asked = new Set<number>();
    for (;;) {
      const index = kedges.choose(plan.hops, asked);
      const hop = plan.hops[index]!;
      if (debug.grpc.enabled) debug.grpc('%s%s -> kedge %s', target, headers[':path'], hop.address.name);
      asked.add(index);
      try {
        return await sessionPool(kedges.get(hop), options).stream((session) => session.request(headers), signal);
      } catch (error) {
        signal.throwIfAborted();
        const isLast = asked.size >= Math.min(plan.hops.length, options.failover.attempts);
        // What is not ours was thrown by the connection for this call's own headers.
        if (isLast || !isKedgeError(error)) throw error;
      }
    }
  }
}

async function tokensOf(plan: Plan, signal: AbortSignal): Promise<CallTokens> {
  const [proxyAuth, backendAuth] = await Promise.all([plan.proxyAuth?.wait(signal), plan.backendAuth?.wait(signal)]);
  signal.throwIfAborted();
  return { proxyAuth, backendAuth, overrideAuthorization: plan.overrideAuthorization };
}

/** `application/grpc` and its kinds, but not gRPC-Web, as kedges tell. */
function wireOf(contentType: unknown): Wire {
  return /^application\/grpc(?:[+;]|$)/.test(String(contentType)) ? 'grpc' : 'http';
}

function connectError(error: unknown, target: string): ConnectError {
  if (error instanceof ConnectError) return error;
  const cause = isKedgeError(error)
    ? error.for(target)
    : new KedgeError('ERR_KEDGE_CONNECTION', 'kedge', 'the call failed', { target, cause: error });
  return new ConnectError(cause.message, rpcCode(cause.code) as Code, undefined, undefined, cause);
}
