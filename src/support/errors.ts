/** Of gRPC's statuses, whose numbers Connect shares. */
const [INVALID_ARGUMENT, UNAVAILABLE, UNAUTHENTICATED] = [3, 14, 16];

/** What is known of a code. */
interface CodeFacts {
  /** Where it may be found, in the order in which a call passes; the first counts where none is given. */
  readonly stages: readonly string[];
  /** The status of an RPC that fails with it. Default: `UNAVAILABLE`; `INVALID_ARGUMENT` where the caller is at fault. */
  readonly rpc?: number | undefined;
  /** As the README has it. */
  readonly meaning: string;
}

/** All codes, in the order in which a call may meet them: types, stages, statuses and the README come from here. */
export const CODES = {
  ERR_KEDGE_OPTIONS: {
    stages: ['config'],
    rpc: INVALID_ARGUMENT,
    meaning: 'an option is unknown, has the wrong type or is out of range',
  },
  ERR_KEDGE_ROUTE: {
    stages: ['config', 'map'],
    rpc: INVALID_ARGUMENT,
    meaning: 'a mapper or a route is invalid, or would break a security rule',
  },
  ERR_KEDGE_IDENTITY: {
    stages: ['config', 'tls'],
    meaning: 'certificate, key or CA is missing, unreadable or does not fit together',
  },
  ERR_KEDGE_TARGET: {
    stages: ['map'],
    rpc: INVALID_ARGUMENT,
    meaning: 'the target is not a valid, unambiguous `host[:port]`',
  },
  ERR_KEDGE_UNMAPPED: {
    stages: ['map'],
    rpc: INVALID_ARGUMENT,
    meaning: 'no mapper knows the target, and it may not go direct',
  },
  ERR_KEDGE_CLOSED: { stages: ['map', 'kedge'], meaning: 'the dialer is closed, or was while the call was under way' },
  ERR_KEDGE_REQUEST: {
    stages: ['request'],
    rpc: INVALID_ARGUMENT,
    meaning: 'a header, path or option of the call cannot be sent through a kedge',
  },
  ERR_KEDGE_TOKEN: { stages: ['token'], rpc: UNAUTHENTICATED, meaning: 'what a token source gave is not a token' },
  ERR_KEDGE_TOKEN_UNAVAILABLE: {
    stages: ['token'],
    meaning: 'a token source failed or did not answer in time; it may later',
  },
  ERR_KEDGE_DNS: { stages: ['dns'], meaning: "the kedge's name does not resolve" },
  ERR_KEDGE_CONNECT: { stages: ['connect'], meaning: 'TCP to the kedge failed, or the kedge spoke no HTTP/2' },
  ERR_KEDGE_CONNECT_TIMEOUT: {
    stages: ['connect'],
    meaning: 'no TCP connection within `connect.timeoutMs`, or no HTTP/2 within `connect.handshakeTimeoutMs`',
  },
  ERR_KEDGE_TLS: { stages: ['tls'], meaning: 'the TLS handshake failed' },
  ERR_KEDGE_TLS_TIMEOUT: { stages: ['tls'], meaning: 'no handshake within `connect.handshakeTimeoutMs`' },
  ERR_KEDGE_CERTIFICATE: {
    stages: ['tls'],
    meaning: "the kedge's certificate was not accepted: wrong name, unknown CA, expired, not pinned",
  },
  ERR_KEDGE_CLIENT_CERTIFICATE: { stages: ['tls'], meaning: 'the kedge refused our client certificate' },
  ERR_KEDGE_IDENTITY_EXPIRED: {
    stages: ['tls', 'kedge'],
    rpc: UNAUTHENTICATED,
    meaning: "the client certificate is past its date: nothing was dialled, or the call's connection ended with it",
  },
  ERR_KEDGE_CONNECTION: { stages: ['kedge'], meaning: 'the connection was lost while the call was under way' },
  ERR_KEDGE_TIMEOUT: { stages: ['kedge'], meaning: "no answer within the call's headers or body timeout" },
  ERR_KEDGE_RESPONSE: { stages: ['kedge'], meaning: 'the answer breaks the protocol or a limit' },
  ERR_KEDGE_UNAUTHORIZED: {
    stages: ['kedge'],
    meaning: "the kedge refused `proxyAuth`'s token with 407, a fresh one too; a 401 is an answer",
  },
  ERR_KEDGE_REPORTED: {
    stages: ['kedge', 'backend'],
    meaning: "what the kedge says instead of the backend's answer (`kedgeErrorOf()`)",
  },
} as const satisfies Readonly<Record<`ERR_KEDGE_${string}`, CodeFacts>>;

/** What went wrong, stable across releases: branch on `error.code`, never on the message. The README explains each. */
export type KedgeErrorCode = keyof typeof CODES;

/** The step of a call's way that failed; `config` is before any call. */
export type KedgeStage = (typeof CODES)[KedgeErrorCode]['stages'][number];

/** Where an error happened. */
export interface KedgeErrorContext {
  /** The canonical target, such as `orders.shop.svc.us1.example:8080`. */
  target?: string | undefined;
  /** The kedge that was dialled, as `host:port`. */
  kedge?: string | undefined;
  /** Default: the only one that the code has, or the first. */
  stage?: KedgeStage | undefined;
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

  constructor(code: KedgeErrorCode, reason: string, context: KedgeErrorContext = {}) {
    const { target, kedge, cause, stage = CODES[code].stages[0] } = context;
    const where = `${target === undefined ? '' : `target ${target}: `}${kedge === undefined ? '' : `kedge ${kedge}: `}`;
    super(`${where}${stage}: ${reason}`, cause === undefined ? undefined : { cause });
    this.code = code;
    this.stage = stage;
    this.reason = reason;
    this.target = target;
    this.kedge = kedge;
  }

  /** The same failure as one call met it: connections are shared, so a failed dial belongs to many calls. */
  for(target: string, kedge?: string): KedgeError {
    if (this.target !== undefined && (this.kedge !== undefined || kedge === undefined)) return this;
    const { code, reason, stage, cause } = this;
    return new KedgeError(code, reason, { target: this.target ?? target, kedge: this.kedge ?? kedge, stage, cause });
  }
}

/** The status of gRPC, and of Connect, for an error before or outside the backend. */
export function rpcStatusOf(code: KedgeErrorCode): number {
  const { rpc = UNAVAILABLE }: CodeFacts = CODES[code];
  return rpc!;
}

/**
 * Whether `value` is a {@link KedgeError}, also one from another copy of this package.
 *
 * @example
 * ```ts
 * import { createDialer, isKedgeError, single } from 'kedge-dialer';
 *
 * const dialer = createDialer({ mapper: single('https://us1.kedge.example.com') });
 * try {
 *   await dialer.fetch('http://orders.us1.example/');
 * } catch (error) {
 *   const cause = (error as Error).cause; // fetch wraps what its dispatcher says
 *   if (isKedgeError(cause)) console.error(cause.code, cause.stage, cause.kedge);
 * }
 * ```
 */
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
