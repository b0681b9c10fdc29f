import { type CachedTokenOptions, cachedToken } from './cached-token.ts';
import { expiryOf } from './jwt.ts';
import { loadPeer } from './peer-package.ts';
import { type TokenSource, tokenError } from './token-source.ts';

/** Options of {@link kubeconfigToken}. */
export interface KubeconfigTokenOptions extends CachedTokenOptions {
  /** Default: `KUBECONFIG`, then `~/.kube/config`, then the pod's service account. */
  path?: string;
  /** A user of the file. Default: that of the current context. */
  user?: string;
}

/** How long a token counts that does not say when it expires, in ms. */
const DEFAULT_LIFE_MS = 60_000;

/**
 * The bearer token of a user in a kubeconfig: `token`, `exec` or an auth provider such as `oidc`, by way of the optional
 * peer `@kubernetes/client-node`. The file is read again with each refresh.
 */
export function kubeconfigToken(options: KubeconfigTokenOptions = {}): TokenSource {
  const { path, user, ...cache } = options;
  const name = cache.name ?? `kubeconfig${user === undefined ? '' : ` ${user}`}`;
  const fetchToken = async () => {
    const { KubeConfig } = await loadPeer(name, '@kubernetes/client-node', () => import('@kubernetes/client-node'));
    const config = new KubeConfig();
    try {
      if (path === undefined) config.loadFromDefault();
      else config.loadFromFile(path);
    } catch (cause) {
      throw tokenError(name, 'the kubeconfig cannot be read', cause);
    }
    if (user !== undefined) {
      if (config.getUser(user) === null) throw tokenError(name, `the kubeconfig has no user "${user}"`);
      const cluster = config.getCurrentCluster()?.name ?? config.clusters[0]?.name ?? '';
      config.contexts = [{ name: 'kedge-dialer', user, cluster }];
      config.setCurrentContext('kedge-dialer');
    }
    const applied: { headers?: Record<string, unknown> } = {};
    await config.applyToHTTPSOptions(applied as never);
    const token = /^Bearer (.+)$/.exec(String(applied.headers?.['Authorization'] ?? ''))?.[1];
    if (token === undefined) throw tokenError(name, 'the user of the kubeconfig has no bearer token');
    return { token, expiresAt: expiryOf(token) ?? new Date(Date.now() + DEFAULT_LIFE_MS) };
  };
  return cachedToken(fetchToken, { ...cache, name });
}
