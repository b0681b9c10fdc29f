import type net from 'node:net';
import { isIPv6 } from 'node:net';
import { type buildConnector, Client, type Dispatcher, Pool } from 'undici';
import type { Line } from './backend.ts';
import type { Dial } from './dial.ts';
import type { Address } from './resolver.ts';

/** Connections to one address, and how many requests of them one client may have. */
const CONNECTIONS = 1_024;
const SHARE = 256;
/** How long an answer may take to begin, and to go on, in ms: longer than any sensible long poll or heartbeat. */
const HEADERS_MS = 300_000;
const BODY_MS = 3_600_000;
const WINDOW_BYTES = 1024 * 1024;

/** One address over HTTP: HTTP/1.1 where it is plain, and what TLS says where it is not. */
export class HttpLine implements Line {
  readonly share = SHARE;
  readonly address: string;
  private readonly origin: string;
  private readonly pool: Pool;
  private readonly options: Client.Options;
  private readonly dial: (alpn: readonly string[]) => Promise<net.Socket>;
  /** The connection that is there before the first request. */
  private spare: Promise<net.Socket | undefined> | undefined;

  constructor({ host, port }: Address, dial: Dial, isTls: boolean, maxHeaderSize: number) {
    this.address = `${isIPv6(host) ? `[${host}]` : host}:${port}`;
    this.origin = `${isTls ? 'https' : 'http'}://${this.address}`;
    this.dial = (alpn) => dial({ host, port }, alpn);
    this.options = { maxHeaderSize, headersTimeout: HEADERS_MS, bodyTimeout: BODY_MS, allowH2: isTls };
    const h2Options = { initialWindowSize: WINDOW_BYTES, connectionWindowSize: 16 * WINDOW_BYTES };
    this.pool = new Pool(this.origin, {
      ...this.options,
      ...(isTls ? { h2Options } : {}),
      connections: CONNECTIONS,
      connect: this.connector(['h2', 'http/1.1']),
    } as Pool.Options);
    this.spare = this.dial(isTls ? ['h2', 'http/1.1'] : []).then(
      (socket) => socket.unref().on('error', ignore),
      () => undefined,
    );
  }

  dispatch(options: Dispatcher.DispatchOptions, handler: Dispatcher.DispatchHandler): void {
    if (options.upgrade === undefined || options.upgrade === null) {
      this.pool.dispatch(options, handler);
      return;
    }
    // A connection of its own: nothing else is ever said on it, whatever becomes of the upgrade.
    const client = new Client(this.origin, { ...this.options, allowH2: false, connect: this.connector(['http/1.1']) });
    client.dispatch(options, handler);
    client.close(ignore);
  }

  close(): void {
    this.pool.close(ignore);
    this.spare?.then((socket) => socket?.destroy());
  }

  private connector(alpn: readonly string[]): buildConnector.connector {
    return (_options, callback) => {
      this.connect(alpn).then(
        (socket) => callback(null, socket),
        (error) => callback(error, null),
      );
    };
  }

  private async connect(alpn: readonly string[]): Promise<net.Socket> {
    const { spare } = this;
    if (spare !== undefined && alpn.length > 1) {
      this.spare = undefined;
      const socket = await spare;
      if (socket !== undefined && !socket.destroyed && socket.readable) return socket.ref().off('error', ignore);
    }
    return this.dial(alpn);
  }
}

function ignore(): void {}
