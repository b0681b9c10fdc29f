import type { IncomingMessage, OutgoingHttpHeaders } from 'node:http';

/** What pages of allowed origins may send, as in the original (rs/cors with its defaults); never credentials. */
const METHODS = new Set(['GET', 'POST', 'HEAD']);
const HEADERS = new Set(['origin', 'accept', 'content-type', 'x-requested-with']);
const CHANGES_NOTHING = new Set(['GET', 'HEAD', 'OPTIONS']);

/** What pages elsewhere may do through winch, which adds tokens to what they ask for. */
export class Cors {
  private readonly patterns: readonly (readonly [start: string, end: string | undefined])[];

  /** `*`, origins, or origins with one `*` in them. None: backends decide. */
  constructor(origins: readonly string[]) {
    this.patterns = origins.map((each) => {
      const [start = '', ...end] = each.toLowerCase().split('*');
      return [start, end.length === 0 ? undefined : end.join('*')];
    });
  }

  /** For the answer to a request; `isPreflight`: that is the whole answer. */
  answer({ method, headers }: IncomingMessage): { isPreflight: boolean; headers: OutgoingHttpHeaders } {
    if (this.patterns.length === 0) return { isPreflight: false, headers: {} };
    const { origin = '', 'access-control-request-method': asked, 'access-control-request-headers': names } = headers;
    const isPreflight = method === 'OPTIONS' && asked !== undefined;
    const vary = isPreflight ? 'Origin, Access-Control-Request-Method, Access-Control-Request-Headers' : 'Origin';
    const wanted = isPreflight ? asked.toUpperCase() : method!;
    const sent = names?.toLowerCase().split(/[\s,]+/) ?? [];
    if (!this.allows(origin) || !METHODS.has(wanted) || !sent.every((name) => name === '' || HEADERS.has(name)))
      return { isPreflight, headers: { vary } };
    const more = { 'access-control-allow-methods': wanted, 'access-control-allow-headers': names };
    return { isPreflight, headers: { vary, 'access-control-allow-origin': origin, ...(isPreflight ? more : {}) } };
  }

  /** Whether a page elsewhere wants to change something or to talk on, for which it needs no leave to read an answer. */
  isForeign({ method, headers: { origin, upgrade } }: IncomingMessage, isKnown: (origin: string) => boolean): boolean {
    if (origin === undefined || (CHANGES_NOTHING.has(method!) && upgrade === undefined)) return false;
    return !this.allows(origin) && !isKnown(origin);
  }

  private allows(origin: string): boolean {
    const text = origin.toLowerCase();
    return this.patterns.some(([start, end]) => {
      if (end === undefined) return text === start;
      return text.length > start.length + end.length && text.startsWith(start) && text.endsWith(end);
    });
  }
}

/** Both lists of names, such as a backend's `Vary` and ours. */
export function joined(one: OutgoingHttpHeaders, other: OutgoingHttpHeaders): OutgoingHttpHeaders {
  const vary = [one['vary'] ?? [], other['vary'] ?? []].flat().join(', ');
  return { ...one, ...other, ...(vary === '' ? {} : { vary }) };
}
