import { createHash } from 'node:crypto';
import http from 'node:http';
import http2 from 'node:http2';
import type { AddressInfo, Socket } from 'node:net';
import type { TestContext } from 'node:test';
import tls from 'node:tls';
import { type Authority, type Certificate, createAuthority } from '../../examples/pki.ts';
import { createDialer, type Dialer, type DialerOptions, pem, type RouteInit, single } from '../../src/index.ts';

/** The name that the test kedge's certificate is for. */
export const KEDGE_NAME = 'us1.kedge.test';

/** What the kedge saw of one request. */
export interface Seen {
  alpn: string;
  method: string;
  /** `Host` or `:authority`. */
  authority: string;
  path: string;
  headers: Record<string, string | string[] | undefined>;
  /** Name and value in turn, as they came. */
  rawHeaders: string[];
  sni: string | false;
  clientSubject: string;
  clientSerial: string;
  resumed: boolean;
  connection: number;
}

type Request = http.IncomingMessage | http2.Http2ServerRequest;
type Response = http.ServerResponse | http2.Http2ServerResponse;
export type KedgeHandler = (request: Request, response: Response, seen: Seen) => void;

/** What the kedge saw of one TLS connection. */
export interface SeenConnection {
  sni: string | false;
  clientSubject: string;
  clientSerial: string;
  resumed: boolean;
  /** On the clock of `performance.now()`. */
  at: number;
}

export interface TestKedge {
  readonly port: number;
  readonly url: string;
  readonly ca: Authority;
  readonly client: Certificate;
  readonly seen: Seen[];
  readonly connections: readonly SeenConnection[];
  /** TLS handshakes that were completed. */
  readonly handshakes: number;
  /** Connections that are open now. */
  readonly sockets: ReadonlySet<tls.TLSSocket>;
  readonly sessions: ReadonlySet<http2.ServerHttp2Session>;
  /** A route to this kedge, by address and name. */
  route(options?: Partial<Exclude<RouteInit, string | URL>>): Exclude<RouteInit, string | URL>;
  /** A dialer that sends every name here with the client certificate; closed when the test ends. */
  dialer(options?: Partial<DialerOptions>): Dialer;
  /** Cuts every connection with a TCP reset. */
  reset(): void;
  close(): Promise<void>;
}

export interface TestKedgeOptions {
  /** More names in its certificate. */
  names?: readonly string[];
  alpn?: readonly string[];
  /** Where it listens. Default: any free port of 127.0.0.1. */
  at?: { host: string; port: number };
  handler?: KedgeHandler;
  requireClientCertificate?: boolean;
  settings?: http2.Settings;
  /** Takes over every HTTP/2 connection after TLS, such as for a gRPC server. */
  onH2?: (socket: tls.TLSSocket) => void;
  /** Called with each TCP connection before TLS; true takes it over. */
  onTcp?: (socket: Socket) => boolean;
  onUpgrade?: (request: http.IncomingMessage, socket: tls.TLSSocket, head: Buffer) => void;
}

let shared: Promise<Authority> | undefined;
/** One CA for a test file: making it is slow beside everything else. */
export function authority(): Promise<Authority> {
  shared ??= createAuthority('test CA');
  return shared;
}

/** A TLS server for HTTP/1.1 and HTTP/2 that plays a kedge and records what it sees. */
export async function startKedge(t: TestContext, options: TestKedgeOptions = {}): Promise<TestKedge> {
  const ca = await authority();
  const [certificate, client] = await Promise.all([
    ca.issue({ cn: KEDGE_NAME, dns: [KEDGE_NAME, ...(options.names ?? [])] }),
    ca.issue({ cn: 'pod' }),
  ]);
  const seen: Seen[] = [];
  const sockets = new Set<tls.TLSSocket>();
  const sessions = new Set<http2.ServerHttp2Session>();
  const numbers = new WeakMap<object, number>();
  const connections: SeenConnection[] = [];

  const answer = (request: Request, response: Response): void => {
    // Node tells of a stream one turn late: its session may have ended in between, and nobody waits for an answer.
    if (!(request instanceof http.IncomingMessage) && request.stream.session === undefined) return;
    const socket = (
      request instanceof http.IncomingMessage ? request.socket : request.stream.session!.socket
    ) as tls.TLSSocket;
    const certificate = socket.getPeerCertificate();
    const record: Seen = {
      alpn: String(socket.alpnProtocol),
      method: request.method!,
      authority: request instanceof http.IncomingMessage ? request.headers.host! : request.authority,
      path: request.url!,
      headers: request.headers,
      rawHeaders: request.rawHeaders,
      sni: (socket as tls.TLSSocket & { servername: string | false }).servername,
      clientSubject: String(certificate.subject?.CN),
      clientSerial: certificate.serialNumber,
      resumed: socket.isSessionReused(),
      connection: numbers.get(request instanceof http.IncomingMessage ? socket : request.stream.session!)!,
    };
    seen.push(record);
    (options.handler ?? echo)(request, response, record);
  };
  const h1 = http.createServer(answer);
  h1.keepAliveTimeout = 60_000;
  if (options.onUpgrade !== undefined) h1.on('upgrade', options.onUpgrade as never);
  const h2 = http2.createServer({ settings: options.settings }, answer);
  h2.on('session', (session) => {
    numbers.set(session, connections.length);
    sessions.add(session);
    session.on('close', () => sessions.delete(session));
    session.on('error', () => {});
  });
  const server = tls.createServer(
    {
      cert: certificate.cert,
      key: certificate.key,
      ca: ca.cert,
      requestCert: true,
      rejectUnauthorized: options.requireClientCertificate ?? true,
      ALPNProtocols: [...(options.alpn ?? ['h2', 'http/1.1'])],
    },
    (socket) => {
      const certificate = socket.getPeerCertificate();
      connections.push({
        sni: (socket as tls.TLSSocket & { servername: string | false }).servername,
        clientSubject: String(certificate.subject?.CN),
        clientSerial: certificate.serialNumber,
        resumed: socket.isSessionReused(),
        at: performance.now(),
      });
      numbers.set(socket, connections.length);
      sockets.add(socket);
      socket.on('close', () => sockets.delete(socket));
      socket.on('error', () => {});
      if (socket.alpnProtocol === 'h2' && options.onH2 !== undefined) options.onH2(socket);
      else (socket.alpnProtocol === 'h2' ? h2 : h1).emit('connection', socket);
    },
  );
  server.on('tlsClientError', () => {});
  if (options.onTcp !== undefined) {
    const [listener] = server.listeners('connection');
    server.removeAllListeners('connection');
    server.on('connection', (socket) => {
      if (!options.onTcp!(socket)) listener!.call(server, socket);
    });
  }
  const tcp = new Set<Socket>();
  server.on('connection', (socket: Socket) => {
    tcp.add(socket);
    socket.on('close', () => tcp.delete(socket));
  });
  await new Promise<void>((resolve) => server.listen(options.at ?? { host: '127.0.0.1', port: 0 }, resolve));
  const { port } = server.address() as AddressInfo;
  const url = `https://127.0.0.1:${port}`;

  const kedge: TestKedge = {
    port,
    url,
    ca,
    client,
    seen,
    connections,
    get handshakes() {
      return connections.length;
    },
    sockets,
    sessions,
    route: (more = {}) => ({ kedge: url, serverName: KEDGE_NAME, ...more }),
    dialer: (more = {}) => {
      const identity = pem({ cert: client.cert, key: client.key, ca: ca.cert });
      const dialer = createDialer({ mapper: single(kedge.route()), identity, ...more });
      t.after(() => dialer.destroy());
      return dialer;
    },
    reset: () => {
      for (const socket of tcp) socket.resetAndDestroy();
    },
    close: () =>
      new Promise((resolve) => {
        server.close(() => resolve());
        for (const socket of tcp) socket.destroy();
      }),
  };
  t.after(() => kedge.close());
  return kedge;
}

/** Answers with what was seen, and with the length and hash of the body. */
export const echo: KedgeHandler = (request, response, seen) => {
  const hash = createHash('sha256');
  let bytes = 0;
  request.on('data', (chunk: Buffer) => {
    bytes += chunk.length;
    hash.update(chunk);
  });
  request.on('end', () => {
    const body = JSON.stringify({ ...seen, bytes, sha256: hash.digest('hex') });
    response.setHeader('content-type', 'application/json');
    response.end(body);
  });
  request.on('error', () => {});
};

export function sha256(data: string | Buffer): string {
  return createHash('sha256').update(data).digest('hex');
}
