import type { IncomingHttpHeaders, OutgoingHttpHeaders, ServerHttp2Stream } from 'node:http2';
import { endWith, joinStreams } from '../grpc-streams.ts';
import { AdhocError, resolveAdhoc } from './adhoc.ts';
import type { Gate } from './auth.ts';
import type { Backend } from './backend.ts';
import type { GrpcRoute } from './config.ts';
import { DialError } from './dial.ts';
import { routeGrpc, splitAuthority } from './director.ts';
import { FullError, type GrpcLine } from './grpc-line.ts';
import { type Head, towardsClient, trailersTowardsClient, valuesOf } from './headers.ts';
import { isAllowed, type Peer } from './peer.ts';
import { lookUp, type WireState } from './state.ts';

/** gRPC status codes that a kedge gives (https://github.com/grpc/grpc/blob/master/doc/statuscodes.md). */
const STATUS = {
  INVALID_ARGUMENT: 3,
  NOT_FOUND: 5,
  PERMISSION_DENIED: 7,
  RESOURCE_EXHAUSTED: 8,
  UNIMPLEMENTED: 12,
  UNAVAILABLE: 14,
  UNAUTHENTICATED: 16,
} as const;

/** Why a call goes nowhere. */
class Refusal extends Error {
  readonly status: keyof typeof STATUS;

  constructor(status: keyof typeof STATUS, message: string) {
    super(message);
    this.status = status;
  }
}

/** One call as it came in. */
export interface Call {
  readonly path: string;
  readonly authority: string;
  readonly head: Head;
  readonly rawHeaders: readonly string[];
  readonly peer: Peer;
}

/** `application/grpc`, with a suffix or parameters, but not grpc-web, which is HTTP. */
export function isGrpc(headers: IncomingHttpHeaders): boolean {
  return /^application\/grpc(?:[+;]|$)/i.test(headers['content-type'] ?? '');
}

/**
 * Proxies gRPC as HTTP/2 streams, so that every kind of call, its trailers, deadline (`grpc-timeout` is a header) and
 * cancellation pass without being understood.
 */
export class GrpcProxy {
  private readonly state: () => WireState<GrpcRoute, GrpcLine>;
  private readonly gate: Gate;

  constructor(state: () => WireState<GrpcRoute, GrpcLine>, gate: Gate) {
    this.state = state;
    this.gate = gate;
  }

  async handle(stream: ServerHttp2Stream, call: Call): Promise<void> {
    try {
      if (!(await this.gate.admits(call.head.proxyAuthorization))) throw new Refusal('UNAUTHENTICATED', 'unauthorized');
      const backend = await this.backendOf(call);
      await backend.ready()?.catch(() => {
        throw new Refusal('UNAVAILABLE', 'the backend has no address');
      });
      const { name } = call.peer;
      if ((await backend.shares.take(name)) !== true)
        throw new Refusal('RESOURCE_EXHAUSTED', 'this client has too many calls under way');
      const release = () => backend.shares.release(name);
      if (stream.closed) release();
      else stream.once('close', release);
      await this.send(stream, call, backend);
    } catch (error) {
      if (error instanceof Refusal) endWith(stream, STATUS[error.status], error.message);
      else if (error instanceof AdhocError) endWith(stream, STATUS[error.grpc], error.message);
      else throw error;
    }
  }

  private async send(stream: ServerHttp2Stream, call: Call, backend: Backend<GrpcLine>): Promise<void> {
    const headers: OutgoingHttpHeaders = valuesOf(call.head.headers);
    Object.assign(headers, {
      ':method': 'POST',
      ':path': call.path,
      ':authority': call.authority,
      'x-forwarded-host': call.authority,
      te: 'trailers',
    });
    const tried: GrpcLine[] = [];
    let isFull = false;
    for (;;) {
      // A client that went away meanwhile wants nothing any more.
      if (stream.closed || stream.destroyed) return;
      const line = backend.next(tried);
      if (line === undefined) {
        if (isFull) throw new Refusal('RESOURCE_EXHAUSTED', 'the backend takes no more calls');
        throw new Refusal('UNAVAILABLE', 'the backend cannot be reached');
      }
      tried.push(line);
      try {
        const upstream = await line.request(headers);
        backend.connected(line);
        joinStreams(stream, upstream, towardsClient, trailersTowardsClient);
        return;
      } catch (error) {
        if (error instanceof FullError) isFull = true;
        else if (error instanceof DialError) backend.setAside(line);
        else throw new Refusal('INVALID_ARGUMENT', 'this cannot be sent to a backend');
      }
    }
  }

  private async backendOf({ path, authority, rawHeaders, peer }: Call): Promise<Backend<GrpcLine>> {
    const split = splitAuthority(authority);
    if (!/^\/[^/]+\/[^/]+$/.test(path) || split === undefined)
      throw new Refusal('INVALID_ARGUMENT', 'not a gRPC method, or an authority that is no host and port');
    const { host, port } = split;
    const { routes, adhocRules, backends, adhoc } = this.state();
    const metadata = valuesOf(rawHeaders);
    const route = routeGrpc(routes, { method: path.slice(1), host, port: port ?? 0, metadata });
    if (route !== undefined) {
      if (isAllowed(route.allowedClients, peer)) return backends.get(route.backendName)!;
      throw new Refusal('PERMISSION_DENIED', 'this client is not allowed');
    }
    const address = await resolveAdhoc(adhocRules, host, port, lookUp);
    if (address === undefined) throw new Refusal('UNIMPLEMENTED', 'unknown route to service');
    return adhoc(address);
  }
}
