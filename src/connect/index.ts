import '../support/refuse-old-node.ts';

import type { Dialer } from '../dialer.ts';
import { coreOf } from '../engine/core.ts';
import { type ConnectSessionManager, KedgeSessionManager } from './session-manager.ts';

export type { ConnectSessionManager };

/** connect-es through a dialer's kedges. */
export interface ConnectDialer {
  /**
   * The `sessionManager` of a transport of `@connectrpc/connect-node` with the same `baseUrl`:
   *
   * ```ts
   * const baseUrl = 'http://greeter.shop.svc.us1.prod.clusters.local:9090';
   * createGrpcTransport({ baseUrl, sessionManager: connectDialer(dialer).sessionManager(baseUrl) });
   * ```
   *
   * Calls of the gRPC protocol take the routes of the gRPC wire, those of Connect and gRPC-Web the ones of HTTP, as a
   * kedge tells them apart. A loop over a server's messages that is left early leaves its stream open, for connect-es hides
   * that from its transport (`handleStreamResponse()` of its `promise-client.ts`): abort the call's `signal` as well. A target that no mapper knows fails with `ERR_KEDGE_UNMAPPED`: leave the option out for it.
   *
   * @throws `KedgeError` `ERR_KEDGE_TARGET`, `ERR_KEDGE_ROUTE`, `ERR_KEDGE_CLOSED`
   */
  sessionManager(baseUrl: string | URL): ConnectSessionManager;
}

/**
 * Dials the calls of connect-es 2 through the kedges of `dialer`, sharing its routes, identity, tokens and life: there is
 * nothing to close. Limits are those of the `grpc` options.
 *
 * @example
 * ```ts
 * import { createGrpcTransport } from '@connectrpc/connect-node';
 * import { createDialer, single } from 'kedge-dialer';
 * import { connectDialer } from 'kedge-dialer/connect';
 *
 * const dialer = createDialer({ mapper: single('https://us1.kedge.example.com') });
 * const baseUrl = 'http://greeter.us1.example:9090';
 * const transport = createGrpcTransport({ baseUrl, sessionManager: connectDialer(dialer).sessionManager(baseUrl) });
 * ```
 *
 * @throws `KedgeError` `ERR_KEDGE_OPTIONS` when `dialer` did not come from `createDialer()`
 */
export function connectDialer(dialer: Dialer): ConnectDialer {
  const core = coreOf(dialer);
  return Object.freeze({ sessionManager: (baseUrl: string | URL) => new KedgeSessionManager(core, baseUrl) });
}
