import { codeOf, isKedgeError, KedgeError } from '../support/errors.ts';
import { loadOptional } from '../support/optional-package.ts';
import { is } from '../support/shape.ts';

/**
 * Gives bearer tokens. {@link TokenSource.peek} is the fast path: while it answers, a call is dispatched in the tick
 * that it was made in.
 */
export interface TokenSource {
  /** For errors, logs and `explain()`; never the token. */
  readonly name: string;
  /** A token that is valid now, without waiting; undefined when there is none at hand. */
  peek(): string | undefined;
  /** A token that is valid now. The dialer gives up after 10 s, whatever the source does. */
  token(signal?: AbortSignal): Promise<string>;
  /** The kedge or the backend refused the token last given. */
  invalidate?(): void;
}

/** How long a call waits for a token source, in ms; the original's `--server_auth_timeout` has the same default. */
export const TOKEN_DEADLINE_MS = 10_000;

export const tokenSourceReader = is('a token source such as fileToken(path)', isTokenSource);

/** Whether `value` can be used as a {@link TokenSource}. */
function isTokenSource(value: unknown): value is TokenSource {
  if (typeof value !== 'object' || value === null) return false;
  const { name, peek, token } = value as Partial<Record<keyof TokenSource, unknown>>;
  return typeof name === 'string' && typeof peek === 'function' && typeof token === 'function';
}

/**
 * A failure of a token source. Of a foreign cause only its kind is kept: its message may quote what was read. One of ours
 * shows no secret; a token source that calls through a dialer may fail by it.
 */
export function tokenError(name: string, reason: string, cause?: unknown): KedgeError {
  const own = ownError(cause);
  // It says which source failed. The target that it may speak of is the provider, not the caller's.
  if (own?.stage === 'token') return own.target === undefined ? own : new KedgeError(own.code, own.reason);
  const code = codeOf(cause);
  const shown = /^[A-Z0-9_]{1,40}$/.test(code) ? ` ${code}` : '';
  const kind = own !== undefined ? ` (${own.message})` : cause instanceof Error ? ` (${cause.name}${shown})` : '';
  const context = own === undefined ? {} : { cause: own };
  return new KedgeError('ERR_KEDGE_TOKEN_UNAVAILABLE', `token source ${name}: ${reason}${kind}`, context);
}

/** Loads the optional peer `name` for a token source. */
export function loadPeer<T>(source: string, name: string, load: () => Promise<T>): Promise<T> {
  return loadOptional(name, load, (reason) => tokenError(source, reason));
}

function ownError(cause: unknown): KedgeError | undefined {
  for (let at = cause, depth = 0; at instanceof Error && depth < 8; at = at.cause, depth += 1) {
    if (isKedgeError(at)) return at;
  }
  return undefined;
}
