import dns from 'node:dns/promises';
import { unwatchFile, watchFile } from 'node:fs';
import type { Source } from '../flags.ts';
import { Backend } from './backend.ts';
import { type AdhocRule, type BackendConfig, type Config, readConfig, type WireConfig } from './config.ts';
import type { Address } from './resolver.ts';

/** What one wire routes by at the moment. */
export interface WireState<Route> {
  readonly routes: readonly Route[];
  readonly adhocRules: readonly AdhocRule[];
  readonly backends: ReadonlyMap<string, Backend>;
  /** A backend that is one plain address. */
  adhoc(address: Address): Backend;
}

const POLL_MS = 500;
/** Backends that are no longer configured finish what they are at. */
const RETIRE_MS = 60_000;
const MAX_ADHOC = 1000;

/** Routes and backends, as the files have them: a changed file takes effect without dropping a request. */
export class State {
  private current!: {
    readonly http: WireState<Config['http']['routes'][0]>;
    readonly grpc: WireState<Config['grpc']['routes'][0]>;
  };
  private readonly sources: { readonly director: Source; readonly pool: Source };
  /** By wire and configuration, so that what stays the same keeps its connections. */
  private readonly backends = new Map<string, Backend>();
  private readonly adhocs = new Map<string, Backend>();
  private readonly report: (message: string) => void;

  /** Throws what is wrong with the files. */
  constructor(director: Source, pool: Source, report: (message: string) => void) {
    this.sources = { director, pool };
    this.report = report;
    this.load();
    for (const { path } of [director, pool]) {
      // By polling, through symbolic links: Kubernetes swaps them.
      if (path !== undefined) watchFile(path, { interval: POLL_MS, persistent: false }, () => this.reload());
    }
  }

  readonly http = () => this.current.http;
  readonly grpc = () => this.current.grpc;

  close(): void {
    for (const { path } of Object.values(this.sources)) if (path !== undefined) unwatchFile(path);
    for (const backend of [...this.backends.values(), ...this.adhocs.values()]) backend.close();
  }

  private reload(): void {
    try {
      this.load();
      this.report('configuration reloaded');
    } catch (error) {
      this.report(`configuration refused, the old one stays: ${(error as Error).message}`);
    }
  }

  private load(): void {
    const { director, pool } = this.sources;
    const config = readConfig({ file: director.name, text: director.read() }, { file: pool.name, text: pool.read() });
    const used = new Set<string>();
    this.current = {
      http: this.wire('http', config.http, config.tls, used),
      grpc: this.wire('grpc', config.grpc, config.tls, used),
    };
    for (const [key, backend] of this.backends) {
      if (used.has(key)) continue;
      this.backends.delete(key);
      setTimeout(() => backend.close(), RETIRE_MS).unref();
    }
  }

  private wire<Route>(
    wire: 'http' | 'grpc',
    { routes, adhocRules, backends }: WireConfig<Route>,
    tls: ReadonlyMap<string, string>,
    used: Set<string>,
  ): WireState<Route> {
    const named = new Map<string, Backend>();
    for (const [name, config] of backends) {
      const { security } = config;
      if (security?.insecureSkipVerify) this.report(`backend ${name}: its certificate is not verified`);
      const key = `${wire} ${JSON.stringify(config)} ${tls.get(security?.configName ?? '')}`;
      used.add(key);
      const backend = this.backends.get(key) ?? new Backend(config, tls);
      this.backends.set(key, backend);
      named.set(name, backend);
    }
    return { routes, adhocRules, backends: named, adhoc: (address) => this.adhoc(wire, address) };
  }

  private adhoc(wire: 'http' | 'grpc', { host, port }: Address): Backend {
    const key = `${wire} ${host} ${port}`;
    let backend = this.adhocs.get(key);
    if (backend === undefined) {
      const none = { srv: undefined, k8s: undefined, security: undefined };
      const config: BackendConfig = { name: 'adhoc', host: { dnsName: host, port }, ...none };
      backend = new Backend(config, new Map());
      this.adhocs.set(key, backend);
      const [oldest] = this.adhocs;
      if (this.adhocs.size > MAX_ADHOC && oldest !== undefined) {
        this.adhocs.delete(oldest[0]);
        setTimeout(() => oldest[1].close(), RETIRE_MS).unref();
      }
    }
    return backend;
  }
}

/** The addresses of a name, for adhoc rules. */
export async function lookUp(name: string): Promise<string[]> {
  return (await dns.lookup(name, { all: true })).map(({ address }) => address);
}
