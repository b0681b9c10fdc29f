import type { Bearer } from '../auth/bearer.ts';
import type { TokenSource } from '../auth/token-source.ts';
import type { Route } from '../route.ts';

/** What one attempt shows, as header values. */
export interface Tokens {
  /** For the kedge: `proxy-authorization`. */
  readonly proxyAuth: string | undefined;
  /** For the backend: `authorization`. */
  readonly backendAuth: string | undefined;
  /** Whether `backendAuth` goes out in the place of the caller's own. */
  readonly overrideAuthorization: boolean;
}

/** Who refused a token; `unknown` where the wire does not tell kedge and backend apart. */
export type Refuser = 'kedge' | 'backend' | 'unknown';

/** Both tokens of a route: which are at hand, which must be waited for, and what becomes of one that was refused. */
export class Credentials {
  private readonly proxyAuth: Bearer | undefined;
  private readonly backendAuth: Bearer | undefined;
  private last: Tokens;

  /** `bearerOf` gives routes that share a source one checked token. */
  constructor(route: Route, bearerOf: (source: TokenSource) => Bearer) {
    this.proxyAuth = route.proxyAuth && bearerOf(route.proxyAuth);
    this.backendAuth = route.backendAuth && bearerOf(route.backendAuth);
    const overrideAuthorization = route.overrideAuthorization ?? false;
    this.last = { proxyAuth: undefined, backendAuth: undefined, overrideAuthorization };
  }

  /** Names of the sources, for people. */
  get names(): { readonly proxyAuth: string | undefined; readonly backendAuth: string | undefined } {
    return { proxyAuth: this.proxyAuth?.source.name, backendAuth: this.backendAuth?.source.name };
  }

  /** Whether the route brings the header that is the kedge's, so that a caller may not. */
  get bringsProxyAuth(): boolean {
    return this.proxyAuth !== undefined;
  }

  /** Whether a caller's own `authorization` never goes out. */
  get replacesOwn(): boolean {
    return this.backendAuth !== undefined && this.last.overrideAuthorization;
  }

  /** The tokens without waiting; undefined where a source has none at hand. */
  peek(): Tokens | undefined {
    const proxyAuth = this.proxyAuth?.peek();
    const backendAuth = this.backendAuth?.peek();
    if (proxyAuth === undefined && this.proxyAuth !== undefined) return undefined;
    if (backendAuth === undefined && this.backendAuth !== undefined) return undefined;
    return this.with(proxyAuth, backendAuth);
  }

  async wait(signal: AbortSignal): Promise<Tokens> {
    const [proxyAuth, backendAuth] = await Promise.all([this.proxyAuth?.wait(signal), this.backendAuth?.wait(signal)]);
    signal.throwIfAborted();
    return this.with(proxyAuth, backendAuth);
  }

  /** The sources of refused tokens forget them; true where another try may have a better one. */
  refused(tokens: Tokens, by: Refuser): boolean {
    const proxy = by !== 'backend' && this.proxyAuth?.invalidate(tokens.proxyAuth) === true;
    const backend = by !== 'kedge' && this.backendAuth?.invalidate(tokens.backendAuth) === true;
    return proxy || backend;
  }

  /** One object for as long as they stay the same: this is on the way of every call. */
  private with(proxyAuth: string | undefined, backendAuth: string | undefined): Tokens {
    const { last } = this;
    if (proxyAuth !== last.proxyAuth || backendAuth !== last.backendAuth) {
      this.last = { proxyAuth, backendAuth, overrideAuthorization: last.overrideAuthorization };
    }
    return this.last;
  }
}

/** Whether the caller's own `authorization`, if there is one, goes out: the route's is for those who bring none. */
export function keepsOwn(tokens: Tokens): boolean {
  return tokens.backendAuth === undefined || !tokens.overrideAuthorization;
}
