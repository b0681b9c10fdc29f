import { AsyncLocalStorage } from 'node:async_hooks';
import { orAbort } from '../support/abort.ts';
import { backoff } from '../support/backoff.ts';
import { debug } from '../support/debug.ts';
import type { KedgeError } from '../support/errors.ts';
import { hide } from '../support/redact.ts';
import { callable, check, ms, object, optional, or, string, type Table } from '../support/shape.ts';
import { TOKEN_DEADLINE_MS, type TokenSource, tokenError } from './token-source.ts';

/** What a fetch gives. */
export interface FetchedToken {
  token: string;
  /** Undefined: it counts until it is invalidated. */
  expiresAt?: Date | undefined;
}

/** Options of {@link cachedToken}. */
export interface CachedTokenOptions {
  /** How errors, logs and `explain()` call this source. Default: `cached`. */
  name?: string;
  /** How long one fetch may take, in ms. Default: 10 000. */
  deadlineMs?: number;
}

/** For all sources that are cached. */
export const CACHE = {
  name: optional(string),
  deadlineMs: or(ms, TOKEN_DEADLINE_MS),
} satisfies Table<CachedTokenOptions>;
const OPTIONS = object(CACHE);

/** The share of a token's life after which it is refreshed in the background, less up to {@link JITTER} of it. */
const REFRESH_AT = 0.8;
const JITTER = 0.05;
/** After a failed fetch: the error is given to all who ask for a moment, and the background waits longer each time, in ms. */
const COOL_MS = 250;
const BACKOFF_MS = 1000;
const MAX_BACKOFF_MS = 30_000;
/** How far our clock may be ahead of the provider's, in ms: what was fetched just now is not expired. */
const LEEWAY_MS = 60_000;

/** One fetch, and those who wait for it. */
interface Flight {
  readonly abort: AbortController;
  /** Calls that wait for it; a background refresh waits for itself. Nobody joins again when the last has left. */
  waiting: number;
  promise: Promise<string>;
}

/** Which fetches this code runs for: a source's own request must not wait for its token. */
interface Fetching {
  readonly source: object;
  readonly outer: Fetching | undefined;
  over: boolean;
}

const fetching = new AsyncLocalStorage<Fetching>();
let fetches = 0;

/**
 * A token source of what `fetchToken` gives: one fetch however many calls wait.
 *
 * - **Refresh**: a token with `expiresAt` is refreshed by the first call after 75 to 80% of its life, in the background; calls
 *   go on with the one that is valid. One without counts until it is invalidated. One that is past its `expiresAt` by our clock
 *   when it arrives counts until 60 s after it, because clocks differ; past that too, it is a failure.
 * - **Failure**: while there is a valid token it is used, and the background tries again, by the first call after 0.5 to 1 s, then
 *   after twice as long each time, up to 15 to 30 s. An expired one is never used. Without a valid one, calls that wait are told
 *   (`ERR_KEDGE_TOKEN_UNAVAILABLE`), so are those of the next 250 ms, and the first one after that fetches.
 * - **`invalidate()`**, as after a 407: the token is forgotten, and the next call fetches at once, whatever failed before or is
 *   under way.
 * - **Deadline**: a fetch has `deadlineMs`. Its signal aborts then, and when no call waits any more, which is no failure.
 *
 * A fetch whose own request would need this token fails rather than wait for itself.
 *
 * @example
 * ```ts
 * import { cachedToken } from 'kedge-dialer';
 *
 * const token = cachedToken(
 *   async (signal) => {
 *     const response = await fetch('https://sts.example.com/token', { method: 'POST', signal });
 *     const { token, expires_in } = (await response.json()) as { token: string; expires_in: number };
 *     return { token, expiresAt: new Date(Date.now() + expires_in * 1000) };
 *   },
 *   { name: 'sts', deadlineMs: 5000 },
 * );
 * ```
 *
 * @throws {@link KedgeError} `ERR_KEDGE_OPTIONS`
 */
export function cachedToken(
  fetchToken: (signal: AbortSignal) => Promise<FetchedToken>,
  options: CachedTokenOptions = {},
): TokenSource {
  check('cachedToken', callable, fetchToken, { path: 'fetchToken' });
  const { name = 'cached', deadlineMs } = check('cachedToken', OPTIONS, options);
  return new CachedToken(name, fetchToken, deadlineMs);
}

/** Tokens end by the wall clock, as they say; pauses are measured, because that clock may be set. */
class CachedToken implements TokenSource {
  readonly name: string;
  private readonly fetchToken: (signal: AbortSignal) => Promise<FetchedToken>;
  private readonly deadlineMs: number;
  private current: string | undefined;
  private expires = 0;
  private refreshAt = 0;
  private flight: Flight | undefined;
  private failures = 0;
  private failure: KedgeError | undefined;
  private coolUntil = 0;

  constructor(name: string, fetchToken: (signal: AbortSignal) => Promise<FetchedToken>, deadlineMs: number) {
    this.name = name;
    this.fetchToken = fetchToken;
    this.deadlineMs = deadlineMs;
    hide(this, `TokenSource(${name})`);
  }

  peek(): string | undefined {
    if (this.current === undefined || Date.now() >= this.expires) return undefined;
    if (performance.now() >= this.refreshAt && this.flight === undefined) this.take().waiting += 1;
    return this.current;
  }

  async token(signal?: AbortSignal): Promise<string> {
    signal?.throwIfAborted();
    const ready = this.peek();
    if (ready !== undefined) return ready;
    this.refuseLoop();
    if (this.flight === undefined && performance.now() < this.coolUntil) throw this.failure;
    // One that everybody has left is over, though it may not have heard of it yet.
    const flight = this.flight?.abort.signal.aborted === false ? this.flight : this.take();
    flight.waiting += 1;
    try {
      return await orAbort(flight.promise, signal);
    } finally {
      flight.waiting -= 1;
      if (flight.waiting === 0) flight.abort.abort(new Error('nobody waits for this token'));
    }
  }

  invalidate(): void {
    debug.auth('%s: invalidated', this.name);
    this.current = undefined;
    this.coolUntil = 0;
    // What is under way may bring the same token once more; who asks from now on gets a later one.
    this.flight = undefined;
  }

  private take(): Flight {
    const flight = { abort: new AbortController(), waiting: 0 } as Flight;
    this.flight = flight;
    flight.promise = this.fetch(flight);
    const over = () => {
      if (this.flight === flight) this.flight = undefined;
    };
    flight.promise.then(over, over);
    return flight;
  }

  private async fetch(flight: Flight): Promise<string> {
    debug.auth('%s: fetching a token', this.name);
    const { signal } = flight.abort;
    const late = () => flight.abort.abort(this.error(`no token within ${this.deadlineMs} ms`));
    const timer = setTimeout(late, this.deadlineMs);
    const scope: Fetching = { source: this, outer: fetching.getStore(), over: false };
    fetches += 1;
    try {
      // A source that throws before its first await is a source that fails.
      const begun = fetching.run(scope, () => Promise.resolve(signal).then(this.fetchToken));
      const { token, expiresAt } = this.checked(await orAbort(begun, signal));
      if (this.flight === flight) this.keep(token, expiresAt);
      return token;
    } catch (cause) {
      const error = this.error('the source failed', cause);
      debug.auth('%s', error.message);
      // What nobody waits for was given up; it did not fail.
      if (this.flight === flight && flight.waiting > 0) this.pause(error);
      throw error;
    } finally {
      clearTimeout(timer);
      scope.over = true;
      fetches -= 1;
      // On Node 22 a storage that was used once makes every promise of the process slower.
      if (fetches === 0) fetching.disable();
    }
  }

  /** By a mapper that knows every name, say, the provider is asked through a kedge that wants the provider's token. */
  private refuseLoop(): void {
    for (let at = fetching.getStore(); at !== undefined; at = at.outer) {
      if (at.source !== this || at.over) continue;
      throw this.error(
        'its own request for a token goes by a route that needs this token: leave the provider unmapped',
      );
    }
  }

  private checked(fetched: unknown): FetchedToken {
    const { token, expiresAt } = (fetched ?? {}) as Partial<FetchedToken>;
    if (typeof token !== 'string') throw this.error('the source gave no `token`');
    if (expiresAt !== undefined && !(expiresAt instanceof Date && Number.isFinite(expiresAt.getTime()))) {
      throw this.error('the `expiresAt` that the source gave is not a Date');
    }
    if (expiresAt !== undefined && expiresAt.getTime() + LEEWAY_MS <= Date.now())
      throw this.error('the source gave a token that has expired, or the clock is wrong');
    return { token, expiresAt };
  }

  private keep(token: string, expiresAt: Date | undefined): void {
    const now = Date.now();
    const ends = expiresAt?.getTime() ?? Number.POSITIVE_INFINITY;
    this.failures = 0;
    this.current = token;
    this.expires = ends > now ? ends : ends + LEEWAY_MS;
    // With jitter, so that many pods do not ask together.
    this.refreshAt = performance.now() + (this.expires - now) * (REFRESH_AT - Math.random() * JITTER);
  }

  private pause(error: KedgeError): void {
    const now = performance.now();
    this.failure = error;
    this.coolUntil = now + COOL_MS;
    // The next try comes later each time, but well before what we have runs out.
    this.refreshAt = now + backoff(this.failures, BACKOFF_MS, MAX_BACKOFF_MS);
    this.failures += 1;
  }

  private error(reason: string, cause?: unknown): KedgeError {
    return tokenError(this.name, reason, cause);
  }
}
