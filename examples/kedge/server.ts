import type { AddressInfo } from 'node:net';
import tls from 'node:tls';
import type { AccessLog } from './access-log.ts';
import type { Gate } from './auth.ts';
import { GrpcProxy } from './grpc-proxy.ts';
import { serveH1 } from './h1.ts';
import { serveH2 } from './h2.ts';
import { HttpProxy } from './http-proxy.ts';
import { metrics } from './metrics.ts';
import type { State } from './state.ts';

/** What the kedge shows, and the CAs of client certificates, PEM. */
export interface Certificates {
  cert: string;
  key: string;
  clientCas: string[];
  /** What these CAs have revoked, PEM; none: nothing is. */
  clientCrls?: string[];
}

export interface KedgeOptions {
  address: string;
  /** For HTTP and gRPC. 0 takes any free port. */
  port: number;
  /** For gRPC only; undefined: none. */
  grpcPort?: number | undefined;
  certificates: Certificates;
  clientCertRequired: boolean;
  /** How large the head of a request may be, in bytes. */
  maxHeaderBytes: number;
  state: State;
  gate: Gate;
  log: AccessLog;
}

export interface Kedge {
  readonly port: number;
  readonly grpcPort: number | undefined;
  /** Throws when these cannot be used. */
  check(certificates: Certificates): void;
  /** For new connections. */
  renew(certificates: Certificates): void;
  /** Takes no new connections, lets requests finish, and cuts what is left after `deadlineMs`. */
  close(deadlineMs: number): Promise<void>;
}

/** What serves the connections of one protocol. */
export interface Served {
  accept(socket: tls.TLSSocket): void;
  /** Lets what is under way finish, takes what was on its way for `graceMs`, and begins nothing else. */
  drain(graceMs: number): void;
  close(): void;
}

const HANDSHAKE_TIMEOUT_MS = 5_000;
/** How long an idle HTTP/1.1 connection may still bring a request while we drain: it may be on its way. */
const GRACE_MS = 1_000;

/** One TLS port for HTTP/1.1, HTTP/2 and gRPC: ALPN decides which server a connection is given to. */
export async function startKedge(options: KedgeOptions): Promise<Kedge> {
  const { gate, log, state, maxHeaderBytes } = options;
  const httpProxy = new HttpProxy(state.http, gate);
  const h1 = serveH1(httpProxy, log, maxHeaderBytes);
  const h2 = serveH2(httpProxy, new GrpcProxy(state.grpc, gate), log, maxHeaderBytes);
  const sockets = new Set<tls.TLSSocket>();

  const listen = async (name: string, port: number, alpn: string[]) => {
    const server = tls.createServer(
      {
        ...contextOf(options.certificates),
        requestCert: options.certificates.clientCas.length > 0,
        rejectUnauthorized: options.clientCertRequired,
        handshakeTimeout: HANDSHAKE_TIMEOUT_MS,
        ALPNProtocols: alpn,
      },
      (socket) => {
        sockets.add(socket);
        metrics.connections.inc();
        metrics.accepted.inc(name);
        socket.once('close', () => {
          sockets.delete(socket);
          metrics.connections.dec();
          metrics.closed.inc(name);
        });
        socket.on('error', () => {});
        socket.setNoDelay(true);
        (socket.alpnProtocol === 'h2' ? h2 : h1).accept(socket);
      },
    );
    // Node tells, and leaves them open.
    server.on('tlsClientError', (_error, socket) => socket.destroy());
    await new Promise<void>((resolve, reject) => {
      server.once('error', reject);
      server.listen(port, options.address, resolve);
    });
    return server;
  };
  const servers = [await listen('http_tls', options.port, ['h2', 'http/1.1'])];
  if (options.grpcPort !== undefined) servers.push(await listen('grpc_tls', options.grpcPort, ['h2']));
  const portOf = (server: tls.Server | undefined) => (server?.address() as AddressInfo | undefined)?.port;

  return {
    port: portOf(servers[0])!,
    grpcPort: portOf(servers[1]),
    check: (certificates) => void tls.createSecureContext(contextOf(certificates)),
    renew: (certificates) => {
      for (const server of servers) server.setSecureContext(contextOf(certificates));
    },
    close: async (deadlineMs) => {
      const closed = Promise.all(servers.map((server) => new Promise((resolve) => server.close(resolve))));
      for (const each of [h1, h2]) each.drain(Math.min(GRACE_MS, deadlineMs));
      const cut = setTimeout(() => {
        for (const socket of sockets) socket.destroy();
      }, deadlineMs);
      await closed;
      clearTimeout(cut);
      for (const each of [h1, h2]) each.close();
      state.close();
    },
  };
}

function contextOf({ cert, key, clientCas, clientCrls = [] }: Certificates): tls.SecureContextOptions {
  return { cert, key, ca: clientCas, crl: clientCrls, minVersion: 'TLSv1.2' };
}
