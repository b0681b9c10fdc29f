import type * as oidc from 'openid-client';
import { orAbort } from '../support/abort.ts';
import * as shape from '../support/shape.ts';
import { CACHE, type CachedTokenOptions, cachedToken, type FetchedToken } from './cached-token.ts';
import { expiryOf } from './jwt.ts';
import { readRefreshToken, writeRefreshToken } from './refresh-cache.ts';
import { loadPeer, type TokenSource, tokenError } from './token-source.ts';

/** Options of {@link oidcToken}. */
export interface OidcTokenOptions extends CachedTokenOptions {
  /** The provider's issuer URL, `https:` unless it is on this machine; its configuration is discovered. */
  issuer: string;
  clientId: string;
  /** Default: a public client. */
  clientSecret?: string;
  /** Default: `openid` where somebody logs in, none for client credentials. */
  scopes?: readonly string[];
  /**
   * `client_credentials` asks for the client's own token (RFC 6749 §4.4). `refresh_token` acts for somebody who logged in:
   * with `refreshToken`, with what an earlier process left in `cacheFile`, or by `login`. Default: `client_credentials`.
   */
  grant?: 'client_credentials' | 'refresh_token';
  refreshToken?: string;
  /**
   * Keeps the latest refresh token, readable by its owner only, for the next process. What is in it is newer than
   * `refreshToken`.
   */
  cacheFile?: string;
  /**
   * Sends somebody to `authorizationUrl`, and gives the URL at which the provider sends them back. Called when there is no
   * refresh token that the provider takes.
   */
  login?: (authorizationUrl: URL, signal: AbortSignal) => Promise<URL>;
  /** Where the provider sends them back to; required with `login`. */
  redirectUri?: string;
  /** Which token is sent. Default: the id token where the provider gives one, else the access token. */
  use?: 'id_token' | 'access_token';
  /** Sent with every token request, such as `audience` or `resource`. */
  parameters?: Readonly<Record<string, string>>;
}

/** How long somebody may take to log in, in ms. */
const LOGIN_MS = 5 * 60_000;
/** Hosts that plain http is good enough for. */
const LOCAL = /^(?:localhost|127(?:\.\d+){3}|\[::1\])$/;

const OPTIONS = shape.object({
  ...CACHE,
  issuer: shape.is('an https: URL of a provider', isIssuer),
  clientId: shape.text("the client's name at the provider"),
  clientSecret: shape.optional(shape.string),
  scopes: shape.optional(shape.strings),
  grant: shape.optional(shape.oneOf('client_credentials', 'refresh_token')),
  refreshToken: shape.optional(shape.string),
  cacheFile: shape.optional(shape.path),
  login: shape.optional(shape.callable),
  redirectUri: shape.optional(shape.url),
  use: shape.optional(shape.oneOf('id_token', 'access_token')),
  parameters: shape.optional(shape.stringRecord),
} satisfies shape.Table<OidcTokenOptions>);

/**
 * A token of an OpenID Connect provider, by way of the optional peer `openid-client`. Rotated refresh tokens are kept; one
 * that is refused (RFC 6749 §5.2 `invalid_grant`) is forgotten, and `login` asked where there is one.
 *
 * @example
 * ```ts
 * import { oidcToken } from 'kedge-dialer';
 *
 * const token = oidcToken({
 *   issuer: 'https://login.example.com',
 *   clientId: 'checkout',
 *   clientSecret: process.env['CLIENT_SECRET'] ?? 'from-a-secret',
 *   parameters: { audience: 'kedge' },
 * });
 * ```
 *
 * @throws {@link KedgeError} `ERR_KEDGE_OPTIONS`
 */
export function oidcToken(options: OidcTokenOptions): TokenSource {
  const {
    clientId,
    deadlineMs,
    login,
    redirectUri,
    name = `oidc ${clientId}`,
  } = shape.check('oidcToken', OPTIONS, options);
  if (login !== undefined) shape.check('oidcToken', shape.url, redirectUri, { path: 'redirectUri' });
  const client = new OidcClient(name, options);
  return cachedToken((signal) => client.fetch(signal), { name, deadlineMs });
}

class OidcClient {
  private readonly name: string;
  private readonly options: OidcTokenOptions;
  private discovered: oidc.Configuration | undefined;
  private refreshToken: string | undefined;
  /** What the file held when we last looked: another one was left by another process, and is newer. */
  private kept: string | undefined;
  /** The provider does not take them any more, though one may still be in the file. */
  private readonly refused = new Set<string>();
  /** Settles, and never fails, when the last grant that was begun is over. */
  private granting: Promise<unknown> = Promise.resolve();
  private loggingIn: Promise<FetchedToken> | undefined;
  /** Of a log-in that outlasted those who waited for it: nobody is sent to log in again while it counts. */
  private unclaimed: FetchedToken | undefined;

  constructor(name: string, options: OidcTokenOptions) {
    this.name = name;
    this.options = options;
    this.refreshToken = options.refreshToken;
  }

  async fetch(signal: AbortSignal): Promise<FetchedToken> {
    const client = await loadPeer(this.name, 'openid-client', () => import('openid-client'));
    try {
      const config = await this.configuration(client, signal);
      return this.options.grant === 'refresh_token'
        ? await this.forSomebody(client, config, signal)
        : this.chosen(await client.clientCredentialsGrant(config, this.parameters()));
    } catch (error) {
      signal.throwIfAborted();
      throw tokenError(this.name, reasonOf(error), error);
    }
  }

  private async forSomebody(
    client: typeof oidc,
    config: oidc.Configuration,
    signal: AbortSignal,
  ): Promise<FetchedToken> {
    // One after the other: a refresh token that is used twice, by a grant that nobody waits for any more and by the next
    // one, is taken for stolen, and the provider revokes the log-in (RFC 9700 §4.14.2).
    const granted = this.granting.then(() => this.refresh(client, config, signal));
    this.granting = granted.catch(() => {});
    const refreshed = await granted;
    if (refreshed !== undefined) return refreshed;
    const { unclaimed } = this;
    this.unclaimed = undefined;
    if (unclaimed !== undefined && (unclaimed.expiresAt?.getTime() ?? Number.POSITIVE_INFINITY) > Date.now()) {
      return unclaimed;
    }
    const { login } = this.options;
    if (login === undefined) {
      const reason =
        this.refused.size > 0
          ? 'the provider refused the refresh token: invalid_grant'
          : 'there is no refresh token, and no `login`';
      throw tokenError(this.name, reason);
    }
    // Whoever logs in takes longer than a call waits: the next call finds them still at it, or done.
    this.loggingIn ??= this.logIn(client, config, login).finally(() => {
      this.loggingIn = undefined;
    });
    const token = await this.loggingIn;
    this.unclaimed = signal.aborted ? token : undefined;
    return token;
  }

  /** Undefined: there is no refresh token that the provider takes. */
  private async refresh(
    client: typeof oidc,
    config: oidc.Configuration,
    signal: AbortSignal,
  ): Promise<FetchedToken | undefined> {
    for (let known = this.known(); known !== undefined; known = this.known()) {
      signal.throwIfAborted();
      try {
        return await this.took(await client.refreshTokenGrant(config, known, this.parameters()), known);
      } catch (error) {
        if (errorCode(error) !== 'invalid_grant') throw error;
        this.refused.add(known);
      }
    }
    return undefined;
  }

  private known(): string | undefined {
    const { cacheFile } = this.options;
    const kept = cacheFile === undefined ? undefined : readRefreshToken(cacheFile);
    const candidates = kept === this.kept ? [this.refreshToken, kept] : [kept, this.refreshToken];
    this.kept = kept;
    return candidates.find((each) => each !== undefined && !this.refused.has(each));
  }

  private async logIn(
    client: typeof oidc,
    config: oidc.Configuration,
    login: NonNullable<OidcTokenOptions['login']>,
  ): Promise<FetchedToken> {
    const [pkceCodeVerifier, expectedState, expectedNonce] = [
      client.randomPKCECodeVerifier(),
      client.randomState(),
      client.randomNonce(),
    ];
    const url = client.buildAuthorizationUrl(config, {
      redirect_uri: this.options.redirectUri!,
      scope: this.scopes('openid'),
      code_challenge: await client.calculatePKCECodeChallenge(pkceCodeVerifier),
      code_challenge_method: 'S256',
      state: expectedState,
      nonce: expectedNonce,
      // Without it providers give no refresh token to those who log in (OpenID Connect Core §11).
      ...(this.scopes('openid').includes('offline_access') ? { prompt: 'consent' } : {}),
    });
    const signal = AbortSignal.timeout(LOGIN_MS);
    // One who never comes back must not keep the next from being asked.
    const back = await orAbort(login(url, signal), signal);
    const checks = { pkceCodeVerifier, expectedState, expectedNonce };
    return this.took(await client.authorizationCodeGrant(config, back, checks, this.parameters(false)), undefined);
  }

  /** Keeps a rotated refresh token before anything else can go wrong. */
  private async took(answer: oidc.TokenEndpointResponse, sent: string | undefined): Promise<FetchedToken> {
    this.refreshToken = answer.refresh_token ?? sent;
    const { cacheFile } = this.options;
    this.refused.clear();
    if (cacheFile !== undefined && this.refreshToken !== undefined && this.refreshToken !== this.kept) {
      if (await writeRefreshToken(cacheFile, this.refreshToken)) this.kept = this.refreshToken;
    }
    return this.chosen(answer);
  }

  private chosen(answer: oidc.TokenEndpointResponse): FetchedToken {
    const { use } = this.options;
    const token =
      use === 'access_token' ? answer.access_token : (answer.id_token ?? (use ? undefined : answer.access_token));
    if (token === undefined) throw tokenError(this.name, 'the provider gave no id token');
    const life = answer.expires_in === undefined ? undefined : new Date(Date.now() + answer.expires_in * 1000);
    // How long it lasts is told for the access token, and does not depend on our clock.
    return { token, expiresAt: token === answer.access_token ? (life ?? expiryOf(token)) : (expiryOf(token) ?? life) };
  }

  private async configuration(client: typeof oidc, signal: AbortSignal): Promise<oidc.Configuration> {
    if (this.discovered !== undefined) return this.discovered;
    const { issuer, clientId, clientSecret } = this.options;
    const url = new URL(issuer);
    const auth = clientSecret === undefined ? client.None() : client.ClientSecretPost(clientSecret);
    const isLocal = url.protocol === 'http:' && LOCAL.test(url.hostname);
    const options: oidc.DiscoveryRequestOptions = {
      // Whoever waits no longer takes the request along; what is discovered stays.
      [client.customFetch]: (input: string, init: object) => fetch(input, { ...init, signal } as RequestInit),
      ...(isLocal ? { execute: [client.allowInsecureRequests] } : {}),
    };
    const config = await client.discovery(url, clientId, clientSecret, auth, options);
    config[client.customFetch] = (input, init) => fetch(input, init as RequestInit);
    this.discovered = config;
    return config;
  }

  private parameters(withScopes = true): Record<string, string> {
    const scope = withScopes ? this.scopes('') : '';
    return { ...this.options.parameters, ...(scope === '' ? {} : { scope }) };
  }

  private scopes(fallback: string): string {
    return this.options.scopes?.join(' ') ?? fallback;
  }
}

/** The provider's own code (RFC 6749 §5.2), which is safe to show; its description may not be. */
function errorCode(error: unknown): string | undefined {
  const { error: code } = (error ?? {}) as { error?: unknown };
  return typeof code === 'string' && /^[a-z_]{1,40}$/.test(code) ? code : undefined;
}

function reasonOf(error: unknown): string {
  const code = errorCode(error);
  return code === undefined ? 'the provider gave no token' : `the provider answered ${code}`;
}

function isIssuer(value: unknown): value is string {
  const issuer = typeof value === 'string' ? URL.parse(value) : null;
  return issuer?.protocol === 'https:' || (issuer?.protocol === 'http:' && LOCAL.test(issuer.hostname));
}
