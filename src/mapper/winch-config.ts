import type { TokenSource } from '../auth/token-source.ts';
import { readRegularFile } from '../read-file.ts';
import type { RouteInit, RouteOptions } from '../route.ts';
import { isKedgeError, KedgeError, quote } from '../support/errors.ts';
import * as shape from '../support/shape.ts';
import type { Wire } from '../target.ts';
import { describe, described } from './describe.ts';
import { hostPorts, hosts } from './hosts.ts';
import { list, type Node, object, oneOf, parseJson, text, wrong } from './json.ts';
import type { Mapper } from './mapper.ts';
import { LITERAL_LABELS, regexp } from './regexp.ts';
import { template } from './template.ts';
import { authSources, type WinchLogin } from './winch-auth.ts';

/** Options of {@link loadWinchConfig}. */
export interface WinchConfigOptions {
  /** The mapper file: its path, or what is in it. */
  mapper: string | object;
  /** The auth file: its path, or what is in it. Default: no auth sources. */
  auth?: string | object;
  /** Makes errors of the warnings. Default: false. */
  strict?: boolean;
  /** How somebody logs in at an `oidc` source. Default: only refresh tokens that are already there are used. */
  login?: WinchLogin;
}

const file = shape.is(
  'the path of a file, or what is in it',
  (value): value is string | object => (shape.isString(value) && value !== '') || shape.isObject(value),
);
const OPTIONS = shape.object({
  mapper: file,
  auth: shape.optional(file),
  strict: shape.or(shape.boolean, false),
  login: shape.optional(shape.object({ origin: shape.url, open: shape.callable } satisfies shape.Table<WinchLogin>)),
} satisfies shape.Table<WinchConfigOptions>);

/** What {@link loadWinchConfig} makes of the files. */
export interface WinchConfig {
  /** For `createDialer({ mapper })`. */
  mapper: Mapper;
  /** How many routes the mapper file has. */
  routes: number;
  /** By name; `invalidate()` makes one ask anew. */
  tokenSources: ReadonlyMap<string, TokenSource>;
  /** What the original accepts and what may send tokens where nobody meant them to go. */
  warnings: string[];
}

interface WinchRoute {
  proxyAuth: string;
  backendAuth: string;
  protocol: 'ANY' | 'HTTP' | 'GRPC';
  direct: Partial<{ key: string; url: string }>;
  regexp: Partial<{ exp: string; url: string }>;
}

interface Rule {
  readonly wires: readonly Wire[];
  readonly mapper: Mapper;
  readonly path: string;
}

const WIRES: Readonly<Record<WinchRoute['protocol'], readonly Wire[]>> = {
  ANY: ['http', 'grpc'],
  HTTP: ['http'],
  GRPC: ['grpc'],
};

const mapperFile = object<{ routes: { route: Partial<WinchRoute>; node: Node }[] }>({
  routes: list((node) => ({
    node,
    route: object<WinchRoute>({
      proxyAuth: text,
      backendAuth: text,
      protocol: oneOf('ANY', 'HTTP', 'GRPC'),
      direct: object({ key: text, url: text }),
      regexp: object({ exp: text, url: text }),
    })(node),
  })),
});

/**
 * The two files of the original's local proxy, as a mapper: names in snake_case or camelCase, unknown and doubled ones
 * refused. A route's `backend_auth` overrides the caller's `Authorization`, and expressions are searched in `host[:port]`,
 * both as there.
 *
 * @example
 * ```ts
 * import { createDialer, loadWinchConfig } from 'kedge-dialer';
 *
 * const { mapper, warnings } = loadWinchConfig({ mapper: 'mapper.json', auth: 'auth.json' });
 * for (const warning of warnings) console.warn(warning);
 * const dialer = createDialer({ mapper });
 * ```
 *
 * @throws {@link KedgeError} `ERR_KEDGE_ROUTE`, in one line: file, JSON path, what was expected
 */
export function loadWinchConfig(options: WinchConfigOptions): WinchConfig {
  const { mapper, auth, strict } = shape.check('loadWinchConfig', OPTIONS, options, { code: 'ERR_KEDGE_ROUTE' });
  const { login } = options;
  const { routes = [] } = mapperFile(source('mapper', mapper));
  const sources = auth === undefined ? new Map<string, TokenSource>() : authSources(source('auth', auth), login);
  const warnings: string[] = [];
  const directs = new Set<string>();
  const rules = routes.map(({ route, node: { path } }): Rule => {
    const tokens: RouteOptions = {};
    for (const [field, name] of [
      ['proxyAuth', route.proxyAuth],
      ['backendAuth', route.backendAuth],
    ] as const) {
      // Protobuf's empty string is the same as none.
      if (name === undefined || name === '') continue;
      const found = sources.get(name);
      if (found === undefined) throw wrong(path, `no auth source is called "${name}"`);
      tokens[field] = found;
    }
    if (tokens.backendAuth !== undefined) tokens.overrideAuthorization = true;
    const wires = WIRES[route.protocol ?? 'ANY'];
    return { wires, path, mapper: ruleOf(route, path, wires, tokens, directs, warnings) };
  });
  if (strict && warnings.length > 0) throw new KedgeError('ERR_KEDGE_ROUTE', warnings.join('; '));
  return { mapper: firstRule(rules), routes: rules.length, tokenSources: sources, warnings };
}

function ruleOf(
  route: Partial<WinchRoute>,
  path: string,
  wires: readonly Wire[],
  tokens: RouteOptions,
  directs: Set<string>,
  warnings: string[],
): Mapper {
  const { direct, regexp: expression } = route;
  if ((direct === undefined) === (expression === undefined)) throw wrong(path, 'expected either `direct` or `regexp`');
  const hasTokens = tokens.proxyAuth !== undefined || tokens.backendAuth !== undefined;
  try {
    if (direct !== undefined) {
      const { key, url } = required(`${path}.direct`, direct, 'key', 'url');
      for (const wire of wires) {
        const entry = `${wire} ${key.toLowerCase()}`;
        if (directs.has(entry)) throw wrong(`${path}.direct.key`, `"${key}" is there twice`);
        directs.add(entry);
      }
      return /:[0-9]+$/.test(key)
        ? hostPorts({ [key]: { kedge: url, ...tokens } })
        : portless(key, { kedge: url, ...tokens });
    }
    const { exp, url } = required(`${path}.regexp`, expression!, 'exp', 'url');
    const mapper = regexp({ exp, url, search: true, allowAnyHost: true, ...tokens });
    if (hasTokens) warnings.push(...hazards(exp, url).map((hazard) => `${path}.regexp: ${hazard}`));
    return mapper;
  } catch (error) {
    if (isKedgeError(error) && error.reason.startsWith(path)) throw error;
    throw wrong(path, isKedgeError(error) ? error.reason : String(error), error);
  }
}

/** A key without a port is for targets without one, or with the default of their scheme, which is the same to us. */
function portless(key: string, init: RouteInit): Mapper {
  const byHost = hosts({ [key]: init });
  return described(
    (target) => (target.authority === target.hostname ? byHost(target) : undefined),
    (target) =>
      target.authority === target.hostname
        ? describe(byHost, target)
        : `the target has a port, and ${quote(key)} has none`,
  );
}

/** What lets whoever names a target choose who receives the tokens. */
function hazards(exp: string, url: string): string[] {
  const { hasHostGroup, literalLabels } = template(url);
  const found: string[] = [];
  if (hasHostGroup && literalLabels < LITERAL_LABELS)
    found.push('a capture decides the host that receives the tokens: end `url` in two literal labels');
  if (!(exp.startsWith('^') && exp.endsWith('$')))
    found.push('without ^ and $ any name that merely holds the expression gets the tokens sent');
  return found;
}

function firstRule(rules: readonly Rule[]): Mapper {
  const find = (wire: Wire, map: (rule: Rule) => unknown) =>
    rules.find((rule) => rule.wires.includes(wire) && map(rule) !== undefined);
  const mapper: Mapper = (target) => {
    for (const rule of rules) {
      const found = rule.wires.includes(target.wire) ? rule.mapper(target) : undefined;
      if (found !== undefined) return found;
    }
    return undefined;
  };
  return described(mapper, (target) => {
    const rule = find(target.wire, (each) => each.mapper(target));
    return rule === undefined ? 'no route matches' : `${rule.path}: ${describe(rule.mapper, target)}`;
  });
}

function required<T extends object, K extends keyof T & string>(path: string, value: T, ...names: K[]): Required<T> {
  const missing = names.find((name) => value[name] === undefined || value[name] === '');
  if (missing !== undefined) throw wrong(`${path}.${missing}`, 'is required');
  return value as Required<T>;
}

function source(name: string, from: unknown): Node {
  if (typeof from !== 'string') return { value: from, path: `${name}:` };
  let content: string;
  try {
    content = readRegularFile(from).toString('utf8');
  } catch (cause) {
    throw wrong(`\`${name}\`: ${from}`, `cannot be read (${(cause as NodeJS.ErrnoException).code})`, cause);
  }
  return { value: parseJson(from, content), path: `${from}:` };
}
