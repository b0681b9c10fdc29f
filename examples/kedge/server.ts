import http from 'node:http';
import http2 from 'node:http2';
import type { AddressInfo } from 'node:net';
import type { Duplex } from 'node:stream';
import tls from 'node:tls';
import { endWith } from '../grpc-streams.ts';
import type { Gate } from './auth.ts';
import type { Metrics } from './debug.ts';
import { GrpcProxy, isGrpc, STATUS } from './grpc-proxy.ts';
import { guardSession } from './h2-guard.ts';
import type { Caller } from './headers.ts';
import { type Exchange, HttpProxy, refuse } from './http-proxy.ts';
import type { State } from './state.ts';

/** What the kedge shows, and the CAs of client certificates, PEM. */
export interface Certificates {
  cert: string;
  key: string;
  clientCas: string[];
}

export interface KedgeOptions {
  address: string;
  /** For HTTP and gRPC. 0 takes any free port. */
  port: number;
  /** For gRPC only; undefined: none. */
  grpcPort?: number | undefined;
  certificates: Certificates;
  clientCertRequired: boolean;
  state: State;
  gate: Gate;
  metrics: Metrics;
}

export interface Kedge {
  readonly port: number;
  readonly grpcPort: number | undefined;
  /** For new connections; throws when they cannot be used. */
  renew(certificates: Certificates): void;
  /** Takes no new connections, lets requests finish, and cuts what is left after `deadlineMs`. */
  close(deadlineMs: number): Promise<void>;
}

const HANDSHAKE_TIMEOUT_MS = 5_000;
const HEADER_BYTES = 16 * 1024;
const HEADER_PAIRS = 100;
/** How long an idle HTTP/1.1 connection may still bring a request while we drain: it may be on its way. */
const GRACE_MS = 1_000;

/** One TLS port for HTTP/1.1, HTTP/2 and gRPC: ALPN decides which server a connection is given to. */
export async function startKedge(options: KedgeOptions): Promise<Kedge> {
  const { gate, metrics, state } = options;
  const httpProxy = new HttpProxy(state.http, gate.consumes);
  const grpcProxy = new GrpcProxy(state.grpc, gate.consumes);
  const sessions = new Set<http2.ServerHttp2Session>();
  const sockets = new Set<tls.TLSSocket>();
  let draining = false;

  const serve = async (exchange: Exchange) => {
    if (await gate.admits(exchange.headers['proxy-authorization'])) await httpProxy.handle(exchange);
    else refuse(exchange, 401, 'unauthorized', 'unauthorized');
  };
  const serveGrpc = async (stream: http2.ServerHttp2Stream, headers: http2.IncomingHttpHeaders, caller: Caller) => {
    if (await gate.admits(headers['proxy-authorization'])) await grpcProxy.handle(stream, headers, caller);
    else endWith(stream, STATUS.unauthenticated, 'unauthorized');
  };

  const h1 = http.createServer(
    {
      maxHeaderSize: HEADER_BYTES,
      headersTimeout: 10_000,
      requestTimeout: 0,
      connectionsCheckingInterval: 1_000,
      requireHostHeader: true,
    },
    (request, response) => {
      if (!isUnambiguous(request)) {
        response.writeHead(400, { connection: 'close' }).end();
        return;
      }
      if (draining) response.shouldKeepAlive = false;
      response.once('close', () => metrics.requests.inc({ wire: 'http/1.1', status: response.statusCode }));
      serve(h1Exchange(request, response)).catch(() => request.socket.destroy());
    },
  );
  h1.maxHeadersCount = HEADER_PAIRS;
  h1.on('upgrade', async (request: http.IncomingMessage, socket: Duplex, head: Buffer) => {
    socket.on('error', () => {});
    if (!isUnambiguous(request)) socket.end('HTTP/1.1 400 Bad Request\r\nconnection: close\r\n\r\n');
    else if (!(await gate.admits(request.headers['proxy-authorization'])))
      socket.end('HTTP/1.1 401 Unauthorized\r\nconnection: close\r\n\r\n');
    else await httpProxy.upgrade(h1Exchange(request, new http.ServerResponse(request)), socket, head);
  });
  h1.on('connect', (_request, socket) => socket.end('HTTP/1.1 405 Method Not Allowed\r\nconnection: close\r\n\r\n'));

  const h2 = http2.createServer({
    settings: { maxConcurrentStreams: 100, initialWindowSize: 1024 * 1024, maxHeaderListSize: HEADER_BYTES },
    maxHeaderListPairs: HEADER_PAIRS,
    streamResetBurst: 200,
    streamResetRate: 50,
  });
  h2.on('session', (session) => {
    sessions.add(session);
    guardSession(session);
    session.on('error', () => {});
    session.once('close', () => sessions.delete(session));
  });
  // Never a 'request' listener: node:http2 would put its compatibility layer in front, which keeps trailers to itself.
  h2.on('stream', (stream, headers) => {
    const socket = stream.session!.socket as tls.TLSSocket;
    const caller = callerOf(socket, headers[':authority'] ?? headers.host ?? '', '2.0');
    stream.on('error', () => {});
    // It is both ends of a pipeline, with a few listeners each.
    stream.setMaxListeners(20);
    const wire = isGrpc(headers) ? 'grpc' : 'h2';
    stream.once('close', () => {
      const { 'grpc-status': code, ':status': status } = stream.sentHeaders ?? {};
      metrics.requests.inc({ wire, status: String(code ?? status ?? 'none') });
    });
    const { ':authority': authority, ':scheme': scheme, host } = headers;
    const isTwofold = authority !== undefined && host !== undefined && authority.toLowerCase() !== host.toLowerCase();
    if (headers[':method'] === 'CONNECT') stream.respond({ ':status': 405 }, { endStream: true });
    else if ((scheme !== 'https' && scheme !== 'http') || isTwofold)
      stream.respond({ ':status': 400 }, { endStream: true });
    else {
      const served = wire === 'grpc' ? serveGrpc(stream, headers, caller) : serve(h2Exchange(stream, headers, caller));
      served.catch(() => stream.close(http2.constants.NGHTTP2_INTERNAL_ERROR));
    }
  });

  const listen = async (port: number, alpn: string[]) => {
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
        socket.once('close', () => {
          sockets.delete(socket);
          metrics.connections.dec();
        });
        socket.on('error', () => {});
        socket.setNoDelay(true);
        (socket.alpnProtocol === 'h2' ? h2 : h1).emit('connection', socket);
      },
    );
    await new Promise<void>((resolve, reject) => {
      server.once('error', reject);
      server.listen(port, options.address, resolve);
    });
    return server;
  };
  const servers = [await listen(options.port, ['h2', 'http/1.1'])];
  if (options.grpcPort !== undefined) servers.push(await listen(options.grpcPort, ['h2']));
  const portOf = (server: tls.Server | undefined) => (server?.address() as AddressInfo | undefined)?.port;

  return {
    port: portOf(servers[0])!,
    grpcPort: portOf(servers[1]),
    renew: (certificates) => {
      for (const server of servers) server.setSecureContext(contextOf(certificates));
    },
    close: async (deadlineMs) => {
      draining = true;
      const closed = Promise.all(servers.map((server) => new Promise((resolve) => server.close(resolve))));
      for (const session of sessions) session.close();
      const graceEnds = performance.now() + Math.min(GRACE_MS, deadlineMs);
      const sweep = setInterval(() => {
        if (performance.now() >= graceEnds) h1.closeIdleConnections();
      }, 50);
      const cut = setTimeout(() => {
        for (const socket of sockets) socket.destroy();
      }, deadlineMs);
      await closed;
      clearInterval(sweep);
      clearTimeout(cut);
      state.close();
    },
  };
}

function contextOf({ cert, key, clientCas }: Certificates): tls.SecureContextOptions {
  return { cert, key, ca: clientCas, minVersion: 'TLSv1.2' };
}

function h1Exchange(request: http.IncomingMessage, response: http.ServerResponse): Exchange {
  const authority = request.headers.host ?? '';
  return {
    method: request.method!,
    authority,
    url: request.url!,
    headers: request.headers,
    body: request,
    sink: response,
    caller: callerOf(request.socket as tls.TLSSocket, authority, request.httpVersion),
    respond: (status, headers, trailers) => {
      response.writeHead(status, headers);
      if (trailers !== undefined)
        response.once('prefinish', () => response.addTrailers(trailers() as http.OutgoingHttpHeaders));
      return response;
    },
    hint: (headers) => response.writeEarlyHints(headers as Record<string, string>),
    isAnswered: () => response.headersSent,
    abort: () => request.socket.destroy(),
  };
}

function h2Exchange(stream: http2.ServerHttp2Stream, headers: http2.IncomingHttpHeaders, caller: Caller): Exchange {
  return {
    method: headers[':method'] ?? 'GET',
    authority: caller.authority,
    url: headers[':path'] ?? '/',
    headers,
    body: stream,
    sink: stream,
    caller,
    respond: (status, head, trailers) => {
      stream.respond({ ':status': status, ...head }, { waitForTrailers: trailers !== undefined });
      if (trailers !== undefined) stream.on('wantTrailers', () => stream.sendTrailers(trailers()));
      return stream;
    },
    hint: (head) => stream.additionalHeaders({ ':status': 103, ...head }),
    isAnswered: () => stream.headersSent,
    abort: () => stream.close(http2.constants.NGHTTP2_INTERNAL_ERROR),
  };
}

function callerOf(socket: tls.TLSSocket, authority: string, version: string): Caller {
  const certificate = socket.authorized ? socket.getPeerX509Certificate() : undefined;
  const spiffeId = /(?:^|, )URI:(spiffe:\/\/[^,]+)/.exec(certificate?.subjectAltName ?? '')?.[1];
  return {
    subject: certificate?.subject.replaceAll('\n', ','),
    spiffeId,
    address: socket.remoteAddress,
    authority,
    version,
  };
}

/**
 * One `Host` (RFC 9112 §3.2) and at most one `Proxy-Authorization`, or nobody knows which one counts; Node's own parser
 * refuses what could hide a second request.
 */
function isUnambiguous({ rawHeaders }: http.IncomingMessage): boolean {
  const count = (wanted: string) => rawHeaders.filter((name, i) => i % 2 === 0 && name.toLowerCase() === wanted).length;
  return count('host') === 1 && count('proxy-authorization') <= 1;
}
