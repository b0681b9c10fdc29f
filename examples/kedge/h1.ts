import http from 'node:http';
import type { Socket } from 'node:net';
import type { Duplex } from 'node:stream';
import type { TLSSocket } from 'node:tls';
import type { AccessLog } from './access-log.ts';
import { H1Exchange } from './exchange.ts';
import { readHead } from './headers.ts';
import { type HttpProxy, type Join, joinSockets } from './http-proxy.ts';
import { metrics } from './metrics.ts';
import { type Peer, peerOf } from './peer.ts';
import { ALLOWED, NO_TUNNELS } from './refusal.ts';
import type { Served } from './server.ts';

const HEADERS_MS = 10_000;
const CHECK_MS = 1_000;
const SWEEP_MS = 50;

/** HTTP/1.1 on connections that are handed over. Node's own parser refuses what could hide a second request. */
export function serveH1(proxy: HttpProxy, log: AccessLog, maxHeaderSize: number): Served {
  const peers = new WeakMap<Duplex, Peer>();
  let isDraining = false;
  let sweep: NodeJS.Timeout | undefined;

  const serve = (request: http.IncomingMessage, response: http.ServerResponse, join?: Join) => {
    const peer = peers.get(request.socket)!;
    const head = readHead(request.rawHeaders, peer);
    if (head === undefined || request.httpVersionMajor !== 1 || (join !== undefined && head.hasBody)) {
      metrics.requests.inc('http/1.1', '400');
      response.writeHead(400, { connection: 'close' }).end();
      return;
    }
    const isWebSocket = head.upgrade?.toLowerCase() === 'websocket' && request.method === 'GET';
    const exchange = new H1Exchange(request, response, peer, head, log);
    response.once('close', () => exchange.closed());
    proxy.handle(exchange, isWebSocket ? join : undefined);
  };

  const server = http.createServer(
    { maxHeaderSize, headersTimeout: HEADERS_MS, requestTimeout: 0, connectionsCheckingInterval: CHECK_MS },
    (request, response) => {
      if (isDraining) response.shouldKeepAlive = false;
      serve(request, response);
    },
  );
  // Node drops the headers above this number without a word; their size is bounded.
  server.maxHeadersCount = 0;
  // It never listens itself, and without this its timeouts would never begin.
  server.emit('listening');
  server.on('connect', (_request, socket) =>
    socket.end(
      `HTTP/1.1 405 Method Not Allowed\r\nallow: ${ALLOWED}\r\ncontent-type: text/plain\r\nconnection: close\r\n\r\n${NO_TUNNELS}`,
    ),
  );
  // Any other protocol than WebSocket is answered as if it were not offered (RFC 9110 §7.8). It is the connection's last request.
  server.on('upgrade', (request: http.IncomingMessage, socket: Socket, head: Buffer) => {
    const response = new http.ServerResponse(request);
    response.shouldKeepAlive = false;
    response.assignSocket(socket);
    response.once('finish', () => socket.end());
    socket.on('error', () => {});
    socket.on('drain', () => response.emit('drain'));
    serve(request, response, (backend, headers) => {
      response.detachSocket(socket);
      joinSockets(socket, head, backend, headers);
    });
  });

  return {
    accept: (socket: TLSSocket) => {
      peers.set(socket, peerOf(socket, '1.1'));
      server.emit('connection', socket);
    },
    drain: (graceMs) => {
      isDraining = true;
      const graceEnds = performance.now() + graceMs;
      sweep = setInterval(() => {
        if (performance.now() >= graceEnds) server.closeIdleConnections();
      }, SWEEP_MS);
    },
    close: () => {
      clearInterval(sweep);
      server.close();
    },
  };
}
