import { KedgeError } from '../support/errors.ts';
import type { Target } from '../target.ts';
import { pieces, type ReplayBody } from './body.ts';
import type { FlatHeaders } from './headers.ts';
import type { Dispatcher } from './undici.ts';

/** What callers dispatch. undici knows more fields than its types name. */
export interface DispatchOptions extends Dispatcher.DispatchOptions {
  /** False where the caller cannot take HTTP/2, as `WebSocket` says. */
  allowH2?: boolean;
}

/** What a pool is given: built field by field, because callers leak fields that pools refuse. */
export type PoolRequest = Dispatcher.DispatchOptions & { servername: string };

/**
 * undici takes the TLS server name from each request and closes the connection when it changes, so it is the same for
 * all. What is really sent and verified is the connector's business.
 */
const SERVERNAME = 'kedge';

/** Visible characters only: what follows a space or a control character would be read as something else. */
const PATH = /^\/[\x21-\x7e\x80-\xff]*$/;

/** @throws {@link KedgeError} `ERR_KEDGE_REQUEST` */
export function checkPath(options: DispatchOptions, target: Target): void {
  if (PATH.test(options.path) || options.method === 'CONNECT') return;
  const reason = 'the path starts with a slash and has no spaces, control characters or characters beyond latin1';
  throw new KedgeError('ERR_KEDGE_REQUEST', reason, { target: target.authority });
}

/** Whether the request needs a connection of its own that speaks HTTP/1.1. */
export function needsH1(options: DispatchOptions): boolean {
  return options.allowH2 === false || Boolean(options.upgrade) || options.method === 'CONNECT';
}

/** `replay` goes out in the place of the caller's body. */
export function poolRequest(
  options: DispatchOptions,
  headers: FlatHeaders,
  replay: ReplayBody | undefined,
): PoolRequest {
  return {
    path: options.path,
    method: options.method,
    // undici takes any iterable; its types do not say so.
    body: (replay as never) ?? options.body,
    // undici takes lists as values in a flat array; its types do not say so.
    headers: headers as string[],
    query: options.query,
    idempotent: options.idempotent,
    blocking: options.blocking,
    upgrade: options.upgrade,
    headersTimeout: options.headersTimeout,
    bodyTimeout: options.bodyTimeout,
    reset: options.reset,
    expectContinue: options.expectContinue,
    typeOfService: options.typeOfService,
    servername: SERVERNAME,
  };
}

/**
 * For whoever wants a connection and nothing else. Before a CONNECT undici waits for the SETTINGS of an HTTP/2 connection,
 * without which it would take one call and open another connection for the next.
 */
export const CONNECT_ONLY: PoolRequest = { path: '/', method: 'CONNECT', servername: SERVERNAME };

/**
 * A large body for an HTTP/1.1 connection: in pieces, undici knows that it is still being sent when an early answer ends,
 * and does not use the connection again. Of a body in one piece undici believes that it is gone, and the next request
 * waits behind the rest of it.
 */
export function inPieces(request: PoolRequest): PoolRequest {
  const cut = pieces(request.body);
  if (cut === undefined) return request;
  const headers = request.headers as readonly (string | string[])[];
  const has = headers.some((name, i) => i % 2 === 0 && String(name).toLowerCase() === 'content-length');
  return {
    ...request,
    body: cut as never,
    headers: has ? (headers as string[]) : ([...headers, 'content-length', String(cut.length)] as string[]),
  };
}
