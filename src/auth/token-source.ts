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

/** Whether `value` can be used as a {@link TokenSource}. */
export function isTokenSource(value: unknown): value is TokenSource {
  if (typeof value !== 'object' || value === null) return false;
  const { name, peek, token } = value as Partial<Record<keyof TokenSource, unknown>>;
  return typeof name === 'string' && typeof peek === 'function' && typeof token === 'function';
}
