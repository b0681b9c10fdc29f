/**
 * The director and backend pool files of the original kedge: protobuf JSON, so every name may be snake_case or camelCase.
 * What is unknown, doubled or of the wrong type is an error that gives the file, the JSON path and what was expected.
 */

export interface HttpRoute {
  backendName: string;
  hostMatcher: string;
  portMatcher: number;
  pathRules: string[];
  headerMatcher: Record<string, string>;
  proxyMode: 'ANY' | 'REVERSE_PROXY' | 'FORWARD_PROXY';
}

export interface GrpcRoute {
  backendName: string;
  serviceNameMatcher: string;
  authorityHostMatcher: string;
  authorityPortMatcher: number;
  metadataMatcher: Record<string, string>;
}

export interface Backend {
  name: string;
  host: { dnsName: string; port: number };
}

export interface Config {
  http: { routes: HttpRoute[]; backends: Map<string, Backend> };
  grpc: { routes: GrpcRoute[]; backends: Map<string, Backend> };
}

/** A value with the place where it stands. */
interface Node {
  readonly value: unknown;
  readonly path: string;
}

type Reader<T> = (node: Node) => T;

/** @throws an `Error` of one line: file, JSON path, what was expected */
export function readConfig(director: { file: string; text: string }, pool: { file: string; text: string }): Config {
  const routes = parse(
    director,
    object({ http: object({ routes: list(httpRoute) }), grpc: object({ routes: list(grpcRoute) }) }),
  );
  const backends = parse(
    pool,
    object({ http: object({ backends: list(backend) }), grpc: object({ backends: list(backend) }) }),
  );
  const config = {
    http: { routes: routes.http?.routes ?? [], backends: byName(pool.file, 'http', backends.http?.backends ?? []) },
    grpc: { routes: routes.grpc?.routes ?? [], backends: byName(pool.file, 'grpc', backends.grpc?.backends ?? []) },
  };
  for (const wire of ['http', 'grpc'] as const) {
    for (const [i, { backendName }] of config[wire].routes.entries()) {
      if (config[wire].backends.has(backendName)) continue;
      throw new Error(
        `${director.file}: ${wire}.routes[${i}].backend_name: no ${wire} backend is called "${backendName}"`,
      );
    }
  }
  return config;
}

const text: Reader<string> = ({ value, path }) => {
  if (typeof value === 'string') return value;
  throw expected(path, 'a string');
};
const port: Reader<number> = ({ value, path }) => {
  if (Number.isInteger(value) && Number(value) >= 0 && Number(value) <= 65_535) return Number(value);
  throw expected(path, 'a port');
};
const name: Reader<string> = (node) => {
  if (/^[a-z_0-9.]{2,64}$/.test(text(node))) return node.value as string;
  throw expected(node.path, 'a name of 2 to 64 characters from a-z, 0-9, _ and .');
};
const oneOf =
  <T extends string>(...choices: T[]): Reader<T> =>
  ({ value, path }) => {
    if (choices.includes(value as T)) return value as T;
    throw expected(path, choices.join(' or '));
  };
/** Header names to values; names are compared in lower case. */
const headers: Reader<Record<string, string>> = ({ value, path }) => {
  if (!isObject(value)) throw expected(path, 'an object of strings');
  const entries = Object.entries(value).map(([key, each]) => [
    key.toLowerCase(),
    text({ value: each, path: `${path}.${key}` }),
  ]);
  return Object.fromEntries(entries);
};

function list<T>(read: Reader<T>): Reader<T[]> {
  return ({ value, path }) => {
    if (!Array.isArray(value)) throw expected(path, 'a list');
    return value.map((each, i) => read({ value: each, path: `${path}[${i}]` }));
  };
}

function object<T extends object>(fields: { [K in keyof T]: Reader<T[K]> }): Reader<Partial<T>> {
  return ({ value, path }) => {
    if (!isObject(value)) throw expected(path, 'an object');
    const result: Partial<T> = {};
    for (const [key, each] of Object.entries(value)) {
      const camel = key.replace(/_([a-z])/g, (_, letter: string) => letter.toUpperCase());
      const at = path === '' ? key : `${path}.${key}`;
      if (!Object.hasOwn(fields, camel)) throw new Error(`${at}: unknown; there are ${Object.keys(fields).join(', ')}`);
      if (Object.hasOwn(result, camel)) throw new Error(`${at}: is there twice`);
      result[camel as keyof T] = fields[camel as keyof T]({ value: each, path: at });
    }
    return result;
  };
}

const httpRoute: Reader<HttpRoute> = (node) => {
  const route = object<HttpRoute>({
    backendName: text,
    hostMatcher: text,
    portMatcher: port,
    pathRules: list(text),
    headerMatcher: headers,
    proxyMode: oneOf('ANY', 'REVERSE_PROXY', 'FORWARD_PROXY'),
  })(node);
  return {
    hostMatcher: '',
    portMatcher: 0,
    pathRules: [],
    headerMatcher: {},
    proxyMode: 'ANY',
    ...route,
    backendName: required(node, 'backend_name', route.backendName),
  };
};

const grpcRoute: Reader<GrpcRoute> = (node) => {
  const route = object<GrpcRoute>({
    backendName: text,
    serviceNameMatcher: text,
    authorityHostMatcher: text,
    authorityPortMatcher: port,
    metadataMatcher: headers,
  })(node);
  return {
    serviceNameMatcher: '',
    authorityHostMatcher: '',
    authorityPortMatcher: 0,
    metadataMatcher: {},
    ...route,
    backendName: required(node, 'backend_name', route.backendName),
  };
};

const backend: Reader<Backend> = (node) => {
  const fields = object<Backend & { balancer: string }>({
    name,
    balancer: oneOf('ROUND_ROBIN'),
    host: (at) => {
      const host = object<Backend['host']>({ dnsName: text, port })(at);
      return { dnsName: required(at, 'dns_name', host.dnsName), port: required(at, 'port', host.port) };
    },
  })(node);
  return { name: required(node, 'name', fields.name), host: required(node, 'host', fields.host) };
};

function parse<T>({ file, text: json }: { file: string; text: string }, read: Reader<T>): T {
  try {
    return read({ value: JSON.parse(json), path: '' });
  } catch (error) {
    throw new Error(`${file}: ${(error as Error).message}`, { cause: error });
  }
}

function byName(file: string, wire: string, backends: Backend[]): Map<string, Backend> {
  const named = new Map<string, Backend>();
  for (const [i, each] of backends.entries()) {
    if (named.has(each.name)) throw new Error(`${file}: ${wire}.backends[${i}].name: "${each.name}" is there twice`);
    named.set(each.name, each);
  }
  return named;
}

function required<T>({ path }: Node, field: string, value: T | undefined): T {
  if (value !== undefined) return value;
  throw expected(path === '' ? field : `${path}.${field}`, 'a value: it is required');
}

function expected(path: string, what: string): Error {
  return new Error(`${path || 'the file'}: expected ${what}`);
}

function isObject(value: unknown): value is Record<string, unknown> {
  return typeof value === 'object' && value !== null && !Array.isArray(value);
}
