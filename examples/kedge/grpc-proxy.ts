import http2, { constants, type IncomingHttpHeaders, type ServerHttp2Stream } from 'node:http2';
import type { Backend, Config } from './config.ts';
import { routeGrpc, splitAuthority } from './director.ts';
import { type Caller, towardsBackend, towardsClient } from './headers.ts';

const { NGHTTP2_CANCEL, NGHTTP2_INTERNAL_ERROR, NGHTTP2_NO_ERROR } = constants;

/** gRPC status codes that a kedge gives (https://github.com/grpc/grpc/blob/master/doc/statuscodes.md). */
export const STATUS = { invalidArgument: 3, unimplemented: 12, unavailable: 14, unauthenticated: 16 } as const;

/** `application/grpc`, with a suffix or parameters, but not grpc-web, which is HTTP. */
export function isGrpc(headers: IncomingHttpHeaders): boolean {
  return /^application\/grpc(?:[+;]|$)/i.test(headers['content-type'] ?? '');
}

/**
 * Proxies gRPC as HTTP/2 streams, so that every kind of call, its trailers, deadline (`grpc-timeout` is a header) and
 * cancellation pass without being understood. One connection to each backend, dialled again when it is lost.
 */
export class GrpcProxy {
  private readonly config: Config['grpc'];
  private readonly stripProxyAuth: boolean;
  private readonly sessions = new Map<string, http2.ClientHttp2Session>();

  constructor(config: Config['grpc'], stripProxyAuth: boolean) {
    this.config = config;
    this.stripProxyAuth = stripProxyAuth;
  }

  handle(stream: ServerHttp2Stream, headers: IncomingHttpHeaders, caller: Caller): void {
    const path = headers[':path'] ?? '';
    const split = splitAuthority(caller.authority);
    if (!/^\/[^/]+\/[^/]+$/.test(path) || split === undefined) {
      endWith(stream, STATUS.invalidArgument, 'not a gRPC method and authority');
      return;
    }
    const { host, port = 0 } = split;
    const name = routeGrpc(this.config.routes, { method: path.slice(1), host, port, metadata: headers });
    const backend = name === undefined ? undefined : this.config.backends.get(name);
    if (backend === undefined) {
      endWith(stream, STATUS.unimplemented, name === undefined ? 'unknown route to service' : 'unknown backend');
      return;
    }
    const upstream = this.session(backend).request({
      ...towardsBackend(headers, caller, this.stripProxyAuth),
      ':method': 'POST',
      ':path': path,
      ':authority': caller.authority,
      te: 'trailers',
    });
    connect(stream, upstream);
  }

  close(): void {
    for (const session of this.sessions.values()) session.close();
  }

  private session({ name, host: { dnsName, port } }: Backend): http2.ClientHttp2Session {
    const known = this.sessions.get(name);
    if (known !== undefined && !known.closed && !known.destroyed) return known;
    const session = http2.connect(`http://${dnsName}:${port}`, { settings: { initialWindowSize: 1024 * 1024 } });
    // Its streams report what becomes of it.
    session.on('error', () => {});
    session.on('goaway', () => session.close());
    this.sessions.set(name, session);
    return session;
  }
}

/** Joins the client's stream with the backend's, in both directions and in every way to end. */
function connect(stream: ServerHttp2Stream, upstream: http2.ClientHttp2Stream): void {
  let trailers: IncomingHttpHeaders = {};
  stream.pipe(upstream);
  upstream.on('response', (headers, flags) => {
    if (stream.destroyed || stream.headersSent) return;
    const head = { ':status': headers[':status'], ...towardsClient(headers) };
    if ((flags & constants.NGHTTP2_FLAG_END_STREAM) !== 0) {
      stream.respond(head, { endStream: true });
      return;
    }
    stream.respond(head, { waitForTrailers: true });
    stream.on('wantTrailers', () => stream.sendTrailers(towardsClient(trailers)));
    upstream.pipe(stream);
  });
  upstream.on('trailers', (received) => {
    trailers = received;
  });
  upstream.on('error', () => {});
  upstream.on('close', () => {
    if (stream.destroyed || stream.closed) return;
    if (!stream.headersSent) endWith(stream, STATUS.unavailable, 'the backend cannot be reached');
    else if (upstream.rstCode !== NGHTTP2_NO_ERROR || !('grpc-status' in trailers))
      stream.close(upstream.rstCode || NGHTTP2_INTERNAL_ERROR);
  });
  stream.on('error', () => {});
  stream.on('close', () => {
    if (!upstream.closed && !upstream.destroyed) upstream.close(NGHTTP2_CANCEL);
  });
}

/** A status without a message ("trailers-only"). */
export function endWith(stream: ServerHttp2Stream, status: number, message: string): void {
  if (stream.destroyed || stream.closed) return;
  const head = {
    ':status': 200,
    'content-type': 'application/grpc',
    'grpc-status': String(status),
    'grpc-message': message,
  };
  stream.respond(head, { endStream: true });
  // What the client still sends is not wanted.
  stream.close(NGHTTP2_NO_ERROR);
}
