import dns from 'node:dns/promises';
import type { KubeConfig, V1Service } from '@kubernetes/client-node';
import { LRUCache } from 'lru-cache';
import { Backend, type Line } from './backend.ts';
import { clusterOf, watchAll } from './cluster.ts';
import {
  type AdhocRule,
  type BackendConfig,
  type Config,
  type GrpcRoute,
  type HttpRoute,
  readConfig,
  type Texts,
  type WireConfig,
} from './config.ts';
import { type Dial, dialOf } from './dial.ts';
import { GrpcLine } from './grpc-line.ts';
import { HttpLine } from './http-line.ts';
import { metrics } from './metrics.ts';
import { type Address, resolverOf } from './resolver.ts';
import { type DiscoveryOptions, selectorOf, withServices } from './services.ts';

/** What one wire routes by at the moment. */
export interface WireState<Route, L extends Line> {
  readonly routes: readonly Route[];
  readonly adhocRules: readonly AdhocRule[];
  readonly backends: ReadonlyMap<string, Backend<L>>;
  /** A backend that is one plain address. */
  adhoc(address: Address): Backend<L>;
}

const MAX_ADHOC = 1000;
/** How long Services may be quiet before they are taken, and how long a start waits for the first of them. */
const SETTLE_MS = 100;
const FIRST_SERVICES_MS = 5_000;

/** Routes and backends, as the files and Services have them: a change takes effect without dropping a request. */
export class State {
  private current!: {
    readonly http: WireState<HttpRoute, HttpLine>;
    readonly grpc: WireState<GrpcRoute, GrpcLine>;
  };
  private readonly wires: { readonly http: Backends<HttpLine>; readonly grpc: Backends<GrpcLine> };
  private readonly report: (message: string) => void;
  private readonly discovery: DiscoveryOptions | undefined;
  /** As the files were when they were last right. */
  private files!: Config;
  private live!: Config;
  private services: readonly V1Service[] = [];
  /** What is wrong or dangerous, and was said. */
  private doubts: ReadonlySet<string> = new Set();
  private readonly stopDiscovery: () => void = () => {};
  private readonly firstServices = Promise.withResolvers<void>();

  /** `maxHeaderBytes`: of a backend's answer. Throws what is wrong with the files. */
  constructor(
    texts: Texts,
    report: (message: string) => void,
    maxHeaderBytes: number,
    {
      cluster = defaultCluster,
      discovery,
    }: { cluster?: () => KubeConfig; discovery?: DiscoveryOptions | undefined } = {},
  ) {
    this.report = report;
    this.discovery = discovery;
    let known: KubeConfig | undefined;
    const shared = () => {
      known ??= cluster();
      return known;
    };
    this.wires = {
      http: new Backends('http', (address, dial, isTls) => new HttpLine(address, dial, isTls, maxHeaderBytes), shared),
      grpc: new Backends('grpc', (address, dial, isTls) => new GrpcLine(address, dial, isTls), shared),
    };
    this.take(texts);
    if (discovery !== undefined) this.stopDiscovery = this.discover(shared(), discovery);
  }

  readonly http = () => this.current.http;
  readonly grpc = () => this.current.grpc;

  close(): void {
    this.stopDiscovery();
    for (const backends of Object.values(this.wires)) backends.close();
  }

  /** Throws what is wrong with the files. */
  check(texts: Texts): void {
    const { config } = this.merged(readConfig(texts.director, texts.pool));
    for (const wire of ['http', 'grpc'] as const) this.wires[wire].dials(config[wire], config.tls);
  }

  /** Throws what is wrong with the files, and takes none of them then. */
  take(texts: Texts): void {
    this.apply(readConfig(texts.director, texts.pool));
  }

  /** What is served at the moment, for those who run the kedge. */
  get routes(): object {
    const { http, grpc, tls } = this.live;
    const wire = ({ routes, adhocRules, backends }: WireConfig<unknown>) => ({
      routes,
      adhocRules,
      backends: [...backends.values()],
    });
    return { http: wire(http), grpc: wire(grpc), tls: Object.fromEntries(tls) };
  }

  /** Services are in the configuration, or were not to be had yet. */
  get discovered(): Promise<void> {
    return this.firstServices.promise;
  }

  private discover(cluster: KubeConfig, discovery: DiscoveryOptions): () => void {
    let settled: NodeJS.Timeout | undefined;
    let isAway = false;
    const late = setTimeout(this.firstServices.resolve, FIRST_SERVICES_MS);
    const stop = watchAll<V1Service>(
      cluster,
      '/api/v1/services',
      selectorOf(discovery),
      (services) => {
        isAway = false;
        this.services = services;
        // Changes come in bursts.
        settled ??= setTimeout(() => {
          settled = undefined;
          this.reload();
          clearTimeout(late);
          this.firstServices.resolve();
        }, SETTLE_MS);
      },
      ({ message }) => {
        if (!isAway) this.report(`services cannot be watched, those that are known stay: ${message}`);
        isAway = true;
      },
    );
    return () => {
      clearTimeout(settled);
      clearTimeout(late);
      stop();
    };
  }

  private reload(): void {
    try {
      this.apply(this.files);
      this.report('configuration reloaded');
    } catch (error) {
      this.report(`configuration refused, the old one stays: ${(error as Error).message}`);
    }
  }

  private merged(files: Config): { config: Config; skipped: string[] } {
    return this.discovery === undefined
      ? { config: files, skipped: [] }
      : withServices(files, this.services, this.discovery);
  }

  private apply(files: Config): void {
    const { config, skipped } = this.merged(files);
    const { http, grpc } = this.wires;
    // All are read before any is taken.
    const dials = [http.dials(config.http, config.tls), grpc.dials(config.grpc, config.tls)] as const;
    const doubts = new Set([...skipped, ...doubtsOf(config.http), ...doubtsOf(config.grpc)]);
    for (const each of doubts) if (!this.doubts.has(each)) this.report(each);
    this.doubts = doubts;
    this.files = files;
    this.live = config;
    this.current = { http: http.take(config.http, dials[0]), grpc: grpc.take(config.grpc, dials[1]) };
  }
}

type Open<L extends Line> = (address: Address, dial: Dial, isTls: boolean) => L;
/** A backend's configuration, in one text, and how it is dialled where there is none like it yet. */
type Dials = Map<string, { key: string; dial: Dial | undefined; config: BackendConfig }>;

function doubtsOf({ routes, backends }: WireConfig<{ backendName: string }>): string[] {
  const doubts: string[] = [];
  for (const { name, security } of backends.values())
    if (security?.insecureSkipVerify) doubts.push(`backend ${name}: its certificate is not verified`);
  for (const { backendName } of routes)
    if (!backends.has(backendName)) doubts.push(`no backend is called "${backendName}": its route answers 502`);
  return doubts;
}

/** The backends of one wire: what stays the same keeps its connections, what is gone ends when its requests have. */
class Backends<L extends Line> {
  private readonly wire: 'http' | 'grpc';
  private readonly open: Open<L>;
  private readonly cluster: () => KubeConfig;
  private named = new Map<string, Backend<L>>();
  /** The one that was used longest ago is the first to go. */
  private readonly adhocs = new LRUCache<string, Backend<L>>({ max: MAX_ADHOC, dispose: (backend) => backend.close() });

  constructor(wire: 'http' | 'grpc', open: Open<L>, cluster: () => KubeConfig) {
    this.wire = wire;
    this.open = open;
    this.cluster = cluster;
  }

  /** Throws what cannot be read. */
  dials({ backends }: WireConfig<unknown>, tls: ReadonlyMap<string, string>): Dials {
    const dials: Dials = new Map();
    for (const [name, config] of backends) {
      const key = `${JSON.stringify(config)} ${tls.get(config.security?.configName ?? '')}`;
      dials.set(name, { key, dial: this.named.has(key) ? undefined : dialOf(this.wire, config, tls), config });
    }
    return dials;
  }

  take<Route>({ routes, adhocRules }: WireConfig<Route>, dials: Dials): WireState<Route, L> {
    const byKey = new Map<string, Backend<L>>();
    const backends = new Map<string, Backend<L>>();
    for (const [name, { key, dial, config }] of dials) {
      const backend = this.named.get(key) ?? this.make(config, dial!);
      byKey.set(key, backend);
      backends.set(name, backend);
    }
    const known = new Set([...this.named.values()].map(({ name }) => name));
    const changed = metrics[`${this.wire}Backends`];
    for (const [key, { name }] of byKey)
      if (!this.named.has(key)) changed.inc(name, known.has(name) ? 'update' : 'create');
    for (const [key, backend] of this.named) {
      if (byKey.has(key)) continue;
      if (!backends.has(backend.name)) changed.inc(backend.name, 'delete');
      backend.close();
    }
    this.named = byKey;
    return { routes, adhocRules, backends, adhoc: (address) => this.adhoc(address) };
  }

  close(): void {
    for (const backend of this.named.values()) backend.close();
    this.adhocs.clear();
  }

  private make(config: BackendConfig, dial: Dial): Backend<L> {
    const isTls = config.security !== undefined;
    return new Backend(config.name, resolverOf(config, this.cluster), (address) => this.open(address, dial, isTls));
  }

  private adhoc({ host, port }: Address): Backend<L> {
    const key = `${host} ${port}`;
    const known = this.adhocs.get(key);
    if (known !== undefined) return known;
    const none = { srv: undefined, k8s: undefined, security: undefined };
    const config: BackendConfig = { name: 'adhoc', host: { dnsName: host, port }, ...none };
    const backend = this.make(config, dialOf(this.wire, config, new Map()));
    this.adhocs.set(key, backend);
    return backend;
  }
}

const defaultCluster = () =>
  clusterOf({ url: '', caFile: '', tokenFile: '', isInsecure: false, kubeconfig: '', user: '' });

/** The addresses of a name, for adhoc rules. */
export async function lookUp(name: string): Promise<string[]> {
  return (await dns.lookup(name, { all: true })).map(({ address }) => address);
}
