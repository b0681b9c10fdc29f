import type { TestContext } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import {
  createDialer,
  type Dialer,
  type DialerOptions,
  type Identity,
  pem,
  type RouteOptions,
  single,
  staticToken,
} from '../../src/index.ts';
import { authority, KEDGE_NAME } from '../helpers/kedge.ts';
import { Ledger } from './backend.ts';
import { type Client, connectClient, grpcClient, type HttpCallOptions, httpClient, type Wire } from './clients.ts';
import { startRelay } from './kedges.ts';
import { type Call, Load, type LoadOptions, type Method, start } from './load.ts';
import { random } from './random.ts';
import type { Relay } from './relay.ts';
import type { Secrets } from './secrets.ts';

/** Undoes what was set up, last first. */
export class Scope {
  private readonly undo: (() => unknown)[] = [];

  after(undo: () => unknown): void {
    this.undo.push(undo);
  }

  /** What the helpers of the tests want is a test's context, and of that they use `after()`. */
  get asTest(): TestContext {
    return { after: (undo: () => unknown) => this.after(undo) } as unknown as TestContext;
  }

  async end(): Promise<void> {
    for (const undo of this.undo.splice(0).reverse()) await undo();
  }
}

export interface WorldOptions {
  seed: number;
  /** Of the ten minutes that all scenarios take. */
  scale: number;
  secrets: Secrets;
  /** For the test of this rig: breaks the dispatcher that HTTP calls are given. */
  sabotage?: (dispatcher: Dialer['dispatcher'], urls: readonly string[]) => Dialer['dispatcher'];
}

export interface ClientOptions extends HttpCallOptions {
  wires?: readonly Wire[];
  dialer?: Partial<DialerOptions>;
  route?: Partial<RouteOptions>;
  deadlineMs?: number;
}

/** Where one scenario runs: its identity, token and ledger, the calls it made and what it found. */
export class World extends Scope {
  readonly random: () => number;
  readonly scale: number;
  readonly secrets: Secrets;
  readonly ledger = new Ledger();
  /** A canary: nothing that is printed may have it. */
  readonly token: string;
  readonly violations: string[] = [];
  readonly notes: string[] = [];
  readonly dialers: Dialer[] = [];
  /** Calls whose answers were not the load's, such as the thousand of one moment. */
  readonly calls: Call[] = [];
  /** Calls that are too many to be kept. */
  uncounted = 0;
  recoveryMs = 0;
  identity!: Identity;
  private readonly options: WorldOptions;
  private readonly loads: Load[] = [];

  constructor(options: WorldOptions) {
    super();
    this.options = options;
    this.random = random(options.seed);
    this.scale = options.scale;
    this.secrets = options.secrets;
    this.token = `canary-token-${options.seed}-${Math.trunc(this.random() * 1e9)}`;
  }

  async begin(): Promise<void> {
    const ca = await authority();
    const { cert, key } = await ca.issue({ cn: 'pod' });
    this.secrets.add(this.token);
    this.secrets.add(key);
    this.identity = pem({ cert, key, ca: ca.cert });
  }

  check(isSo: boolean, violation: string): void {
    if (!isSo) this.violations.push(violation);
  }

  note(text: string): void {
    this.notes.push(text);
  }

  /** How long it took until calls went well again. */
  recovered(ms: number): void {
    this.recoveryMs = Math.max(this.recoveryMs, ms);
  }

  /** Waits for a share of the run, but not less than `least` seconds. */
  async pass(seconds: number, least = 0.5): Promise<void> {
    await sleep(Math.max(seconds * this.scale, least) * 1000);
  }

  /** A number that grows with the run. */
  times(count: number, least = 1): number {
    return Math.max(least, Math.round(count * this.scale));
  }

  async relay(upstream: number, at?: { host?: string; port?: number }): Promise<Relay> {
    const relay = await startRelay(upstream, at);
    this.after(() => relay.close());
    return relay;
  }

  /** A dialer that sends every name to these kedges, in this order. */
  dialer(urls: readonly string[], options: Partial<DialerOptions> = {}, route: Partial<RouteOptions> = {}): Dialer {
    const kedge = urls.length === 1 ? urls[0]! : [...urls];
    const proxyAuth = staticToken(this.token, { name: 'canary' });
    const mapper = single({ kedge, serverName: KEDGE_NAME, proxyAuth, ...route });
    const dialer = createDialer({ identity: this.identity, mapper, onWarning: () => {}, ...options });
    this.dialers.push(dialer);
    this.after(() => dialer.destroy());
    return dialer;
  }

  /** A client for each wire, each with a dialer of its own. */
  clients(urls: readonly string[], options: ClientOptions = {}): Client[] {
    const { wires = ['h1', 'h2', 'grpc'], dialer = {}, route, deadlineMs, ...http } = options;
    return wires.map((wire) => {
      const protocol = wire === 'h1' || wire === 'h2' ? wire : 'auto';
      const own = this.dialer(urls, { ...dialer, http: { protocol, ...dialer.http } }, route);
      if (wire === 'grpc') return grpcClient(own, { deadlineMs });
      if (wire === 'connect') return connectClient(own);
      return httpClient(wire, this.options.sabotage?.(own.dispatcher, urls) ?? own.dispatcher, http);
    });
  }

  load(clients: readonly Client[], options?: LoadOptions): Load {
    const load = new Load(clients, this.random, options);
    this.loads.push(load);
    return load;
  }

  /** One call, to its end. */
  async call(client: Client, method?: Method, host = 'orders.us1:8080'): Promise<Call> {
    const { call, done } = start(client, method ?? (client.wire === 'grpc' ? 'UNARY' : 'GET'), host);
    this.calls.push(call);
    await done;
    return call;
  }

  get allCalls(): Call[] {
    return [...this.calls, ...this.loads.flatMap(({ calls }) => calls)];
  }

  override async end(): Promise<void> {
    for (const load of this.loads) await load.stop();
    for (const dialer of this.dialers) this.secrets.inspect('a dialer', [dialer, dialer.stats()]);
    await super.end();
  }
}
