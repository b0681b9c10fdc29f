import { hide } from '../support/redact.ts';
import { Bearer } from './bearer.ts';
import type { TokenSource } from './token-source.ts';

/** Options of {@link staticToken}. */
export interface StaticTokenOptions {
  /** How errors, logs and `explain()` call this source. Default: `static`. */
  name?: string;
}

/**
 * A token that never changes, such as the one behind the original's `--unsafe_bearer_token_proxy_auth`.
 *
 * @throws {@link KedgeError} `ERR_KEDGE_TOKEN` when it is not 1 to 16384 visible ASCII characters without spaces
 */
export function staticToken(token: string, options: StaticTokenOptions = {}): TokenSource {
  const source: TokenSource = {
    name: options.name ?? 'static',
    peek: () => token,
    token: () => Promise.resolve(token),
  };
  hide(source, `TokenSource(${source.name})`);
  new Bearer(source).peek();
  return Object.freeze(source);
}
