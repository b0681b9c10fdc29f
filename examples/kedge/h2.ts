import http2 from 'node:http2';
import type { TLSSocket } from 'node:tls';
import type { AccessLog } from './access-log.ts';
import { H2Exchange } from './exchange.ts';
import { type GrpcProxy, isGrpc } from './grpc-proxy.ts';
import { guardSession, type Streams } from './h2-guard.ts';
import { readHead } from './headers.ts';
import type { HttpProxy } from './http-proxy.ts';
import { metrics } from './metrics.ts';
import { type Peer, peerOf } from './peer.ts';
import { ALLOWED, NO_TUNNELS } from './refusal.ts';
import type { Served } from './server.ts';
import { Visit } from './visit.ts';

const HEADER_PAIRS = 1_000;

/** HTTP/2 on connections that are handed over: gRPC by its content type, all else is HTTP. */
export function serveH2(http: HttpProxy, grpc: GrpcProxy, log: AccessLog, maxHeaderListSize: number): Served {
  const sessions = new Set<http2.ServerHttp2Session>();
  let accepting: Peer | undefined;

  const serve = (
    stream: http2.ServerHttp2Stream,
    headers: http2.IncomingHttpHeaders,
    flags: number,
    rawHeaders: readonly string[],
    peer: Peer,
    streams: Streams,
  ) => {
    let closed: () => void = ignore;
    streams.open += 1;
    stream.on('error', ignore);
    stream.once('close', () => {
      streams.open -= 1;
      closed();
    });
    const wire = isGrpc(headers) ? 'grpc' : 'h2';
    const { ':authority': named, ':scheme': scheme, ':method': method = 'GET', ':path': path = '/' } = headers;
    const head = readHead(rawHeaders, peer);
    const isTwofold =
      named !== undefined && head?.host !== undefined && named.toLowerCase() !== head.host.toLowerCase();
    const refuse = (status: number, headers: http2.OutgoingHttpHeaders = {}, text = '') => {
      metrics.requests.inc(wire, String(status));
      stream.respond({ ':status': status, ...headers }, { endStream: text === '' });
      if (text !== '') stream.end(text);
    };
    if (method === 'CONNECT') refuse(405, { allow: ALLOWED, 'content-type': 'text/plain' }, NO_TUNNELS);
    else if (head === undefined || (scheme !== 'https' && scheme !== 'http') || isTwofold) refuse(400);
    else {
      const visit = new Visit(wire, method, path, named ?? head.host ?? '', peer, head, rawHeaders);
      if (wire === 'h2') {
        const hasBody = (flags & http2.constants.NGHTTP2_FLAG_END_STREAM) === 0;
        const exchange = new H2Exchange(stream, visit, hasBody, log);
        closed = () => exchange.closed();
        http.handle(exchange);
        return;
      }
      // It is both ends of two pipes, with a few listeners each.
      stream.setMaxListeners(20);
      closed = () => log.ended(visit, grpcStatusOf(stream));
      grpc.handle(stream, visit, log).catch(() => stream.close(http2.constants.NGHTTP2_INTERNAL_ERROR));
    }
  };

  const server = http2.createServer({
    settings: { maxConcurrentStreams: 100, initialWindowSize: 1024 * 1024, maxHeaderListSize },
    maxHeaderListPairs: HEADER_PAIRS,
    streamResetBurst: 200,
    streamResetRate: 50,
  });
  server.on('session', (session) => {
    const peer = accepting!;
    sessions.add(session);
    const streams = guardSession(session);
    session.on('error', ignore);
    session.once('close', () => sessions.delete(session));
    // Not a 'request' listener: node:http2 would put its compatibility layer in front, which keeps trailers to itself.
    session.on('stream', (stream, headers, flags, raw) => serve(stream, headers, flags, raw!, peer, streams));
  });

  return {
    accept: (socket: TLSSocket) => {
      // The session begins at once.
      accepting = peerOf(socket, '2.0');
      server.emit('connection', socket);
      accepting = undefined;
    },
    drain: () => {
      for (const session of sessions) session.close();
    },
    close: () => {},
  };
}

function grpcStatusOf({ sentTrailers, sentHeaders }: http2.ServerHttp2Stream): number | undefined {
  const status = sentTrailers?.['grpc-status'] ?? sentHeaders?.['grpc-status'];
  return status === undefined ? undefined : Number(status);
}

function ignore(): void {}
