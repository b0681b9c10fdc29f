import { readRegularFile } from '../read-file.ts';
import { check, object, optional, or, path, strings, type Table, text, url } from '../support/shape.ts';
import { CACHE, type CachedTokenOptions, cachedToken, type FetchedToken } from './cached-token.ts';
import { expiryOf } from './jwt.ts';
import { loadPeer, type TokenSource, tokenError } from './token-source.ts';

/** Options of {@link googleServiceAccountToken}. */
export interface GoogleServiceAccountTokenOptions extends CachedTokenOptions {
  /** The service account's JSON key file. */
  keyFile: string;
  /** Whom the id token is for: the client id that the kedge expects. */
  audience: string;
  /** Default: what the key file says, `https://oauth2.googleapis.com/token`. */
  tokenUrl?: string;
  /** Discovers the token endpoint of this provider instead. */
  issuer?: string;
  /** Asked for as well. Default: none. */
  scopes?: readonly string[];
}

interface Key {
  client_email: string;
  private_key: string;
  private_key_id?: string;
  token_uri?: string;
}

const GRANT = 'urn:ietf:params:oauth:grant-type:jwt-bearer';
const ASSERTION_LIFE = '5m';

const OPTIONS = object({
  ...CACHE,
  keyFile: path,
  audience: text('whom the token is for'),
  tokenUrl: optional(url),
  issuer: optional(url),
  scopes: or(strings, []),
} satisfies Table<GoogleServiceAccountTokenOptions>);

/**
 * An id token of a Google service account: an assertion signed with its key, exchanged at the token endpoint (RFC 7523
 * §2.1, https://developers.google.com/identity/protocols/oauth2/service-account). Needs the optional peer `jose`. The key
 * file is read with each refresh.
 *
 * @example
 * ```ts
 * import { googleServiceAccountToken } from 'kedge-dialer';
 *
 * const token = googleServiceAccountToken({ keyFile: '/secrets/key.json', audience: 'kedge' });
 * ```
 *
 * @throws {@link KedgeError} `ERR_KEDGE_OPTIONS`
 */
export function googleServiceAccountToken(options: GoogleServiceAccountTokenOptions): TokenSource {
  const given = check('googleServiceAccountToken', OPTIONS, options);
  const { keyFile, audience, tokenUrl, issuer, scopes, deadlineMs, name = 'google' } = given;
  const fetchToken = async (signal: AbortSignal): Promise<FetchedToken> => {
    const key = readKey(name, keyFile);
    const discovered = issuer === undefined ? undefined : await tokenEndpoint(name, issuer, signal);
    const url = tokenUrl ?? discovered ?? key.token_uri ?? 'https://oauth2.googleapis.com/token';
    const body = new URLSearchParams({ grant_type: GRANT, assertion: await sign(name, key, url, audience, scopes) });
    const response = await fetch(url, { method: 'POST', body, signal, redirect: 'error' });
    const answer = (await response.json().catch(() => undefined)) as Record<string, unknown> | undefined;
    const token = answer?.['id_token'];
    if (response.ok && typeof token === 'string') return { token, expiresAt: expiryOf(token) };
    const code = /^[a-z_]{1,40}$/.exec(String(answer?.['error'] ?? ''))?.[0] ?? 'no id token';
    throw tokenError(name, `the token endpoint answered ${response.status}: ${code}`);
  };
  return cachedToken(fetchToken, { name, deadlineMs });
}

/** OpenID Connect Discovery 1.0 §4. */
async function tokenEndpoint(name: string, issuer: string, signal: AbortSignal): Promise<string> {
  const url = `${issuer.replace(/\/$/, '')}/.well-known/openid-configuration`;
  const response = await fetch(url, { signal, redirect: 'error' });
  const answer = (await response.json().catch(() => undefined)) as Record<string, unknown> | undefined;
  const endpoint = answer?.['token_endpoint'];
  if (response.ok && typeof endpoint === 'string' && endpoint.startsWith(new URL(issuer).protocol)) return endpoint;
  throw tokenError(name, `the provider ${issuer} names no token endpoint (${response.status})`);
}

async function sign(name: string, key: Key, url: string, audience: string, scopes: readonly string[]): Promise<string> {
  const { SignJWT, importPKCS8 } = await loadPeer(name, 'jose', () => import('jose'));
  const claims = { target_audience: audience, ...(scopes.length > 0 ? { scope: scopes.join(' ') } : {}) };
  const header = { alg: 'RS256', typ: 'JWT', ...(key.private_key_id ? { kid: key.private_key_id } : {}) };
  return new SignJWT(claims)
    .setProtectedHeader(header)
    .setIssuer(key.client_email)
    .setSubject(key.client_email)
    .setAudience(url)
    .setIssuedAt()
    .setExpirationTime(ASSERTION_LIFE)
    .sign(await importPKCS8(key.private_key, 'RS256'));
}

function readKey(name: string, file: string): Key {
  let key: unknown;
  try {
    key = JSON.parse(readRegularFile(file).toString('utf8'));
  } catch (cause) {
    throw tokenError(name, `\`keyFile\`: the key file ${file} cannot be read`, cause);
  }
  const { client_email, private_key } = (key ?? {}) as Partial<Key>;
  if (typeof client_email === 'string' && typeof private_key === 'string') return key as Key;
  throw tokenError(name, `the key file ${file} has no client_email or private_key`);
}
