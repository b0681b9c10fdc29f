import http2 from 'node:http2';
import type { Dialer, KedgeError } from 'kedge-dialer';
import { isKedgeError } from 'kedge-dialer';
import { type ConnectSessionManager, connectDialer } from 'kedge-dialer/connect';
import { endToEnd } from '../headers.ts';

const { NGHTTP2_CANCEL, NGHTTP2_INTERNAL_ERROR, NGHTTP2_NO_ERROR } = http2.constants;
const MAX_TARGETS = 1000;
const [UNIMPLEMENTED, UNAVAILABLE] = [12, 14];

/** Plaintext gRPC on this machine: each call goes on as HTTP/2 frames, so that its messages need not be understood. */
export function createGrpcProxy(dialer: Dialer, debug: boolean, log: (message: string) => void): http2.Http2Server {
  const { sessionManager } = connectDialer(dialer);
  const managers = new Map<string, ConnectSessionManager>();
  const managerOf = (authority: string) => {
    let manager = managers.get(authority);
    if (manager === undefined) {
      manager = sessionManager(`http://${authority}`);
      if (managers.size >= MAX_TARGETS) managers.delete(managers.keys().next().value!);
      managers.set(authority, manager);
    }
    return manager;
  };
  const server = http2.createServer({ settings: { initialWindowSize: 1024 * 1024 } });
  server.on('session', (session) => session.on('error', () => {}));
  server.on('stream', async (stream, headers) => {
    stream.on('error', () => {});
    const { ':authority': authority = '', ':path': path = '', ':method': method = '' } = headers;
    if (!/^application\/grpc(?:[+;]|$)/.test(headers['content-type'] ?? '')) {
      stream.respond({ ':status': 415 }, { endStream: true });
      return;
    }
    try {
      const own = endToEnd(headers, (name) => name !== 'host' && name !== 'proxy-authorization');
      const info = debug ? { 'x-kedge-info-logs': 'true' } : {};
      const upstream = await managerOf(authority).request(method, path, { ...own, ...info, te: 'trailers' }, {});
      if (stream.destroyed) upstream.close(NGHTTP2_CANCEL);
      else join(stream, upstream);
      if (debug) log(`${authority}${path}`);
    } catch (error) {
      const cause = isKedgeError(error) ? error : ((error as Error).cause as KedgeError | undefined);
      const status =
        cause?.code === 'ERR_KEDGE_UNMAPPED' ? UNIMPLEMENTED : ((error as { code?: unknown }).code ?? UNAVAILABLE);
      log(String((cause ?? (error as Error)).message));
      endWith(stream, typeof status === 'number' ? status : UNAVAILABLE, String(cause?.message ?? 'the call failed'));
    }
  });
  return server;
}

function join(stream: http2.ServerHttp2Stream, upstream: http2.ClientHttp2Stream): void {
  let trailers: http2.IncomingHttpHeaders = {};
  stream.pipe(upstream);
  upstream.on('response', (headers, flags) => {
    if (stream.destroyed) return;
    const head = { ':status': headers[':status'], ...endToEnd(headers, () => true) };
    const isOver = (flags & http2.constants.NGHTTP2_FLAG_END_STREAM) !== 0;
    stream.respond(head, isOver ? { endStream: true } : { waitForTrailers: true });
    if (isOver) return;
    stream.on('wantTrailers', () => stream.sendTrailers(endToEnd(trailers, () => true)));
    upstream.pipe(stream);
  });
  upstream.on('trailers', (received) => {
    trailers = received;
  });
  upstream.on('error', () => {});
  upstream.on('close', () => {
    if (stream.destroyed || stream.closed) return;
    if (!stream.headersSent) endWith(stream, UNAVAILABLE!, 'the connection to the kedge was lost');
    else if (upstream.rstCode !== NGHTTP2_NO_ERROR || !('grpc-status' in trailers))
      stream.close(upstream.rstCode || NGHTTP2_INTERNAL_ERROR);
  });
  stream.on('close', () => {
    if (!upstream.closed && !upstream.destroyed) upstream.close(NGHTTP2_CANCEL);
  });
}

function endWith(stream: http2.ServerHttp2Stream, status: number, message: string): void {
  if (stream.destroyed || stream.closed) return;
  const head = {
    ':status': 200,
    'content-type': 'application/grpc',
    'grpc-status': String(status),
    'grpc-message': encodeURI(message),
  };
  stream.respond(head, { endStream: true });
  stream.close(NGHTTP2_NO_ERROR);
}
