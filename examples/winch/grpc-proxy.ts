import http2 from 'node:http2';
import { type Dialer, isKedgeError } from 'kedge-dialer';
import { type ConnectSessionManager, connectDialer } from 'kedge-dialer/connect';
import { endWith, joinStreams } from '../grpc-streams.ts';
import { endToEnd } from '../headers.ts';

const MAX_TARGETS = 1000;
const [UNIMPLEMENTED, INTERNAL, UNAVAILABLE] = [12, 13, 14];
/** Plaintext gRPC on this machine: each call goes on as HTTP/2 frames, so that its messages need not be understood. */
export function createGrpcProxy(dialer: Dialer, debug: boolean, log: (message: string) => void): http2.Http2Server {
  const { sessionManager } = connectDialer(dialer);
  const managers = new Map<string, ConnectSessionManager>();
  const managerOf = (authority: string) => {
    let manager = managers.get(authority);
    if (manager === undefined) {
      // A URL leaves out its own default port: one that was named stays, and gRPC's is 443.
      manager = sessionManager(`${/:[0-9]+$/.test(authority) ? 'http' : 'https'}://${authority}`);
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
      stream.respond({ ':status': 415, 'content-type': 'text/plain' });
      stream.end('winch: this port takes gRPC only, with a content-type of application/grpc\n');
      return;
    }
    try {
      const own = endToEnd(headers, (name) => name !== 'host' && name !== 'proxy-authorization');
      const info = debug ? { 'x-kedge-info-logs': 'true' } : {};
      const upstream = await managerOf(authority).request(method, path, { ...own, ...info, te: 'trailers' }, {});
      if (stream.destroyed) upstream.close(http2.constants.NGHTTP2_CANCEL);
      else joinStreams(stream, upstream, (received) => endToEnd(received, () => true));
      if (debug) log(`${authority}${path}`);
    } catch (error) {
      const { code, cause } = error as { code?: unknown; cause?: unknown };
      const known = [error, cause].find(isKedgeError);
      const reason = known?.message ?? 'the call failed';
      log(known?.message ?? String(error));
      // The codes and words of the original.
      if (known?.code === 'ERR_KEDGE_UNMAPPED')
        endWith(stream, UNIMPLEMENTED, `${authority} is not a kedge destination`);
      else if (known?.stage === 'token') endWith(stream, INTERNAL, `transport: cannot get token: ${reason}`);
      else endWith(stream, typeof code === 'number' ? code : UNAVAILABLE, reason);
    }
  });
  return server;
}
