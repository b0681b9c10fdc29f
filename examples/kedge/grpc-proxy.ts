import type { IncomingHttpHeaders, ServerHttp2Stream } from 'node:http2';
import { endWith, joinStreams } from '../grpc-streams.ts';
import { AdhocError, resolveAdhoc } from './adhoc.ts';
import type { Backend, Line } from './backend.ts';
import type { GrpcRoute } from './config.ts';
import { routeGrpc, splitAuthority } from './director.ts';
import { type Caller, isAllowed, towardsBackend, towardsClient } from './headers.ts';
import { lookUp, type WireState } from './state.ts';

/** gRPC status codes that a kedge gives (https://github.com/grpc/grpc/blob/master/doc/statuscodes.md). */
export const STATUS = {
  invalidArgument: 3,
  notFound: 5,
  permissionDenied: 7,
  unimplemented: 12,
  unavailable: 14,
  unauthenticated: 16,
} as const;
const ADHOC_STATUS = {
  INVALID_ARGUMENT: STATUS.invalidArgument,
  NOT_FOUND: STATUS.notFound,
  PERMISSION_DENIED: STATUS.permissionDenied,
} as const;

/** `application/grpc`, with a suffix or parameters, but not grpc-web, which is HTTP. */
export function isGrpc(headers: IncomingHttpHeaders): boolean {
  return /^application\/grpc(?:[+;]|$)/i.test(headers['content-type'] ?? '');
}

/**
 * Proxies gRPC as HTTP/2 streams, so that every kind of call, its trailers, deadline (`grpc-timeout` is a header) and
 * cancellation pass without being understood.
 */
export class GrpcProxy {
  private readonly state: () => WireState<GrpcRoute>;
  private readonly stripProxyAuth: boolean;

  constructor(state: () => WireState<GrpcRoute>, stripProxyAuth: boolean) {
    this.state = state;
    this.stripProxyAuth = stripProxyAuth;
  }

  async handle(stream: ServerHttp2Stream, headers: IncomingHttpHeaders, caller: Caller): Promise<void> {
    const path = headers[':path'] ?? '';
    const backend = await this.find(stream, headers, path, caller);
    if (backend === undefined) return;
    const use = async (line: Line) => {
      if (line.is !== 'h2' || line.session.closed || line.session.destroyed) return false;
      // A client that went away meanwhile wants nothing any more.
      if (stream.destroyed) return true;
      const upstream = line.session.request({
        ...towardsBackend(headers, caller, this.stripProxyAuth),
        ':method': 'POST',
        ':path': path,
        ':authority': caller.authority,
        te: 'trailers',
      });
      joinStreams(stream, upstream, towardsClient);
      return true;
    };
    await backend.dial('grpc', use).catch(() => endWith(stream, STATUS.unavailable, 'the backend cannot be reached'));
  }

  private async find(
    stream: ServerHttp2Stream,
    metadata: IncomingHttpHeaders,
    path: string,
    caller: Caller,
  ): Promise<Backend | undefined> {
    const split = splitAuthority(caller.authority);
    if (!/^\/[^/]+\/[^/]+$/.test(path) || split === undefined) {
      endWith(stream, STATUS.invalidArgument, 'not a gRPC method, or an authority that is no host and port');
      return undefined;
    }
    const { host, port } = split;
    const { routes, adhocRules, backends, adhoc } = this.state();
    const route = routeGrpc(routes, { method: path.slice(1), host, port: port ?? 0, metadata });
    if (route !== undefined) {
      if (isAllowed(route.allowedClients, caller)) return backends.get(route.backendName);
      endWith(stream, STATUS.permissionDenied, 'this client is not allowed');
      return undefined;
    }
    try {
      const address = await resolveAdhoc(adhocRules, host, port, lookUp);
      if (address !== undefined) return adhoc(address);
      endWith(stream, STATUS.unimplemented, 'unknown route to service');
    } catch (error) {
      if (!(error instanceof AdhocError)) throw error;
      endWith(stream, ADHOC_STATUS[error.grpc], error.message);
    }
    return undefined;
  }
}
