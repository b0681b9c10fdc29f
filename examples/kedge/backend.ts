import { readFileSync } from 'node:fs';
import http from 'node:http';
import http2 from 'node:http2';
import https from 'node:https';
import net from 'node:net';
import tls from 'node:tls';
import type { BackendConfig } from './config.ts';
import { type Address, type Resolver, resolverOf } from './resolver.ts';

/** How long an address that cannot be dialled is set aside, and how long a dial may take, in ms. */
const ASIDE_MS = 2_000;
const DIAL_MS = 5_000;
const WINDOW_BYTES = 1024 * 1024;

/** No address of the backend could be dialled. */
export class DialError extends Error {}

/** How an address is spoken to: by requests of an agent, which dials itself, or on a connection with streams. */
export type Line =
  | { readonly is: 'h1'; readonly options: http.RequestOptions }
  | { readonly is: 'h2'; readonly session: http2.ClientHttp2Session };

/**
 * The addresses behind one name, in turn: each call takes the next, one that cannot be dialled is left out for 2 s, and when
 * all are, all are tried. Only dials are tried again: what was sent may have been done.
 */
export class Backend {
  readonly name: string;
  private readonly resolver: Resolver;
  private readonly tls: tls.ConnectionOptions | undefined;
  private readonly aside = new Map<string, number>();
  private readonly lines = new Map<string, Promise<Line>>();
  private readonly agent: http.Agent;
  private next = 0;

  constructor(config: BackendConfig, caFiles: ReadonlyMap<string, string>) {
    this.name = config.name;
    this.resolver = resolverOf(config);
    const { security } = config;
    const caFile = security === undefined ? '' : (caFiles.get(security.configName) ?? '');
    if (security !== undefined) {
      // The name in the certificate is that of the configuration, whatever address it resolves to.
      const servername =
        config.host?.dnsName ?? config.srv?.dnsName ?? `${config.k8s!.service}.${config.k8s!.namespace}.svc`;
      this.tls = {
        // Explicit, or the agent takes it from the caller's `Host`.
        servername: net.isIP(servername) === 0 ? servername : '',
        checkServerIdentity: (_host, certificate) => tls.checkServerIdentity(servername, certificate),
        rejectUnauthorized: !security.insecureSkipVerify,
        ...(caFile === '' ? {} : { ca: readFileSync(caFile) }),
      };
    }
    const agent = { keepAlive: true, maxSockets: 256, timeout: 120_000 };
    this.agent = this.tls === undefined ? new http.Agent(agent) : new https.Agent({ ...agent, ...this.tls } as object);
  }

  /**
   * Gives `use` one address after another until it says that the address could be dialled; nothing may have been sent to one
   * that could not. Throws {@link DialError} when none could.
   */
  async dial(wire: 'http' | 'grpc', use: (line: Line) => Promise<boolean>): Promise<void> {
    const addresses = await this.resolver.addresses();
    const now = performance.now();
    const good = addresses.filter((address) => (this.aside.get(keyOf(address)) ?? 0) <= now);
    const candidates = good.length > 0 ? good : addresses;
    const start = this.next;
    this.next += 1;
    for (let i = 0; i < candidates.length; i += 1) {
      const address = candidates[(start + i) % candidates.length]!;
      const line = await this.line(wire, address).catch(() => undefined);
      if (line !== undefined && (await use(line))) {
        this.aside.delete(keyOf(address));
        return;
      }
      this.aside.set(keyOf(address), performance.now() + ASIDE_MS);
    }
    throw new DialError(`backend ${this.name} cannot be reached`);
  }

  close(): void {
    this.resolver.close();
    this.agent.destroy();
    for (const line of this.lines.values()) {
      line.then((each) => each.is === 'h2' && each.session.close()).catch(() => {});
    }
  }

  private line(wire: 'http' | 'grpc', address: Address): Promise<Line> {
    const key = keyOf(address);
    let line = this.lines.get(key);
    if (line === undefined) {
      line = this.open(wire, address);
      this.lines.set(key, line);
      const gone = () => this.lines.get(key) === line && this.lines.delete(key);
      line.then((each) => {
        if (each.is === 'h2') for (const event of ['goaway', 'close']) each.session.once(event, gone);
      }, gone);
    }
    return line;
  }

  /** TLS says which protocol there is; plain backends speak HTTP/1.1, and gRPC is HTTP/2. */
  private async open(wire: 'http' | 'grpc', address: Address): Promise<Line> {
    const { host, port } = address;
    const protocol = this.tls === undefined ? 'http:' : 'https:';
    const h1: Line = { is: 'h1', options: { ...(this.tls as object), protocol, host, port, agent: this.agent } };
    if (wire === 'http' && this.tls === undefined) return h1;
    const socket = await this.connect(address, wire);
    if (wire === 'http' && (socket as tls.TLSSocket).alpnProtocol !== 'h2') {
      socket.destroy();
      return h1;
    }
    const session = http2.connect(`${protocol}//${net.isIPv6(host) ? `[${host}]` : host}:${port}`, {
      createConnection: () => socket,
      settings: { initialWindowSize: WINDOW_BYTES, enablePush: false },
    });
    // Its streams report what becomes of it.
    session.on('error', () => {});
    session.once('goaway', () => session.close());
    return { is: 'h2', session };
  }

  private connect({ host, port }: Address, wire: 'http' | 'grpc'): Promise<net.Socket> {
    return new Promise((resolve, reject) => {
      const alpn = wire === 'grpc' ? ['h2'] : ['h2', 'http/1.1'];
      const socket =
        this.tls === undefined
          ? net.connect({ host, port })
          : tls.connect({ ...this.tls, host, port, ALPNProtocols: alpn });
      const late = setTimeout(() => socket.destroy(new Error('dial timeout')), DIAL_MS);
      const done = (error?: Error) => {
        clearTimeout(late);
        socket.off('error', done);
        if (error === undefined) resolve(socket.setNoDelay(true));
        else reject(error);
      };
      socket.once('error', done);
      socket.once(this.tls === undefined ? 'connect' : 'secureConnect', () => done());
    });
  }
}

function keyOf({ host, port }: Address): string {
  return `${host} ${port}`;
}
