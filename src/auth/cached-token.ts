import { debug } from '../debug.ts';
import { KedgeError } from '../errors.ts';
import { hide } from '../hide.ts';
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

/** The share of a token's life after which it is refreshed in the background, less up to {@link JITTER} of it. */
const REFRESH_AT = 0.8;
const JITTER = 0.05;
/** After a failed fetch: the error is given to all who ask for a moment, and the background waits longer each time, in ms. */
const COOL_MS = 250;
const MAX_BACKOFF_MS = 30_000;

interface Flight {
  readonly promise: Promise<string>;
  readonly abort: AbortController;
  /** Calls that wait for it; a background refresh waits for itself. */
  waiting: number;
}

/**
 * A token source of what `fetchToken` gives: one fetch however many calls wait, refreshed at 80% of its life while calls
 * go on with the one that is still valid, also while refreshing fails. The signal aborts when nobody waits any more.
 *
 * @throws {@link KedgeError} `ERR_KEDGE_OPTIONS`
 */
export function cachedToken(
  fetchToken: (signal: AbortSignal) => Promise<FetchedToken>,
  options: CachedTokenOptions = {},
): TokenSource {
  const { name = 'cached', deadlineMs = TOKEN_DEADLINE_MS } = options;
  if (typeof fetchToken !== 'function') throw invalid('takes a function that gives { token, expiresAt? }');
  if (typeof name !== 'string') throw invalid('`name` is a string');
  if (!Number.isInteger(deadlineMs) || deadlineMs < 1) throw invalid('`deadlineMs` is a whole number of ms');
  return new CachedToken(name, fetchToken, deadlineMs);
}

class CachedToken implements TokenSource {
  readonly name: string;
  private readonly fetchToken: (signal: AbortSignal) => Promise<FetchedToken>;
  private readonly deadlineMs: number;
  private current: string | undefined;
  private expires = 0;
  private refreshes = 0;
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
    if (this.current === undefined) return undefined;
    const now = Date.now();
    if (now >= this.expires) {
      this.current = undefined;
      return undefined;
    }
    if (now >= this.refreshes && this.flight === undefined) this.refresh();
    return this.current;
  }

  async token(signal?: AbortSignal): Promise<string> {
    signal?.throwIfAborted();
    const ready = this.peek();
    if (ready !== undefined) return ready;
    if (this.flight === undefined && Date.now() < this.coolUntil) throw this.failure;
    const flight = this.flight ?? this.take();
    flight.waiting += 1;
    const { promise: aborted, reject } = Promise.withResolvers<never>();
    const leave = () => reject(signal!.reason);
    signal?.addEventListener('abort', leave, { once: true });
    try {
      return await Promise.race([flight.promise, aborted]);
    } finally {
      signal?.removeEventListener('abort', leave);
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

  private refresh(): void {
    const flight = this.take();
    flight.waiting += 1;
    flight.promise.then(
      () => {},
      () => {
        // The next try comes later each time, but well before what we have runs out.
        const backoff = Math.min(1000 * 2 ** (this.failures - 1), MAX_BACKOFF_MS) * (0.5 + Math.random() / 2);
        this.refreshes = Date.now() + backoff;
      },
    );
  }

  private take(): Flight {
    const abort = new AbortController();
    const flight: Flight = { promise: this.fetch(abort), abort, waiting: 0 };
    this.flight = flight;
    const over = () => {
      if (this.flight === flight) this.flight = undefined;
    };
    flight.promise.then(over, over);
    return flight;
  }

  private async fetch(abort: AbortController): Promise<string> {
    debug.auth('%s: fetching a token', this.name);
    const late = this.error(`no token within ${this.deadlineMs} ms`);
    const { promise: stopped, reject } = Promise.withResolvers<never>();
    abort.signal.addEventListener('abort', () => reject(abort.signal.reason), { once: true });
    const timer = setTimeout(() => abort.abort(late), this.deadlineMs);
    const isCurrent = () => this.flight === undefined || this.flight.abort === abort;
    try {
      // A source that throws before its first await is a source that fails.
      const fetched = await Promise.race([Promise.resolve(abort.signal).then(this.fetchToken), stopped]);
      const { token, expiresAt } = this.checked(fetched);
      this.failures = 0;
      if (isCurrent()) this.keep(token, expiresAt);
      return token;
    } catch (cause) {
      const error = this.error('the source failed', cause);
      this.failures += 1;
      this.failure = error;
      if (isCurrent() && !(abort.signal.aborted && abort.signal.reason !== late)) this.coolUntil = Date.now() + COOL_MS;
      debug.auth('%s', error.message);
      throw error;
    } finally {
      clearTimeout(timer);
    }
  }

  private checked(fetched: unknown): FetchedToken {
    const { token, expiresAt } = (fetched ?? {}) as Partial<FetchedToken>;
    if (typeof token !== 'string') throw this.error('the source gave no `token`');
    if (expiresAt !== undefined && !(expiresAt instanceof Date && Number.isFinite(expiresAt.getTime()))) {
      throw this.error('the `expiresAt` that the source gave is not a Date');
    }
    if (expiresAt !== undefined && expiresAt.getTime() <= Date.now())
      throw this.error('the source gave an expired token');
    return { token, expiresAt };
  }

  private keep(token: string, expiresAt: Date | undefined): void {
    this.current = token;
    this.expires = expiresAt?.getTime() ?? Number.POSITIVE_INFINITY;
    const life = this.expires - Date.now();
    // With jitter, so that many pods do not ask together.
    this.refreshes = expiresAt === undefined ? this.expires : Date.now() + life * (REFRESH_AT - Math.random() * JITTER);
  }

  private error(reason: string, cause?: unknown): KedgeError {
    return tokenError(this.name, reason, cause);
  }
}

function invalid(reason: string): KedgeError {
  return new KedgeError('ERR_KEDGE_OPTIONS', 'config', `cachedToken: ${reason}`);
}
