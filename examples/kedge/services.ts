import { createHash } from 'node:crypto';
import type { V1Service } from '@kubernetes/client-node';
import type { BackendConfig, Config, GrpcRoute, HttpRoute, WireConfig } from './config.ts';
import { splitAuthority } from './director.ts';

export interface DiscoveryOptions {
  /** What follows `<service>.<namespace>.svc.` in the hosts of routes. */
  suffix: string;
  /** Before `kedge-exposed`, the label, and `host-matcher`, `tls-config` and `insecure-skip-verify`, the annotations. */
  prefix: string;
}

export const selectorOf = ({ prefix }: DiscoveryOptions) => `${prefix}kedge-exposed`;

/** A port of a Service that a kedge is to serve. */
interface Exposed {
  readonly wire: 'http' | 'grpc';
  readonly host: string;
  readonly port: number;
  /** What it is called by the original, if nobody else is. */
  readonly name: string;
  readonly backend: Omit<BackendConfig, 'name'>;
}

/**
 * The configuration of the files with the routes and backends of Services, as the original makes them (its pkg/discovery); a
 * Service that cannot be served is left out as a whole, and `skipped` says why.
 */
export function withServices(
  { http, grpc, tls }: Config,
  services: readonly V1Service[],
  options: DiscoveryOptions,
): { config: Config; skipped: string[] } {
  const skipped: string[] = [];
  const wires = {
    http: new Wire<HttpRoute>(http, ({ hostMatcher, portMatcher }) => [hostMatcher, portMatcher]),
    grpc: new Wire<GrpcRoute>(grpc, (route) => [route.authorityHostMatcher, route.authorityPortMatcher]),
  };
  for (const service of [...services].sort((one, other) => (keyOf(one) < keyOf(other) ? -1 : 1))) {
    try {
      const exposed = exposedBy(service, options, tls);
      for (const each of exposed) wires[each.wire].check(each);
      for (const each of exposed) {
        const { host, port } = each;
        const name = wires[each.wire].backend(keyOf(service), each);
        const common = { backendName: name, allowedClients: [] };
        if (each.wire === 'http') {
          const matchers = { hostMatcher: host, portMatcher: port, pathRules: [], headerMatcher: {} };
          wires.http.routes.push({ ...common, ...matchers, proxyMode: 'REVERSE_PROXY' });
        } else {
          const matchers = { authorityHostMatcher: host, authorityPortMatcher: port, metadataMatcher: {} };
          wires.grpc.routes.push({ ...common, ...matchers, serviceNameMatcher: '' });
        }
      }
    } catch (error) {
      skipped.push(`service ${keyOf(service)} is not served: ${(error as Error).message}`);
    }
  }
  return { config: { http: wires.http.merged(), grpc: wires.grpc.merged(), tls }, skipped };
}

/** What the files and the Services say of one wire. */
class Wire<Route extends { allowedClients: string[] }> {
  readonly routes: Route[] = [];
  private readonly files: WireConfig<Route>;
  private readonly matchers: (route: Route) => [host: string, port: number];
  private readonly backends: Map<string, BackendConfig>;
  private readonly names = new Map<string, string>();
  private readonly taken: Set<string>;

  constructor(files: WireConfig<Route>, matchers: (route: Route) => [host: string, port: number]) {
    this.files = files;
    this.matchers = matchers;
    this.backends = new Map(files.backends);
    this.taken = new Set(files.routes.map((route) => matchers(route).join(':').toLowerCase()));
  }

  check({ host, port }: Exposed): void {
    if (this.taken.has(`${host}:${port}`)) throw new Error(`there is a route for ${host}:${port} already`);
  }

  /** One for each target port of a Service; the name is another one where it is taken or too long. */
  backend(service: string, { name, backend, host, port }: Exposed): string {
    this.taken.add(`${host}:${port}`);
    const key = `${service} ${name}`;
    let own = this.names.get(key);
    if (own === undefined) {
      const hash = createHash('sha256').update(key).digest('hex').slice(0, 12);
      own = name.length > 64 || this.backends.has(name) ? `${name.slice(0, 51)}_${hash}` : name;
      this.names.set(key, own);
    }
    // A target port that is TLS for one port is for all.
    const security = backend.security ?? this.backends.get(own)?.security;
    this.backends.set(own, { ...backend, name: own, security });
    return own;
  }

  /** Before what would hide them, but never before a route of the files that says who is allowed. */
  merged(): WireConfig<Route> {
    const { routes, adhocRules } = this.files;
    const hosts = new Set(this.routes.map((route) => this.matchers(route)[0]));
    const hides = (route: Route) => {
      const [host, port] = this.matchers(route);
      return host === '' || (port === 0 && hosts.has(host.toLowerCase()));
    };
    const afterGuarded = routes.findLastIndex(({ allowedClients }) => allowedClients.length > 0) + 1;
    const hiding = routes.findIndex((route, i) => i >= afterGuarded && hides(route));
    const at = hiding === -1 ? routes.length : hiding;
    return { routes: routes.toSpliced(at, 0, ...this.routes), adhocRules, backends: this.backends };
  }
}

/** Throws what is wrong with the Service. */
function exposedBy(
  { metadata, spec }: V1Service,
  { suffix, prefix }: DiscoveryOptions,
  tlsConfigs: ReadonlyMap<string, string>,
): Exposed[] {
  const { name = '', namespace = '', annotations = {} } = metadata ?? {};
  const annotation = annotations[`${prefix}host-matcher`] ?? '';
  const host = (annotation === '' ? `${name}.${namespace}.svc.${suffix}` : annotation).toLowerCase();
  const split = splitAuthority(host);
  if (split === undefined || split.port !== undefined || split.host !== host)
    throw new Error(`"${host}" is not the name of a host`);
  const tls = {
    insecureSkipVerify: annotations[`${prefix}insecure-skip-verify`] === 'true',
    configName: annotations[`${prefix}tls-config`] ?? '',
  };
  if (tls.configName !== '' && !tlsConfigs.has(tls.configName))
    throw new Error(`there is no TLS configuration "${tls.configName}"`);
  return (spec?.ports ?? [])
    .flatMap(({ name: portName = '', port, targetPort = port, protocol = 'TCP' }) => {
      const [, wire, isTls] = /^(http|grpc)(tls)?(?:-.*)?$/.exec(portName) ?? [];
      if (wire === undefined || protocol !== 'TCP') return [];
      const k8s = { service: name, namespace, port: portName };
      return {
        wire: wire as 'http' | 'grpc',
        host,
        port,
        name: `${name}_${namespace}_${targetPort}`.replaceAll('-', '_'),
        backend: { host: undefined, srv: undefined, k8s, security: isTls === undefined ? undefined : tls },
      };
    })
    .sort((one, other) => one.port - other.port);
}

function keyOf({ metadata }: V1Service): string {
  return `${metadata?.namespace}/${metadata?.name}`;
}
