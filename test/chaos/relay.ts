import net from 'node:net';
import { setTimeout as sleep } from 'node:timers/promises';

/** Bytes that one direction may hold back before its sender is paused. */
const HELD_BYTES = 1024 * 1024;

/** Two sockets that are joined. */
interface Link {
  readonly client: net.Socket;
  readonly server: net.Socket;
  /** Settles when bytes may pass. */
  thawed: Promise<void>;
  thaw: () => void;
}

/** A TCP relay that fails on demand; every switch may be thrown while bytes flow. */
export class Relay {
  /** The port of 127.0.0.1 that it leads to. */
  upstream: number;
  port = 0;
  host = '127.0.0.1';
  /** Connections since the start. */
  accepted = 0;
  latencyMs = 0;
  /** Dribbles: pieces of so many bytes, and how long each takes. */
  slice: { bytes: number; everyMs: number } | undefined;
  /** Resets a connection when so many bytes have come from the server. */
  cutAfter = Number.POSITIVE_INFINITY;
  /** Takes new connections and never says a word on them, as a TLS stall looks from outside. */
  stalls = false;
  private server = net.createServer();
  private readonly links = new Set<Link>();
  private readonly stalled = new Set<net.Socket>();

  constructor(upstream: number) {
    this.upstream = upstream;
  }

  get url(): string {
    return `https://${this.host}:${this.port}`;
  }

  async listen(): Promise<this> {
    this.server = net.createServer({ allowHalfOpen: true }, (socket) => this.accept(socket));
    await new Promise<void>((resolve, reject) => {
      this.server.once('error', reject);
      this.server.listen(this.port, this.host, resolve);
    });
    this.port = (this.server.address() as net.AddressInfo).port;
    return this;
  }

  /** Nobody listens any more, and what was open is reset. */
  refuse(): void {
    this.server.close();
    this.reset();
  }

  /** RST to both ends of every connection. */
  reset(): void {
    for (const { client, server } of this.links) {
      client.resetAndDestroy();
      server.resetAndDestroy();
    }
    for (const socket of this.stalled) socket.resetAndDestroy();
  }

  /** Swallows what comes on the connections that are open now; others pass. */
  freeze(): void {
    for (const link of this.links) {
      const { promise, resolve } = Promise.withResolvers<void>();
      Object.assign(link, { thawed: promise, thaw: resolve });
    }
  }

  /** FIN to the clients; what they send still passes. */
  halfClose(): void {
    for (const { client } of this.links) client.end();
  }

  /** Back to a relay without faults; connections that a fault broke stay broken. */
  async heal(): Promise<void> {
    this.latencyMs = 0;
    this.slice = undefined;
    this.cutAfter = Number.POSITIVE_INFINITY;
    this.stalls = false;
    for (const socket of this.stalled) socket.resetAndDestroy();
    for (const link of this.links) link.thaw();
    if (!this.server.listening) await this.listen();
  }

  close(): void {
    this.server.close();
    this.reset();
  }

  private accept(client: net.Socket): void {
    this.accepted += 1;
    client.on('error', () => {});
    if (this.stalls) {
      this.stalled.add(client);
      client.resume().on('close', () => this.stalled.delete(client));
      client.on('end', () => client.destroy());
      return;
    }
    const server = net.connect({ host: '127.0.0.1', port: this.upstream, allowHalfOpen: true, noDelay: true });
    client.setNoDelay(true);
    const link: Link = { client, server, thawed: Promise.resolve(), thaw: () => {} };
    this.links.add(link);
    let received = 0;
    server.on('data', (chunk: Buffer) => {
      received += chunk.length;
      if (received < this.cutAfter) return;
      client.resetAndDestroy();
      server.resetAndDestroy();
    });
    // What was said before the reset still arrives, such as the alert that says why.
    server.on('error', () => setTimeout(() => client.resetAndDestroy(), this.latencyMs + 5).unref());
    client.on('close', () => {
      this.links.delete(link);
      link.thaw();
      server.destroy();
    });
    // A kedge that was killed takes its side with it, also where the client's was half closed.
    server.on('close', () => setTimeout(() => client.destroy(), this.latencyMs + 50).unref());
    this.pass(client, server, link);
    this.pass(server, client, link);
  }

  private pass(from: net.Socket, to: net.Socket, link: Link): void {
    let queue = Promise.resolve();
    let held = 0;
    from.on('data', (chunk: Buffer) => {
      const due = performance.now() + this.latencyMs;
      held += chunk.length;
      if (held > HELD_BYTES) from.pause();
      queue = queue.then(async () => {
        const wait = due - performance.now();
        if (wait > 0) await sleep(wait);
        await link.thawed;
        await this.write(to, chunk);
        held -= chunk.length;
        if (from.isPaused()) from.resume();
      });
    });
    from.on('end', () => {
      queue = queue.then(async () => {
        await link.thawed;
        if (to.writable) to.end();
      });
    });
  }

  private async write(to: net.Socket, chunk: Buffer): Promise<void> {
    for (let at = 0; at < chunk.length; ) {
      const { bytes, everyMs } = this.slice ?? { bytes: chunk.length, everyMs: 0 };
      if (!to.writable) return;
      to.write(chunk.subarray(at, at + bytes));
      at += bytes;
      if (everyMs > 0) await sleep(everyMs);
    }
  }
}
