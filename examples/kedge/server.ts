import { timingSafeEqual } from 'node:crypto';
import http from 'node:http';
import http2 from 'node:http2';
import type { AddressInfo } from 'node:net';
import type { Duplex } from 'node:stream';
import tls from 'node:tls';
import type { Config } from './config.ts';
import { endWith, GrpcProxy, isGrpc, STATUS } from './grpc-proxy.ts';
import type { Caller } from './headers.ts';
import { type Exchange, HttpProxy, refuse } from './http-proxy.ts';

export interface KedgeOptions {
  address: string;
  /** 0 takes any free port. */
  port: number;
  cert: string;
  key: string;
  /** CAs of client certificates. */
  clientCas: string[];
  clientCertRequired: boolean;
  config: Config;
  /** Callers have to bring it as `Proxy-Authorization: Bearer`; empty: none is asked for. */
  bearerToken: string;
}

export interface Kedge {
  readonly port: number;
  /** Takes no new connections, lets requests finish, and cuts what is left after `deadlineMs`. */
  close(deadlineMs: number): Promise<void>;
}

const HANDSHAKE_TIMEOUT_MS = 5_000;
const IDLE_TIMEOUT_MS = 120_000;
const HEADER_BYTES = 16 * 1024;
const HEADER_PAIRS = 100;

/** One TLS port for HTTP/1.1, HTTP/2 and gRPC: ALPN decides which server a connection is given to. */
export async function startKedge(options: KedgeOptions): Promise<Kedge> {
  const stripProxyAuth = options.bearerToken !== '';
  const httpProxy = new HttpProxy(options.config.http, stripProxyAuth);
  const grpcProxy = new GrpcProxy(options.config.grpc, stripProxyAuth);
  const sessions = new Set<http2.ServerHttp2Session>();
  const sockets = new Set<tls.TLSSocket>();

  const serve = (exchange: Exchange) => {
    if (isAuthorized(exchange.headers, options.bearerToken)) httpProxy.handle(exchange);
    else refuse(exchange, 401, 'unauthorized', 'unauthorized');
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
      if (hostCount(request) !== 1) {
        response.writeHead(400, { connection: 'close' }).end();
        return;
      }
      if (draining) response.shouldKeepAlive = false;
      serve(h1Exchange(request, response));
    },
  );
  h1.maxHeadersCount = HEADER_PAIRS;
  h1.on('upgrade', (request: http.IncomingMessage, socket: Duplex, head: Buffer) => {
    if (hostCount(request) !== 1) socket.end('HTTP/1.1 400 Bad Request\r\nconnection: close\r\n\r\n');
    else if (!isAuthorized(request.headers, options.bearerToken))
      socket.end('HTTP/1.1 401 Unauthorized\r\nconnection: close\r\n\r\n');
    else httpProxy.upgrade(h1Exchange(request, new http.ServerResponse(request)), socket, head);
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
    // Node's HTTP/1.1 timeouts do not count here: a client that never says SETTINGS, or nothing more, has its own.
    const preface = setTimeout(() => session.destroy(), HANDSHAKE_TIMEOUT_MS);
    session.once('remoteSettings', () => clearTimeout(preface));
    session.setTimeout(IDLE_TIMEOUT_MS, () => session.close());
    session.on('error', () => {});
    session.once('close', () => {
      clearTimeout(preface);
      sessions.delete(session);
    });
  });
  // Never a 'request' listener: node:http2 would put its compatibility layer in front, which keeps trailers to itself.
  h2.on('stream', (stream, headers) => {
    const caller = callerOf(
      stream.session!.socket as tls.TLSSocket,
      headers[':authority'] ?? headers.host ?? '',
      '2.0',
    );
    stream.on('error', () => {});
    if (headers[':method'] === 'CONNECT') {
      stream.respond({ ':status': 405 }, { endStream: true });
    } else if (isGrpc(headers)) {
      if (isAuthorized(headers, options.bearerToken)) grpcProxy.handle(stream, headers, caller);
      else endWith(stream, STATUS.unauthenticated, 'unauthorized');
    } else {
      serve(h2Exchange(stream, headers, caller));
    }
  });

  const server = tls.createServer(
    {
      cert: options.cert,
      key: options.key,
      ca: options.clientCas,
      requestCert: options.clientCas.length > 0,
      rejectUnauthorized: options.clientCertRequired,
      handshakeTimeout: HANDSHAKE_TIMEOUT_MS,
      ALPNProtocols: ['h2', 'http/1.1'],
      minVersion: 'TLSv1.2',
    },
    (socket) => {
      sockets.add(socket);
      socket.once('close', () => sockets.delete(socket));
      socket.on('error', () => {});
      socket.setNoDelay(true);
      (socket.alpnProtocol === 'h2' ? h2 : h1).emit('connection', socket);
    },
  );
  let draining = false;
  await new Promise<void>((resolve, reject) => {
    server.once('error', reject);
    server.listen(options.port, options.address, resolve);
  });

  return {
    port: (server.address() as AddressInfo).port,
    close: async (deadlineMs) => {
      draining = true;
      const closed = new Promise<void>((resolve) => server.close(() => resolve()));
      for (const session of sessions) session.close();
      h1.closeIdleConnections();
      const sweep = setInterval(() => h1.closeIdleConnections(), 100);
      const cut = setTimeout(() => {
        for (const socket of sockets) socket.destroy();
      }, deadlineMs);
      await closed;
      clearInterval(sweep);
      clearTimeout(cut);
      httpProxy.close();
      grpcProxy.close();
    },
  };
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
    abort: () => stream.close(http2.constants.NGHTTP2_INTERNAL_ERROR),
  };
}

function callerOf(socket: tls.TLSSocket, authority: string, version: string): Caller {
  const subject = socket.authorized ? socket.getPeerX509Certificate()?.subject.replaceAll('\n', ',') : undefined;
  return { subject, address: socket.remoteAddress, authority, version };
}

/** RFC 9112 §3.2: exactly one, or nobody knows which one counts. */
function hostCount({ rawHeaders }: http.IncomingMessage): number {
  return rawHeaders.filter((name, i) => i % 2 === 0 && name.toLowerCase() === 'host').length;
}

function isAuthorized(headers: http.IncomingHttpHeaders, token: string): boolean {
  if (token === '') return true;
  const given = Buffer.from(/^Bearer (.+)$/.exec(headers['proxy-authorization'] ?? '')?.[1] ?? '');
  const wanted = Buffer.from(token);
  return given.length === wanted.length && timingSafeEqual(given, wanted);
}
