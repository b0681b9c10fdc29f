import { LRUCache } from 'lru-cache';
import { ROUTE_OPTIONS, type Route, type RouteOptions, route } from '../route.ts';
import { KedgeError, quote } from '../support/errors.ts';
import { boolean, check, object, optional, string, type Table, text } from '../support/shape.ts';
import { isIP, type Target } from '../target.ts';
import { described } from './describe.ts';
import type { Mapper } from './mapper.ts';
import { compile, type Expression } from './re2.ts';
import { template } from './template.ts';

/** Options of {@link regexp}: the expression, the kedge, and what belongs to every route that it makes. */
export interface RegexpOptions extends RouteOptions {
  /** In RE2 syntax, with `(?P<name>...)` or `(?<name>...)` for groups; it is matched in linear time. */
  exp: string;
  /** The kedge's URL; `${name}` in its host, or as its port, is what the group matched. */
  url: string;
  /**
   * Search for the expression anywhere in `host[:port]`, as winch's files mean it, where by default it has to match the
   * whole host name. Default: false.
   */
  search?: boolean;
  /**
   * A route with tokens whose kedge host holds a `${group}` must end in two literal labels, because whoever names the
   * target would else name who receives the tokens. True says that this is meant. Default: false.
   */
  allowAnyHost?: boolean;
}

const OPTIONS = object({
  ...ROUTE_OPTIONS,
  exp: text('an expression in RE2 syntax'),
  url: string,
  search: optional(boolean),
  allowAnyHost: optional(boolean),
} satisfies Table<RegexpOptions>);

/** Kedges are few, so this many different URLs are remembered; more still work. */
const MAX_ROUTES = 1000;
/** The least that a kedge's host ends in where a group decides the rest and tokens are sent. */
export const LITERAL_LABELS = 2;

/**
 * By regular expression: with `exp: '.*[.](?P<cluster>[a-z0-9-]+)[.]clusters[.]local'` and
 * `url: 'https://${cluster}.kedge.example.com'`, `orders.us1.clusters.local` is served by `us1.kedge.example.com`. What is
 * captured is put in once, literally, and the kedge's name is checked label by label. The original's regexp routes.
 *
 * @example
 * ```ts
 * import { regexp } from 'kedge-dialer';
 *
 * const mapper = regexp({
 *   exp: '.*[.](?P<cluster>[a-z0-9-]+)[.]clusters[.]local',
 *   url: 'https://${cluster}.kedge.example.com',
 * });
 * ```
 *
 * @throws {@link KedgeError} `ERR_KEDGE_ROUTE`
 */
export function regexp(options: RegexpOptions): Mapper {
  check('regexp', OPTIONS, options, { code: 'ERR_KEDGE_ROUTE' });
  const { exp, url, search = false, allowAnyHost = false, ...routeOptions } = options;
  const expression = compiled(exp);
  const target = template(url);
  const known = expression.namedGroups();
  for (const group of target.groups) {
    if (!Object.hasOwn(known, group)) throw invalid(`\`url\` uses \${${group}}, which \`exp\` does not capture`);
  }
  const hasTokens = routeOptions.proxyAuth !== undefined || routeOptions.backendAuth !== undefined;
  if (hasTokens && target.hasHostGroup && target.literalLabels < LITERAL_LABELS && !allowAnyHost) {
    throw invalid(
      `\`url\` ${quote(url)}: with tokens its host ends in ${LITERAL_LABELS} literal labels, or \`allowAnyHost\` is true`,
    );
  }
  // Building one route now finds mistakes in the options before the first call does.
  if (!target.hasHostGroup) route({ ...routeOptions, kedge: target.expand(() => '443') });
  else route({ ...routeOptions, kedge: `${url.slice(0, url.indexOf(':'))}://x.example` });

  const routes = new LRUCache<string, Route>({ max: MAX_ROUTES });
  const match = (subject: Target) => {
    if (isIP(subject)) return null;
    const matcher = expression.matcher(search ? subject.authority : subject.hostname);
    return (search ? matcher.find() : matcher.matches()) ? matcher : null;
  };
  const mapper: Mapper = (subject) => {
    const matcher = match(subject);
    if (matcher === null) return undefined;
    const kedge = target.expand((group) => matcher.group(group) ?? '');
    let found = routes.get(kedge);
    if (found === undefined) {
      found = route({ ...routeOptions, kedge });
      routes.set(kedge, found);
    }
    return found;
  };
  const how = `regexp ${quote(exp)}${search ? ' (searched in host:port)' : ''}`;
  return described(mapper, (subject) => `${how} ${match(subject) === null ? 'does not match' : 'matches'}`);
}

function compiled(exp: string): Expression {
  try {
    return compile(exp);
  } catch (cause) {
    throw invalid(`\`exp\` ${quote(exp)} is not RE2: ${(cause as Error).message}`, cause);
  }
}

function invalid(reason: string, cause?: unknown): KedgeError {
  return new KedgeError('ERR_KEDGE_ROUTE', `regexp: ${reason}`, { cause });
}
