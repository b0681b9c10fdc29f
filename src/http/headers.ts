import { keepsOwn, type Tokens } from '../engine/credentials.ts';
import { KedgeError } from '../support/errors.ts';
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
  readonly tokens: Tokens;
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
  const list: FlatHeaders = ['host', injected.target.authority];
  let seen = 0;
  if (Array.isArray(input)) {
    if (input.length % 2 !== 0) throw refuse(injected, 'a flat headers array has an even length');
    for (let i = 0; i < input.length; i += 2) seen |= add(list, seen, injected, input[i], input[i + 1]);
  } else if (typeof input === 'object' && input !== null) {
    if (isIterable(input)) {
      for (const pair of input) {
        if (!Array.isArray(pair) || pair.length !== 2) throw refuse(injected, 'headers are not in pairs');
        seen |= add(list, seen, injected, pair[0], pair[1]);
      }
    } else {
      for (const name of Object.keys(input)) {
        seen |= add(list, seen, injected, name, (input as Record<string, unknown>)[name]);
      }
    }
  } else if (input !== undefined && input !== null) {
    throw refuse(injected, 'headers are an object or an array');
  }
  const { requestId } = injected;
  const { proxyAuth, backendAuth } = injected.tokens;
  if (proxyAuth !== undefined) list.push('proxy-authorization', proxyAuth);
  if (backendAuth !== undefined && (seen & AUTHORIZATION) === 0) list.push('authorization', backendAuth);
  if (requestId !== undefined && (seen & REQUEST_ID) === 0) list.push('x-kedge-request-id', requestId);
  return list;
}

/** What a request has brought of its own, as bits: this runs for each header of each request. */
const AUTHORIZATION = 1;
const REQUEST_ID = 2;
/** A name that is not in lower case. */
const SPELLED = 4;

function add(list: FlatHeaders, seen: number, injected: InjectedHeaders, name: unknown, value: unknown): number {
  if (typeof name !== 'string') throw refuse(injected, 'a header name is not a string');
  if (value === undefined) return 0;
  const lower = name.toLowerCase();
  const spelled = lower === name ? 0 : SPELLED;
  const spelling = ((seen | spelled) & SPELLED) === 0 ? name : (spellingOf(list, lower) ?? name);
  if (mayBeSpecial(lower)) return spelled | addSpecial(list, seen, injected, spelling, lower, value);
  list.push(spelling, value as string);
  return spelled;
}

/**
 * How the list has a name already. For undici two spellings are two headers, and for node:http2 a request that may not be
 * made: undici answers that by ending the connection (nodejs/undici, `openStream()` in lib/dispatcher/client-h2.js).
 */
function spellingOf(list: FlatHeaders, lower: string): string | undefined {
  for (let i = 0; i < list.length; i += 2) {
    const name = list[i] as string;
    if (name.length === lower.length && name.toLowerCase() === lower) return name;
  }
  return undefined;
}

/** Whether length and first letter are those of a header with a rule. */
function mayBeSpecial(lower: string): boolean {
  const first = lower.charCodeAt(0);
  switch (lower.length) {
    case 2:
      return first === 0x74; // te
    case 4:
      return first === 0x68; // host
    case 6:
      return first === 0x65; // expect
    case 10:
      return first === 0x63 || first === 0x6b; // connection, keep-alive
    case 13:
      return first === 0x61; // authorization
    case 14:
      return first === 0x63 || first === 0x68; // content-length, http2-settings
    case 16:
      return first === 0x70; // proxy-connection
    case 17:
      return first === 0x74; // transfer-encoding
    case 18:
      return first === 0x78; // x-kedge-request-id
    case 19:
      return first === 0x70; // proxy-authorization
    default:
      return false;
  }
}

function addSpecial(
  list: FlatHeaders,
  seen: number,
  injected: InjectedHeaders,
  name: string,
  lower: string,
  value: unknown,
): number {
  switch (lower) {
    case 'host':
      checkHost(injected, value);
      return 0;
    case 'content-length':
      addContentLength(list, injected, value);
      return 0;
    case 'authorization':
      if (!keepsOwn(injected.tokens)) return 0;
      if ((seen & AUTHORIZATION) !== 0 || (Array.isArray(value) && value.length !== 1)) {
        throw refuse(injected, 'more than one authorization header');
      }
      list.push(name, value as string);
      return AUTHORIZATION;
    case 'proxy-authorization':
      if (injected.tokens.proxyAuth !== undefined)
        throw refuse(injected, 'the route brings its own proxy-authorization header');
      break;
    case 'connection':
      if (!/^(?:close|keep-alive)$/i.test(String(value))) {
        throw refuse(injected, 'a connection header may only say close or keep-alive');
      }
      break;
    case 'te':
      // RFC 9113 §8.2.2: nothing else, and node:http2 takes it once and in this spelling only.
      if (String(value).toLowerCase() !== 'trailers') throw refuse(injected, 'a te header may only say trailers');
      if (spellingOf(list, 'te') === undefined) list.push('te', 'trailers');
      return 0;
    case 'transfer-encoding':
    case 'keep-alive':
    case 'proxy-connection':
    case 'http2-settings':
      throw refuse(injected, `a ${lower} header belongs to a connection, not to a request`);
    case 'expect':
      throw refuse(injected, 'an expect header is not supported');
  }
  list.push(name, value as string);
  return lower === 'x-kedge-request-id' ? REQUEST_ID : 0;
}

function checkHost(injected: InjectedHeaders, value: unknown): void {
  const { target } = injected;
  if (value === target.authority) return;
  let same = false;
  try {
    same = typeof value === 'string' && parseTarget(`${target.protocol}//${value}`).authority === target.authority;
  } catch {
    // Not a host at all: refused below, like any other host than the target's.
  }
  if (!same) throw refuse(injected, 'the host header is not the target');
}

function addContentLength(list: FlatHeaders, injected: InjectedHeaders, value: unknown): void {
  const at = list.indexOf('content-length');
  let known = at === -1 ? undefined : list[at + 1];
  // Node 22's own fetch joins a caller's content-length with its own: "3, 3".
  for (const each of (Array.isArray(value) ? value : [value]).flatMap((lengths) => String(lengths).split(','))) {
    const length = each.trim();
    if (!/^[0-9]{1,15}$/.test(length)) throw refuse(injected, 'an invalid content-length header');
    if (known === undefined) list.push('content-length', length);
    else if (known !== length) throw refuse(injected, 'content-length headers that disagree');
    known = length;
  }
}

function refuse({ target }: InjectedHeaders, reason: string): KedgeError {
  return new KedgeError('ERR_KEDGE_REQUEST', reason, { target: target.authority });
}

/** Pairs, but not a plain object that inherits an iterator from a polluted prototype. */
function isIterable(input: object): input is Iterable<unknown> {
  if (typeof (input as Partial<Iterable<unknown>>)[Symbol.iterator] !== 'function') return false;
  const prototype: unknown = Object.getPrototypeOf(input);
  return (prototype !== Object.prototype && prototype !== null) || Object.hasOwn(input, Symbol.iterator);
}
