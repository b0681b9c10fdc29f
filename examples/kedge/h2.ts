import http2 from 'node:http2';
import type { TLSSocket } from 'node:tls';
import type { Metrics } from './debug.ts';
import { H2Exchange } from './exchange.ts';
import { type GrpcProxy, isGrpc } from './grpc-proxy.ts';
import { guardSession } from './h2-guard.ts';
import { readHead } from './headers.ts';
import type { HttpProxy } from './http-proxy.ts';
import { type Peer, peerOf } from './peer.ts';
import { ALLOWED, NO_TUNNELS } from './refusal.ts';
import type { Served } from './server.ts';

const HEADER_PAIRS = 1_000;

/** HTTP/2 on connections that are handed over: gRPC by its content type, all else is HTTP. */
export function serveH2(http: HttpProxy, grpc: GrpcProxy, metrics: Metrics, maxHeaderListSize: number): Served {
  const sessions = new Set<http2.ServerHttp2Session>();
  let accepting: Peer | undefined;

  const serve = (
    stream: http2.ServerHttp2Stream,
    headers: http2.IncomingHttpHeaders,
    flags: number,
    rawHeaders: readonly string[],
    peer: Peer,
  ) => {
    stream.on('error', () => {});
    const wire = isGrpc(headers) ? 'grpc' : 'h2';
    stream.once('close', () => {
      const { 'grpc-status': code, ':status': status } = stream.sentHeaders ?? {};
      metrics.count(wire, String(code ?? status ?? 'none'));
    });
    const { ':authority': named, ':scheme': scheme, ':method': method = 'GET', ':path': path = '/' } = headers;
    const head = readHead(rawHeaders, peer);
    const isTwofold =
      named !== undefined && head?.host !== undefined && named.toLowerCase() !== head.host.toLowerCase();
    if (method === 'CONNECT') {
      stream.respond({ ':status': 405, allow: ALLOWED, 'content-type': 'text/plain' });
      stream.end(NO_TUNNELS);
    } else if (head === undefined || (scheme !== 'https' && scheme !== 'http') || isTwofold)
      stream.respond({ ':status': 400 }, { endStream: true });
    else {
      const authority = named ?? head.host ?? '';
      if (wire === 'h2') {
        const hasBody = (flags & http2.constants.NGHTTP2_FLAG_END_STREAM) === 0;
        http.handle(new H2Exchange(stream, peer, head, rawHeaders, { method, url: path, authority }, hasBody));
        return;
      }
      // It is both ends of two pipes, with a few listeners each.
      stream.setMaxListeners(20);
      grpc
        .handle(stream, { path, authority, head, rawHeaders, peer })
        .catch(() => stream.close(http2.constants.NGHTTP2_INTERNAL_ERROR));
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
    guardSession(session);
    session.on('error', () => {});
    session.once('close', () => sessions.delete(session));
    // Not a 'request' listener: node:http2 would put its compatibility layer in front, which keeps trailers to itself.
    session.on('stream', (stream, headers, flags, rawHeaders) => serve(stream, headers, flags, rawHeaders!, peer));
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
