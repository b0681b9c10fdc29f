/**
 * The director and backend pool files of the original kedge: protobuf JSON, so every name may be snake_case or camelCase.
 * What is unknown, doubled or of the wrong type is an error that gives the file, the JSON path and what was expected.
 */

import { listOf } from './adhoc.ts';

export interface HttpRoute {
  backendName: string;
  /** Subjects (`CN=checkout`) or SPIFFE IDs of client certificates; empty: every client. An addition of ours. */
  allowedClients: string[];
  hostMatcher: string;
  portMatcher: number;
  pathRules: string[];
  headerMatcher: Record<string, string>;
  proxyMode: 'ANY' | 'REVERSE_PROXY' | 'FORWARD_PROXY';
}

export interface GrpcRoute {
  backendName: string;
  allowedClients: string[];
  serviceNameMatcher: string;
  authorityHostMatcher: string;
  authorityPortMatcher: number;
  metadataMatcher: Record<string, string>;
}

export interface AdhocRule {
  /** A name, or `*` and the end of one. */
  dnsNameMatcher: string;
  port: { default: number; allowed: number[]; allowedRanges: { from: number; to: number }[] };
  dnsNameReplace: { pattern: string; substitution: string } | undefined;
  /** What may be dialled; empty: everything but this machine, its link and metadata services. An addition of ours. */
  allowCidrs: string[];
}

/** Where a backend's addresses come from; exactly one. */
export interface Resolvers {
  host: { dnsName: string; port: number } | undefined;
  srv: { dnsName: string; portOverride: number } | undefined;
  /** Without a port: of a Service that has only one. */
  k8s: { service: string; namespace: string; port: string | undefined } | undefined;
}

export interface BackendConfig extends Resolvers {
  name: string;
  /** Undefined: plain. */
  security: { insecureSkipVerify: boolean; configName: string } | undefined;
}

export interface WireConfig<Route> {
  routes: Route[];
  adhocRules: AdhocRule[];
  backends: Map<string, BackendConfig>;
}

export interface Config {
  http: WireConfig<HttpRoute>;
  grpc: WireConfig<GrpcRoute>;
  /** Files of CAs that TLS backends are verified by, by name; the system's for every other name. */
  tls: Map<string, string>;
}

/** A value with the place where it stands. */
interface Node {
  readonly value: unknown;
  readonly path: string;
}

type Reader<T> = (node: Node) => T;

/** The two files, with the names that errors give them. */
export interface Texts {
  readonly director: { readonly file: string; readonly text: string };
  readonly pool: { readonly file: string; readonly text: string };
}

/** @throws an `Error` of one line: file, JSON path, what was expected */
export function readConfig(director: Texts['director'], pool: Texts['pool']): Config {
  const routes = parse(
    director,
    object({
      http: object({ routes: list(httpRoute), adhocRules: list(adhocRule(80)) }),
      grpc: object({ routes: list(grpcRoute), adhocRules: list(adhocRule(81)) }),
    }),
  );
  const backends = parse(
    pool,
    object({
      http: object({ backends: list(backend) }),
      grpc: object({ backends: list(backend) }),
      tlsServerConfigs: list(tlsConfig),
    }),
  );
  const wire = <R>(name: 'http' | 'grpc', own: { routes?: R[]; adhocRules?: AdhocRule[] } | undefined) => ({
    routes: own?.routes ?? [],
    adhocRules: own?.adhocRules ?? [],
    backends: byName(pool.file, name, backends[name]?.backends ?? []),
  });
  return {
    http: wire('http', routes.http),
    grpc: wire('grpc', routes.grpc),
    tls: new Map(backends.tlsServerConfigs?.map(({ name, caFile }) => [name, caFile])),
  };
}

const text: Reader<string> = ({ value, path }) => {
  if (typeof value === 'string') return value;
  throw expected(path, 'a string');
};
/** Protobuf's JSON takes numbers as text too. */
const port: Reader<number> = ({ value, path }) => {
  const number = typeof value === 'string' && /^[0-9]+$/.test(value) ? Number(value) : value;
  if (Number.isInteger(number) && Number(number) >= 0 && Number(number) <= 65_535) return Number(number);
  throw expected(path, 'a port');
};
const name: Reader<string> = (node) => {
  if (/^[a-z_0-9.]{2,64}$/.test(text(node))) return node.value as string;
  throw expected(node.path, 'a name of 2 to 64 characters from a-z, 0-9, _ and .');
};
/** By name, or by number as the original counts them. */
const oneOf =
  <T extends string>(...choices: T[]): Reader<T> =>
  ({ value, path }) => {
    const choice = typeof value === 'number' ? choices[value] : (value as T);
    if (choice !== undefined && choices.includes(choice)) return choice;
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

/** Fields of the original that say nothing about what is served. */
const WITHOUT_MEANING = new Set(['autogenerated', 'disableConntracking', 'interceptors']);

function object<T extends object>(fields: { [K in keyof T]: Reader<T[K]> }): Reader<Partial<T>> {
  return ({ value, path }) => {
    if (!isObject(value)) throw expected(path, 'an object');
    const result: Partial<T> = {};
    for (const [key, each] of Object.entries(value)) {
      const camel = key.replace(/_([a-z])/g, (_, letter: string) => letter.toUpperCase());
      const at = path === '' ? key : `${path}.${key}`;
      if (WITHOUT_MEANING.has(camel)) continue;
      if (!Object.hasOwn(fields, camel)) throw new Error(`${at}: unknown; there are ${Object.keys(fields).join(', ')}`);
      if (Object.hasOwn(result, camel)) throw new Error(`${at}: is there twice`);
      // Protobuf's JSON: as if it were not there.
      if (each === null) continue;
      result[camel as keyof T] = fields[camel as keyof T]({ value: each, path: at });
    }
    return result;
  };
}

const flag: Reader<boolean> = ({ value, path }) => {
  if (typeof value === 'boolean') return value;
  throw expected(path, 'true or false');
};

/** `fallback`: the port of a rule that names none; the original has another one for each wire. */
const adhocRule =
  (fallback: number): Reader<AdhocRule> =>
  (node) => {
    const range = object<{ from: number; to: number }>({ from: port, to: port });
    const rule = object<AdhocRule>({
      dnsNameMatcher: text,
      port: (at) => {
        const own = object<AdhocRule['port']>({
          default: port,
          allowed: list(port),
          allowedRanges: list((each) => ({ from: 0, to: 0, ...range(each) })),
        })(at);
        return { default: own.default || fallback, allowed: own.allowed ?? [], allowedRanges: own.allowedRanges ?? [] };
      },
      dnsNameReplace: (at) => ({
        pattern: '',
        substitution: '',
        ...object<NonNullable<AdhocRule['dnsNameReplace']>>({ pattern: text, substitution: text })(at),
      }),
      allowCidrs: (at) => {
        const cidrs = list(text)(at);
        try {
          listOf(cidrs);
        } catch {
          throw expected(at.path, 'networks such as 10.0.0.0/8');
        }
        return cidrs;
      },
    })(node);
    return {
      dnsNameMatcher: required(node, 'dns_name_matcher', rule.dnsNameMatcher),
      port: rule.port ?? { default: fallback, allowed: [fallback], allowedRanges: [] },
      dnsNameReplace: rule.dnsNameReplace,
      allowCidrs: rule.allowCidrs ?? [],
    };
  };

const tlsConfig: Reader<{ name: string; caFile: string }> = (node) => {
  const config = object<{ name: string; caFile: string }>({ name: text, caFile: text })(node);
  return { name: required(node, 'name', config.name), caFile: config.caFile ?? '' };
};

const httpRoute: Reader<HttpRoute> = (node) => {
  const route = object<HttpRoute>({
    backendName: text,
    allowedClients: list(text),
    hostMatcher: text,
    portMatcher: port,
    pathRules: list(text),
    headerMatcher: headers,
    proxyMode: oneOf('ANY', 'REVERSE_PROXY', 'FORWARD_PROXY'),
  })(node);
  return {
    allowedClients: [],
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
    allowedClients: list(text),
    serviceNameMatcher: text,
    authorityHostMatcher: text,
    authorityPortMatcher: port,
    metadataMatcher: headers,
  })(node);
  return {
    allowedClients: [],
    serviceNameMatcher: '',
    authorityHostMatcher: '',
    authorityPortMatcher: 0,
    metadataMatcher: {},
    ...route,
    backendName: required(node, 'backend_name', route.backendName),
  };
};

/** `<service>(.<namespace>)(.<any suffix>)(:<port's name or number>)`, as the original takes it. */
const K8S_NAME = /^([a-z0-9-]+)(?:\.([a-z0-9-]+)(?:\.[a-z0-9.-]+)?)?(?::([a-z0-9-]+))?$/;

const backend: Reader<BackendConfig> = (node) => {
  const fields = object<BackendConfig & { balancer: string }>({
    name,
    balancer: oneOf('ROUND_ROBIN'),
    security: (at) => ({
      insecureSkipVerify: false,
      configName: '',
      ...object<NonNullable<BackendConfig['security']>>({ insecureSkipVerify: flag, configName: text })(at),
    }),
    host: (at) => {
      const host = object<NonNullable<Resolvers['host']>>({ dnsName: text, port })(at);
      return { dnsName: required(at, 'dns_name', host.dnsName), port: required(at, 'port', host.port) };
    },
    srv: (at) => {
      const srv = object<NonNullable<Resolvers['srv']>>({ dnsName: text, portOverride: port })(at);
      return { dnsName: required(at, 'dns_name', srv.dnsName), portOverride: srv.portOverride ?? 0 };
    },
    k8s: (at) => {
      const { dnsPortName } = object<{ dnsPortName: string }>({ dnsPortName: text })(at);
      const parts = K8S_NAME.exec(required(at, 'dns_port_name', dnsPortName));
      if (parts === null) throw expected(`${at.path}.dns_port_name`, 'service.namespace:port');
      return { service: parts[1]!, namespace: parts[2] ?? 'default', port: parts[3] };
    },
  })(node);
  const { host, srv, k8s, security } = fields;
  if ([host, srv, k8s].filter((each) => each !== undefined).length !== 1)
    throw expected(node.path, 'one of host, srv and k8s');
  return { name: required(node, 'name', fields.name), host, srv, k8s, security };
};

function parse<T>({ file, text: json }: { file: string; text: string }, read: Reader<T>): T {
  try {
    return read({ value: JSON.parse(json), path: '' });
  } catch (error) {
    throw new Error(`${file}: ${(error as Error).message}`, { cause: error });
  }
}

function byName(file: string, wire: string, backends: BackendConfig[]): Map<string, BackendConfig> {
  const named = new Map<string, BackendConfig>();
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
