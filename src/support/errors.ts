/**
 * What went wrong, stable across releases: branch on `error.code`, never on the message.
 *
 * | code | stage | meaning |
 * |---|---|---|
 * | `ERR_KEDGE_OPTIONS` | config | an option is unknown, has the wrong type or is out of range |
 * | `ERR_KEDGE_ROUTE` | config, map | a mapper or a route is invalid, or would break a security rule |
 * | `ERR_KEDGE_IDENTITY` | config | certificate, key or CA is missing, unreadable or does not fit together |
 * | `ERR_KEDGE_IDENTITY_EXPIRED` | tls, kedge | the client certificate is past its date: nothing was dialled, or the call's connection ended with it |
 * | `ERR_KEDGE_TARGET` | map | the target is not a valid, unambiguous `host[:port]` |
 * | `ERR_KEDGE_UNMAPPED` | map | no mapper knows the target and it may not go direct |
 * | `ERR_KEDGE_CLOSED` | map | the dialer is closed |
 * | `ERR_KEDGE_REQUEST` | request | a header, path or option of the call cannot be sent through a kedge |
 * | `ERR_KEDGE_TOKEN` | token | what a token source gave is not a token |
 * | `ERR_KEDGE_TOKEN_UNAVAILABLE` | token | a token source failed or did not answer in time; it may later |
 * | `ERR_KEDGE_DNS` | dns | the kedge's name does not resolve |
 * | `ERR_KEDGE_CONNECT` | connect | TCP to the kedge failed |
 * | `ERR_KEDGE_CONNECT_TIMEOUT` | connect | no TCP connection within `connect.timeoutMs` |
 * | `ERR_KEDGE_TLS` | tls | the TLS handshake failed |
 * | `ERR_KEDGE_TLS_TIMEOUT` | tls | no handshake within `connect.handshakeTimeoutMs` |
 * | `ERR_KEDGE_CERTIFICATE` | tls | the kedge's certificate was not accepted: wrong name, unknown CA, expired, not pinned |
 * | `ERR_KEDGE_CLIENT_CERTIFICATE` | tls | the kedge refused our client certificate |
 * | `ERR_KEDGE_CONNECTION` | kedge | the connection was lost while the call was under way |
 * | `ERR_KEDGE_TIMEOUT` | kedge | no answer within the call's headers or body timeout |
 * | `ERR_KEDGE_RESPONSE` | kedge | the answer breaks the protocol or a limit |
 * | `ERR_KEDGE_UNAUTHORIZED` | kedge | the kedge refused `proxyAuth`'s token, a fresh one too |
 * | `ERR_KEDGE_REPORTED` | kedge, backend | what the kedge says instead of the backend's answer ({@link kedgeErrorOf}) |
 */
export type KedgeErrorCode =
  | 'ERR_KEDGE_OPTIONS'
  | 'ERR_KEDGE_ROUTE'
  | 'ERR_KEDGE_IDENTITY'
  | 'ERR_KEDGE_IDENTITY_EXPIRED'
  | 'ERR_KEDGE_TARGET'
  | 'ERR_KEDGE_UNMAPPED'
  | 'ERR_KEDGE_CLOSED'
  | 'ERR_KEDGE_REQUEST'
  | 'ERR_KEDGE_TOKEN'
  | 'ERR_KEDGE_TOKEN_UNAVAILABLE'
  | 'ERR_KEDGE_DNS'
  | 'ERR_KEDGE_CONNECT'
  | 'ERR_KEDGE_CONNECT_TIMEOUT'
  | 'ERR_KEDGE_TLS'
  | 'ERR_KEDGE_TLS_TIMEOUT'
  | 'ERR_KEDGE_CERTIFICATE'
  | 'ERR_KEDGE_CLIENT_CERTIFICATE'
  | 'ERR_KEDGE_CONNECTION'
  | 'ERR_KEDGE_TIMEOUT'
  | 'ERR_KEDGE_RESPONSE'
  | 'ERR_KEDGE_UNAUTHORIZED'
  | 'ERR_KEDGE_REPORTED';

/** The step of a call's way that failed, in the order in which a call passes them; `config` is before any call. */
export type KedgeStage = 'config' | 'map' | 'request' | 'token' | 'dns' | 'connect' | 'tls' | 'kedge' | 'backend';

/** Where an error happened. */
export interface KedgeErrorContext {
  /** The canonical target, such as `orders.shop.svc.us1.example:8080`. */
  target?: string | undefined;
  /** The kedge that was dialled, as `host:port`. */
  kedge?: string | undefined;
  cause?: unknown;
}

/**
 * Every failure that this package finds is one of these. The message says what was asked, which kedge was dialled and at
 * which stage it failed; it never holds a token or a key.
 */
export class KedgeError extends Error {
  override readonly name = 'KedgeError';
  readonly code: KedgeErrorCode;
  readonly stage: KedgeStage;
  /** The message without its context, for wrapping. */
  readonly reason: string;
  readonly target: string | undefined;
  readonly kedge: string | undefined;

  constructor(code: KedgeErrorCode, stage: KedgeStage, reason: string, context: KedgeErrorContext = {}) {
    const where = [
      context.target === undefined ? '' : `target ${context.target}: `,
      context.kedge === undefined ? '' : `kedge ${context.kedge}: `,
    ].join('');
    super(`${where}${stage}: ${reason}`, context.cause === undefined ? undefined : { cause: context.cause });
    this.code = code;
    this.stage = stage;
    this.reason = reason;
    this.target = context.target;
    this.kedge = context.kedge;
  }

  /** The same failure as one call met it: connections are shared, so a failed dial belongs to many calls. */
  for(target: string): KedgeError {
    if (this.target !== undefined) return this;
    return new KedgeError(this.code, this.stage, this.reason, { target, kedge: this.kedge, cause: this.cause });
  }
}

/** Whether `value` is a {@link KedgeError}, also one from another copy of this package. */
export function isKedgeError(value: unknown): value is KedgeError {
  if (value instanceof KedgeError) return true;
  if (!(value instanceof Error) || value.name !== 'KedgeError') return false;
  return String((value as { code?: unknown }).code).startsWith('ERR_KEDGE_');
}

/** The `code` that Node, OpenSSL and undici give their errors; empty without one. */
export function codeOf(error: unknown): string {
  const { code } = (error ?? {}) as { code?: unknown };
  return typeof code === 'string' ? code : '';
}

/** An input as error text: printable, short, and without what may be a password. */
export function quote(input: unknown): string {
  if (typeof input !== 'string') return input === null ? 'null' : `a value of type ${typeof input}`;
  const at = input.lastIndexOf('@');
  const scheme = /^[a-z][a-z0-9+.-]{0,20}:\/\//i.exec(input)?.[0] ?? '';
  const safe = at === -1 ? input : `${scheme}***${input.slice(at)}`;
  return JSON.stringify(safe.length <= 100 ? safe : `${safe.slice(0, 100)}…`);
}
