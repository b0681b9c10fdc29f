import { abandon } from '../support/abandon.ts';
import { orAbort } from '../support/abort.ts';
import { debug } from '../support/debug.ts';
import { KedgeError } from '../support/errors.ts';
import { hide } from '../support/redact.ts';
import { TOKEN_DEADLINE_MS, type TokenSource, tokenError } from './token-source.ts';

/** RFC 6750 tokens are a subset of this; anything outside could end a header early or is a mistake such as a newline. */
const TOKEN = /^[\x21-\x7e]{1,16384}$/;

/**
 * A token source as a header value. The last token is remembered with its header, so a token that did not change is
 * neither checked nor concatenated again. Both wires use this, so no token reaches either unchecked.
 */
export class Bearer {
  readonly source: TokenSource;
  private lastToken: string | undefined;
  private lastHeader = '';
  private refused: string | undefined;

  constructor(source: TokenSource) {
    this.source = source;
    // Whoever prints what holds this prints no token.
    hide(this, `Bearer(${source.name})`);
  }

  /** `Bearer <token>` without waiting, or undefined when the source has none at hand. */
  peek(): string | undefined {
    let token: unknown;
    try {
      token = this.source.peek();
    } catch (error) {
      throw this.fail('the source failed', error);
    }
    if (token === this.lastToken && token !== undefined) return this.lastHeader;
    return token === undefined ? undefined : this.header(token);
  }

  /** `Bearer <token>`, waiting for the source until {@link TOKEN_DEADLINE_MS} or until `signal` aborts. */
  async wait(signal: AbortSignal): Promise<string> {
    const ready = this.peek();
    if (ready !== undefined) return ready;
    debug.auth('%s: waiting for a token', this.source.name);
    const deadline = AbortSignal.timeout(TOKEN_DEADLINE_MS);
    const either = AbortSignal.any([signal, deadline]);
    try {
      return this.header(await orAbort(this.source.token(either), either));
    } catch (error) {
      if (signal.aborted) throw signal.reason;
      if (deadline.aborted) throw this.fail(`no token within ${TOKEN_DEADLINE_MS} ms`);
      throw this.fail('the source failed', error);
    }
  }

  /**
   * The token behind `header` was refused: the source forgets it, once for each token value, so that a refusal which is
   * not the token's fault cannot make every call fetch a new one. Returns whether asking again may help.
   */
  invalidate(header: string | undefined): boolean {
    if (header === undefined || this.source.invalidate === undefined) return false;
    try {
      const ready = this.source.peek();
      // Many calls are refused with one token: the first had it replaced, and the others are not to undo that.
      if (ready !== undefined && `Bearer ${ready}` !== header) return true;
      if (header === this.refused) return this.lastToken === undefined || header !== this.lastHeader;
      this.refused = header;
      if (header === this.lastHeader) this.lastToken = undefined;
      abandon(this.source.invalidate());
      return true;
    } catch (error) {
      debug.auth('%s', this.fail('the source cannot forget a refused token', error).message);
      return false;
    }
  }

  private header(token: unknown): string {
    if (typeof token !== 'string' || !TOKEN.test(token)) {
      abandon(token);
      const reason = 'what the source gave is not a token: 1 to 16384 visible ASCII characters without spaces';
      throw new KedgeError('ERR_KEDGE_TOKEN', `token source ${this.source.name}: ${reason}`);
    }
    this.lastToken = token;
    this.lastHeader = `Bearer ${token}`;
    return this.lastHeader;
  }

  private fail(reason: string, cause?: unknown): KedgeError {
    return tokenError(this.source.name, reason, cause);
  }
}
