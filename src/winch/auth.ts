import { googleServiceAccountToken } from '../auth/google-token.ts';
import { kubeconfigToken } from '../auth/kubeconfig-token.ts';
import { type OidcTokenOptions, oidcToken } from '../auth/oidc-token.ts';
import { staticToken } from '../auth/static-token.ts';
import type { TokenSource } from '../auth/token-source.ts';
import { isKedgeError } from '../support/errors.ts';
import { list, type Node, object, text, wrong } from './json.ts';

/** How somebody logs in at an OpenID Connect provider. */
export interface WinchLogin {
  /** Where this process is reached by the browser: `http://127.0.0.1:8070`. A source's `login_callback_path` is added. */
  origin: string;
  /** Sends the browser to `authorizationUrl`, and gives the URL at which it came back to `callback`. */
  open(source: string, authorizationUrl: URL, callback: URL, signal: AbortSignal): Promise<URL>;
}

interface AuthSource {
  name: string;
  token: Partial<{ token: string }>;
  dummy: Partial<{ value: string }>;
  kube: Partial<{ user: string; path: string }>;
  oidc: Partial<OidcSource & { path: string; loginCallbackPath: string }>;
  serviceAccountOidc: Partial<OidcSource & { serviceAccountJsonPath: string }>;
}

interface OidcSource {
  provider: string;
  clientId: string;
  secret: string;
  scopes: string[];
}

const oidcFields = { provider: text, clientId: text, secret: text, scopes: list(text) };

const authFile = object<{ authSources: { source: Partial<AuthSource>; node: Node }[] }>({
  authSources: list((node) => ({
    node,
    source: object<AuthSource>({
      name: text,
      token: object({ token: text }),
      dummy: object({ value: text }),
      kube: object({ user: text, path: text }),
      oidc: object({ ...oidcFields, path: text, loginCallbackPath: text }),
      serviceAccountOidc: object({ ...oidcFields, serviceAccountJsonPath: text }),
    })(node),
  })),
});

/**
 * The auth file's sources by name. Those that need the network, a file or a package do nothing before their first token.
 *
 * @throws {@link KedgeError} `ERR_KEDGE_ROUTE`
 */
export function authSources(file: Node, login: WinchLogin | undefined): Map<string, TokenSource> {
  const found = new Map<string, TokenSource>();
  for (const { source, node } of authFile(file).authSources ?? []) {
    const { name, ...kinds } = source;
    if (name === undefined || name === '') throw wrong(`${node.path}.name`, 'is required');
    if (found.has(name)) throw wrong(`${node.path}.name`, `"${name}" is there twice`);
    const [kind, ...more] = Object.keys(kinds) as (keyof typeof build)[];
    if (kind === undefined || more.length > 0)
      throw wrong(node.path, 'expected one of token, dummy, kube, oidc, service_account_oidc');
    try {
      found.set(name, build[kind](name, kinds[kind] as never, login));
    } catch (error) {
      // Never the file's own text: it holds tokens.
      throw wrong(node.path, isKedgeError(error) ? error.reason : 'cannot be used', error);
    }
  }
  return found;
}

type Build<K extends keyof AuthSource> = (
  name: string,
  source: AuthSource[K],
  login: WinchLogin | undefined,
) => TokenSource;

const build: { [K in Exclude<keyof AuthSource, 'name'>]: Build<K> } = {
  token: (name, { token = '' }) => staticToken(token, { name }),
  dummy: (name, { value = '' }) => staticToken(value, { name }),
  kube: (name, { user, path }) =>
    kubeconfigToken({ name, ...(user ? { user } : {}), ...(path ? { path: fromHome(path) } : {}) }),
  oidc: (name, { provider = '', clientId = '', secret, scopes, path, loginCallbackPath }, login) => {
    const options: OidcTokenOptions = {
      name,
      issuer: provider,
      clientId,
      grant: 'refresh_token',
      scopes: [...new Set(['openid', 'offline_access', ...(scopes ?? [])])],
      ...(secret ? { clientSecret: secret } : {}),
      ...(path ? { cacheFile: fromHome(path) } : {}),
    };
    if (login === undefined || !loginCallbackPath) return oidcToken(options);
    const callback = new URL(loginCallbackPath, login.origin);
    const open = (url: URL, signal: AbortSignal) => login.open(name, url, callback, signal);
    return oidcToken({ ...options, login: open, redirectUri: callback.href });
  },
  serviceAccountOidc: (name, { provider, clientId = '', scopes, serviceAccountJsonPath = '' }) =>
    googleServiceAccountToken({
      name,
      keyFile: serviceAccountJsonPath,
      audience: clientId,
      ...(provider ? { issuer: provider } : {}),
      ...(scopes ? { scopes } : {}),
    }),
};

/** The two ways in which the original's files name it. */
function fromHome(path: string): string {
  return path.replace(/^(?:~|\$HOME)(?=\/)/, () => process.env['HOME'] ?? '~');
}
