import { hide } from '../support/redact.ts';
import { check, object, or, string, type Table } from '../support/shape.ts';
import { Bearer } from './bearer.ts';
import type { TokenSource } from './token-source.ts';

/** Options of {@link staticToken}. */
export interface StaticTokenOptions {
  /** How errors, logs and `explain()` call this source. Default: `static`. */
  name?: string;
}

const OPTIONS = object({ name: or(string, 'static') } satisfies Table<StaticTokenOptions>);

/**
 * A token that never changes, such as the one behind the original's `--unsafe_bearer_token_proxy_auth`.
 *
 * @example
 * ```ts
 * import { route, staticToken } from 'kedge-dialer';
 *
 * const token = staticToken(process.env['KEDGE_TOKEN'] ?? 'from-a-secret', { name: 'us1' });
 * const us1 = route({ kedge: 'https://us1.kedge.example.com', proxyAuth: token });
 * ```
 *
 * @throws {@link KedgeError} `ERR_KEDGE_TOKEN` when it is not 1 to 16384 visible ASCII characters without spaces,
 * `ERR_KEDGE_OPTIONS`
 */
export function staticToken(token: string, options: StaticTokenOptions = {}): TokenSource {
  const { name } = check('staticToken', OPTIONS, options);
  const source: TokenSource = { name, peek: () => token, token: () => Promise.resolve(token) };
  hide(source, `TokenSource(${source.name})`);
  new Bearer(source).peek();
  return Object.freeze(source);
}
