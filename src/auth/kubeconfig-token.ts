import { homedir } from 'node:os';
import { delimiter, dirname, join, resolve } from 'node:path';
import { readRegularFile } from '../read-file.ts';
import { debug } from '../support/debug.ts';
import { check, path as filePath, object, optional, type Table, text } from '../support/shape.ts';
import { CACHE, type CachedTokenOptions, cachedToken } from './cached-token.ts';
import { expiryOf } from './jwt.ts';
import { loadPeer, type TokenSource, tokenError } from './token-source.ts';

/** Options of {@link kubeconfigToken}. */
export interface KubeconfigTokenOptions extends CachedTokenOptions {
  /** Default: `KUBECONFIG`, then `~/.kube/config`, then the pod's service account. */
  path?: string;
  /** A user of the file. Default: that of the current context. */
  user?: string;
}

const OPTIONS = object({
  ...CACHE,
  path: optional(filePath),
  user: optional(text('the name of a user in the file')),
} satisfies Table<KubeconfigTokenOptions>);

/** How long a token counts that does not say when it expires, in ms. */
const DEFAULT_LIFE_MS = 60_000;

/**
 * The bearer token of a user in a kubeconfig: `tokenFile`, `token`, `exec` or an auth provider such as `oidc`, by way of
 * the optional peer `@kubernetes/client-node`. The files are read again with each refresh.
 *
 * @example
 * ```ts
 * import { kubeconfigToken } from 'kedge-dialer';
 *
 * const token = kubeconfigToken({ user: 'developer' });
 * ```
 *
 * @throws {@link KedgeError} `ERR_KEDGE_OPTIONS`
 */
export function kubeconfigToken(options: KubeconfigTokenOptions = {}): TokenSource {
  const { path, user, deadlineMs, ...given } = check('kubeconfigToken', OPTIONS, options);
  const name = given.name ?? `kubeconfig${user === undefined ? '' : ` ${user}`}`;
  const fetchToken = async () => {
    const client = await loadPeer(name, '@kubernetes/client-node', () => import('@kubernetes/client-node'));
    const { KubeConfig, loadYaml } = client;
    const config = new KubeConfig();
    try {
      if (path === undefined) config.loadFromDefault();
      else {
        // Reading what is no file might never end.
        readRegularFile(path);
        config.loadFromFile(path);
      }
    } catch (cause) {
      const from = path === undefined ? 'KUBECONFIG' : '`path`';
      throw tokenError(name, `${from}: the kubeconfig ${filesOf(path).join(', ')} cannot be read`, cause);
    }
    if (user !== undefined) {
      if (config.getUser(user) === null) throw tokenError(name, `the kubeconfig has no user "${user}"`);
      const cluster = config.getCurrentCluster()?.name ?? config.clusters[0]?.name ?? '';
      config.contexts = [{ name: 'kedge-dialer', user, cluster }];
      config.setCurrentContext('kedge-dialer');
    }
    const fromFile = tokenInFile(filesOf(path), config.getCurrentUser()?.name, loadYaml);
    if (fromFile !== undefined) return { token: fromFile, expiresAt: lifeOf(fromFile) };
    const applied: { headers?: Record<string, unknown> } = {};
    await config.applyToHTTPSOptions(applied as never);
    const token = /^Bearer (.+)$/.exec(String(applied.headers?.['Authorization'] ?? ''))?.[1];
    if (token === undefined) throw tokenError(name, 'the user of the kubeconfig has no bearer token');
    return { token, expiresAt: lifeOf(token) };
  };
  return cachedToken(fetchToken, { name, deadlineMs });
}

function lifeOf(token: string): Date {
  return expiryOf(token) ?? new Date(Date.now() + DEFAULT_LIFE_MS);
}

/** Where kubectl looks. */
function filesOf(path: string | undefined): string[] {
  if (path !== undefined) return [path];
  const listed = process.env['KUBECONFIG'];
  return listed ? listed.split(delimiter).filter((each) => each !== '') : [join(homedir(), '.kube', 'config')];
}

interface RawUsers {
  users?: { name?: unknown; user?: { tokenFile?: unknown } | null }[];
}

/**
 * As client-go has it, the `tokenFile` of a user wins over its `token` while it can be read; the peer does not know this
 * field. The first file that has the user counts.
 */
function tokenInFile(
  files: readonly string[],
  user: string | undefined,
  parse: (text: string) => unknown,
): string | undefined {
  for (const file of files) {
    try {
      const { users } = (parse(readRegularFile(file).toString('utf8')) ?? {}) as RawUsers;
      const found = users?.find(({ name }) => name === user);
      if (found === undefined) continue;
      const tokenFile = found.user?.tokenFile;
      if (typeof tokenFile !== 'string' || tokenFile === '') return undefined;
      return (
        readRegularFile(resolve(dirname(file), tokenFile))
          .toString('utf8')
          .trim() || undefined
      );
    } catch (error) {
      debug.auth('no token file by way of %s (%s)', file, (error as NodeJS.ErrnoException).code);
    }
  }
  return undefined;
}
