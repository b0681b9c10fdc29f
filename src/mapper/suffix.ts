import { LRUCache } from 'lru-cache';
import { ROUTE_OPTIONS, type Route, type RouteOptions, route } from '../route.ts';
import { KedgeError, quote } from '../support/errors.ts';
import { check, is, isString, object, oneOf, optional, type Table } from '../support/shape.ts';
import { parseTarget } from '../target.ts';
import { described } from './describe.ts';
import type { Mapper } from './mapper.ts';

/** Options of {@link suffix}: the pattern, and what belongs to every route that it makes. */
export interface SuffixOptions extends RouteOptions {
  /** The end of the targets' names, starting with `*.`; each `*` captures one label: `*.*.clusters.local`. */
  match: string;
  /** What follows the captured labels in the kedge's name, starting with `.`: `.kedge.example.com`. */
  suffix: string;
  /** The kedges' scheme. Default: `https`. */
  scheme?: 'https' | 'http';
}

const OPTIONS = object({
  ...ROUTE_OPTIONS,
  match: is('a pattern that starts with "*."', (value): value is string => isString(value) && value.startsWith('*.')),
  suffix: is('a name that starts with "."', (value): value is string => isString(value) && value.startsWith('.')),
  scheme: optional(oneOf('https', 'http')),
} satisfies Table<SuffixOptions>);

/** Kedges are few, so this many different captures are remembered; more still work. */
const MAX_ROUTES = 1000;

/**
 * The cluster's name in the target becomes the kedge's name: with the options above,
 * `orders.shop.us1.prod.clusters.local` is served by `https://us1.prod.kedge.example.com`. Labels are matched from the
 * right; more labels on the left are ignored, fewer do not match. The original's `suffix` mapper.
 *
 * @example
 * ```ts
 * import { suffix } from 'kedge-dialer';
 *
 * const mapper = suffix({ match: '*.*.clusters.local', suffix: '.kedge.example.com' });
 * ```
 *
 * @throws {@link KedgeError} `ERR_KEDGE_ROUTE`
 */
export function suffix(options: SuffixOptions): Mapper {
  check('suffix', OPTIONS, options, { code: 'ERR_KEDGE_ROUTE' });
  const { match, suffix: tail, scheme = 'https', ...routeOptions } = options;
  const wanted = match.split('.');
  if (wanted.some((label) => label.includes('*') && label !== '*'))
    throw invalid(`\`match\` ${quote(match)}: "*" is a whole label`);
  const named = canonicalLabels('match', wanted.map((label) => (label === '*' ? 'any' : label)).join('.'), match);
  const pattern = named.map((label, i) => (wanted[i] === '*' ? '*' : label));
  // Most names that do not match do not end like it: that is seen without taking them apart.
  const ending = `.${pattern.slice(pattern.lastIndexOf('*') + 1).join('.')}`;
  const end = canonicalLabels('suffix', tail.slice(1), tail).join('.');
  // Building one route now finds mistakes in the options before the first call does.
  route({ ...routeOptions, kedge: `${scheme}://x.${end}` });

  const routes = new LRUCache<string, Route>({ max: MAX_ROUTES });
  const mapper: Mapper = (target) => {
    const captured = target.hostname.endsWith(ending) ? capture(pattern, target.hostname) : undefined;
    if (captured === undefined) return undefined;
    let found = routes.get(captured);
    if (found === undefined) {
      found = route({ ...routeOptions, kedge: `${scheme}://${captured}.${end}` });
      routes.set(captured, found);
    }
    return found;
  };
  return described(mapper, ({ hostname }) => {
    const captured = capture(pattern, hostname);
    return `suffix ${quote(match)} ${captured === undefined ? 'does not match' : `captures ${quote(captured)}`}`;
  });
}

function capture(pattern: readonly string[], hostname: string): string | undefined {
  const labels = hostname.split('.');
  const extra = labels.length - pattern.length;
  if (extra < 0) return undefined;
  const captured: string[] = [];
  for (const [i, wanted] of pattern.entries()) {
    const label = labels[extra + i]!;
    if (wanted === '*') captured.push(label);
    else if (wanted !== label) return undefined;
  }
  return captured.join('.');
}

function canonicalLabels(field: string, name: string, input: string): string[] {
  try {
    return parseTarget(name).hostname.split('.');
  } catch (cause) {
    throw invalid(`\`${field}\` ${quote(input)} is not a valid name`, cause);
  }
}

function invalid(reason: string, cause?: unknown): KedgeError {
  return new KedgeError('ERR_KEDGE_ROUTE', `suffix: ${reason}`, { cause });
}
