import { KedgeError } from '../errors.ts';
import { parseTarget, type Target } from '../target.ts';

/** Headers as undici's callers give them: object, flat array, `Headers`, Map, generator of pairs, or nothing. */
export type HeadersInput =
  | Record<string, unknown>
  | readonly unknown[]
  | Iterable<readonly [string, unknown]>
  | null
  | undefined;

/** What the route adds to a request. */
export interface InjectedHeaders {
  readonly target: Target;
  /** `Bearer <token>` for the kedge. */
  readonly proxyAuth: string | undefined;
  /** `Bearer <token>` for the backend. */
  readonly backendAuth: string | undefined;
  readonly overrideAuthorization: boolean;
  /** A value for `X-Kedge-Request-ID` where the caller set none. */
  readonly requestId: string | undefined;
}

/** A header as undici takes it; values are checked by undici unless the rules below concern them. */
export type FlatHeaders = (string | string[])[];

/**
 * The headers of a mapped request as one flat array; the caller's are read, never changed. `Host` is always the
 * canonical target, exactly one `Authorization` goes out, and what would let a request mean two things is refused.
 *
 * @throws {@link KedgeError} `ERR_KEDGE_REQUEST`
 */
export function flatHeaders(input: HeadersInput, injected: InjectedHeaders): FlatHeaders {
  const flat = new FlatHeaderList(injected);
  if (Array.isArray(input)) {
    if (input.length % 2 !== 0) throw flat.refuse('a flat headers array has an even length');
    for (let i = 0; i < input.length; i += 2) flat.add(input[i], input[i + 1]);
  } else if (typeof input === 'object' && input !== null) {
    if (isIterable(input)) {
      for (const pair of input) {
        if (!Array.isArray(pair) || pair.length !== 2) throw flat.refuse('headers are not in pairs');
        flat.add(pair[0], pair[1]);
      }
    } else {
      // Faster than Object.keys() on the plain objects that nearly all requests have.
      for (const name in input)
        if (Object.hasOwn(input, name)) flat.add(name, (input as Record<string, unknown>)[name]);
    }
  } else if (input !== undefined && input !== null) {
    throw flat.refuse('headers are an object or an array');
  }
  return flat.end();
}

class FlatHeaderList {
  private readonly list: FlatHeaders;
  private readonly injected: InjectedHeaders;
  private authorization = false;
  private requestId = false;
  private contentLength: string | undefined;

  constructor(injected: InjectedHeaders) {
    this.injected = injected;
    this.list = ['host', injected.target.authority];
  }

  add(name: unknown, value: unknown): void {
    if (typeof name !== 'string') throw this.refuse('a header name is not a string');
    if (value === undefined) return;
    // Only names of these lengths have a rule, so all others pass without being lower-cased.
    switch (name.length) {
      case 4:
      case 6:
      case 10:
      case 13:
      case 14:
      case 17:
      case 18:
      case 19:
        if (this.special(name.toLowerCase(), value)) return;
    }
    this.list.push(name, value as string);
  }

  end(): FlatHeaders {
    const { list, injected } = this;
    if (injected.proxyAuth !== undefined) list.push('proxy-authorization', injected.proxyAuth);
    if (injected.backendAuth !== undefined && !this.authorization) list.push('authorization', injected.backendAuth);
    if (injected.requestId !== undefined && !this.requestId) list.push('x-kedge-request-id', injected.requestId);
    return list;
  }

  refuse(reason: string): KedgeError {
    return new KedgeError('ERR_KEDGE_REQUEST', 'request', reason, { target: this.injected.target.authority });
  }

  /** Whether the header is dealt with; false lets it pass as it is. */
  private special(name: string, value: unknown): boolean {
    switch (name) {
      case 'host':
        this.checkHost(value);
        return true;
      case 'authorization':
        if (this.injected.backendAuth !== undefined && this.injected.overrideAuthorization) return true;
        if (this.authorization || (Array.isArray(value) && value.length !== 1)) {
          throw this.refuse('more than one authorization header');
        }
        this.authorization = true;
        return false;
      case 'proxy-authorization':
        if (this.injected.proxyAuth === undefined) return false;
        throw this.refuse('the route brings its own proxy-authorization header');
      case 'x-kedge-request-id':
        this.requestId = true;
        return false;
      case 'content-length':
        this.setContentLength(value);
        return true;
      case 'connection':
        if (/^(?:close|keep-alive)$/i.test(String(value))) return false;
        throw this.refuse('a connection header may only say close or keep-alive');
      case 'transfer-encoding':
      case 'keep-alive':
        throw this.refuse(`a ${name} header belongs to a connection, not to a request`);
      case 'expect':
        throw this.refuse('an expect header is not supported');
      default:
        return false;
    }
  }

  private checkHost(value: unknown): void {
    const { target } = this.injected;
    if (value === target.authority) return;
    let same = false;
    try {
      same = typeof value === 'string' && parseTarget(`${target.protocol}//${value}`).authority === target.authority;
    } catch {
      // Not a host at all: refused below, like any other host than the target's.
    }
    if (!same) throw this.refuse('the host header is not the target');
  }

  private setContentLength(value: unknown): void {
    // Node 22's own fetch joins a caller's content-length with its own: "3, 3".
    const lengths = (Array.isArray(value) ? value : [value]).flatMap((each) => String(each).split(','));
    for (const each of lengths) {
      const length = each.trim();
      if (!/^[0-9]{1,15}$/.test(length)) throw this.refuse('an invalid content-length header');
      if (this.contentLength === undefined) {
        this.contentLength = length;
        this.list.push('content-length', length);
      } else if (this.contentLength !== length) {
        throw this.refuse('content-length headers that disagree');
      }
    }
  }
}

/** Pairs, but not a plain object that inherits an iterator from a polluted prototype. */
function isIterable(input: object): input is Iterable<unknown> {
  const prototype: unknown = Object.getPrototypeOf(input);
  if ((prototype === Object.prototype || prototype === null) && !Object.hasOwn(input, Symbol.iterator)) return false;
  return typeof (input as Partial<Iterable<unknown>>)[Symbol.iterator] === 'function';
}
