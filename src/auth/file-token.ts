import { lookAt, readRegularFile } from '../read-file.ts';
import { debug } from '../support/debug.ts';
import type { KedgeError } from '../support/errors.ts';
import { hide } from '../support/redact.ts';
import { check, path as filePath, object, optional, string, type Table } from '../support/shape.ts';
import { expiryOf } from './jwt.ts';
import { type TokenSource, tokenError } from './token-source.ts';

/** Options of {@link fileToken}. */
export interface FileTokenOptions {
  /** How errors, logs and `explain()` call this source. Default: the path. */
  name?: string;
}

const OPTIONS = object({ name: optional(string) } satisfies Table<FileTokenOptions>);

/** How often a call looks whether the file has changed, in ms. */
const LOOK_MS = 1000;

/**
 * A token in a file, such as a projected Kubernetes service-account token: read by the first call, and again when the
 * file has changed. While it cannot be read, the last token serves until it expires. Nothing is watched: a call looks at
 * the file, at most once a second, which works on every file system.
 *
 * @example
 * ```ts
 * import { fileToken, route } from 'kedge-dialer';
 *
 * const us1 = route({ kedge: 'https://us1.kedge.example.com', proxyAuth: fileToken('/var/run/secrets/kedge/token') });
 * ```
 *
 * @throws {@link KedgeError} `ERR_KEDGE_OPTIONS`
 */
export function fileToken(path: string, options: FileTokenOptions = {}): TokenSource {
  check('fileToken', filePath, path, { path: 'path' });
  const { name = path } = check('fileToken', OPTIONS, options);
  return new FileToken(path, name);
}

class FileToken implements TokenSource {
  readonly name: string;
  private readonly path: string;
  private current: string | undefined;
  private expires = Number.POSITIVE_INFINITY;
  private version = '';
  private lookAgain = 0;
  private failure: KedgeError | undefined;

  constructor(path: string, name: string) {
    this.path = path;
    this.name = name;
    hide(this, `TokenSource(${name})`);
  }

  peek(): string | undefined {
    const now = performance.now();
    if (now >= this.lookAgain) {
      this.lookAgain = now + LOOK_MS;
      this.look();
    }
    if (this.current === undefined) throw this.failure;
    if (Date.now() < this.expires) return this.current;
    throw this.failure ?? tokenError(this.name, 'the token in the file has expired');
  }

  async token(): Promise<string> {
    return this.peek() as string;
  }

  invalidate(): void {
    // The next call looks at once; when the file is unchanged, what it holds is all there is.
    this.lookAgain = 0;
    this.version = '';
  }

  private look(): void {
    try {
      // Through symbolic links: Kubernetes replaces the directory behind `..data`.
      const { version, settled } = lookAt(this.path);
      if (version === this.version) return;
      const token = readRegularFile(this.path).toString('utf8').trim();
      if (token === '') throw tokenError(this.name, 'the file is empty');
      this.current = token;
      this.expires = expiryOf(token)?.getTime() ?? Number.POSITIVE_INFINITY;
      this.version = settled ? version : '';
      this.failure = undefined;
      debug.auth('%s: read', this.name);
    } catch (error) {
      this.failure = tokenError(this.name, `\`path\`: ${this.path} cannot be read`, error);
      debug.auth('%s', this.failure.message);
    }
  }
}
