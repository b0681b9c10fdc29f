import type { ClientHttp2Stream, ClientSessionRequestOptions, OutgoingHttpHeaders } from 'node:http2';
import type { Core } from '../engine/core.ts';
import type { Plan } from '../engine/plan.ts';
import type { Hop } from '../kedge/kedge.ts';
import { type SessionSettings, sessionSettings } from '../rpc/session.ts';
import { type SessionPool, sessionPool } from '../rpc/session-pool.ts';
import { KedgeError } from '../support/errors.ts';
import { hide } from '../support/redact.ts';
import type { Target, Wire } from '../target.ts';
import { ConnectCall } from './call.ts';
import { connectError } from './call-stream.ts';

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
    const { target, plan } = this.resolve(wireOf(headers['content-type']));
    return new ConnectCall(this.core, target.authority, plan, this.poolOf).open(method, path, headers, signal);
  }

  /** Keep-alive is the pool's business. */
  notifyResponseByteRead(): void {}

  private resolve(wire: Wire): { readonly target: Target; readonly plan: Plan } {
    const { origin, protocol, hostname, port, host } = this.url;
    try {
      // A URL leaves its own default port out, and gRPC has another.
      const address = `${hostname}:${port || (protocol === 'http:' ? 80 : 443)}`;
      const { target, plan } = this.core.resolve(wire, wire === 'grpc' ? address : origin);
      if (plan !== undefined) return { target, plan };
      throw new KedgeError('ERR_KEDGE_UNMAPPED', 'no mapper knows this target', { target: target.authority });
    } catch (error) {
      throw connectError(error, host);
    }
  }

  /** Its transport may call at any time: the last session of a pool stays open for it. */
  private readonly poolOf = (hop: Hop): SessionPool => {
    const { kedges, options } = this.core;
    const pool = sessionPool(kedges.get(hop), this.settings, options);
    if (!this.pools.has(pool)) {
      this.pools.add(pool);
      pool.use();
    }
    return pool;
  };
}

/** `application/grpc` and its kinds, but not gRPC-Web, as kedges tell. */
function wireOf(contentType: unknown): Wire {
  return /^application\/grpc(?:[+;]|$)/.test(String(contentType)) ? 'grpc' : 'http';
}
