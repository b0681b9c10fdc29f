import type { IncomingHttpHeaders, OutgoingHttpHeaders, ServerHttp2Stream } from 'node:http2';
import { endWith, joinStreams } from '../grpc-streams.ts';
import type { AccessLog } from './access-log.ts';
import { admit } from './admission.ts';
import type { Gate } from './auth.ts';
import type { Backend } from './backend.ts';
import type { GrpcRoute } from './config.ts';
import { DialError } from './dial.ts';
import { routeGrpc, splitAuthority } from './director.ts';
import { FullError, type GrpcLine } from './grpc-line.ts';
import { towardsClient, trailersTowardsClient, valuesOf } from './headers.ts';
import { errorHeaders, GRPC_STATUS, Refusal, unauthorized } from './refusal.ts';
import type { WireState } from './state.ts';
import type { Visit } from './visit.ts';

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

  async handle(stream: ServerHttp2Stream, visit: Visit, log: AccessLog): Promise<void> {
    const { url: path, authority, head, rawHeaders, peer } = visit;
    try {
      if (!(await this.gate.admits(head.proxyAuthorization))) throw unauthorized();
      const split = splitAuthority(authority);
      if (!/^\/[^/]+\/[^/]+$/.test(path) || split === undefined)
        throw refused('INVALID_ARGUMENT', 'not a gRPC method, or an authority that is no host and port');
      const state = this.state();
      const target = { method: path.slice(1), host: split.host, port: split.port ?? 0, metadata: valuesOf(rawHeaders) };
      const backend = await admit(state, routeGrpc(state.routes, target), split, visit);
      log.began(visit);
      const release = () => backend.shares.release(peer.name);
      if (stream.closed) release();
      else stream.once('close', release);
      const own = { ':method': 'POST', ':path': path, ':authority': authority, 'x-forwarded-host': authority };
      await send(stream, Object.assign(valuesOf(head.headers), own, { te: 'trailers' }), backend, visit);
    } catch (error) {
      if (!(error instanceof Refusal)) throw error;
      visit.refusal = error;
      endWith(stream, GRPC_STATUS[error.grpc], error.message, errorHeaders(error));
    }
  }
}

async function send(
  stream: ServerHttp2Stream,
  headers: OutgoingHttpHeaders,
  backend: Backend<GrpcLine>,
  visit: Visit,
): Promise<void> {
  const tried: GrpcLine[] = [];
  let isFull = false;
  // A client that went away meanwhile wants nothing any more.
  while (!stream.closed && !stream.destroyed) {
    const line = backend.next(tried);
    if (line === undefined) {
      if (isFull) throw refused('RESOURCE_EXHAUSTED', 'the backend takes no more calls', backend.name);
      throw new Refusal(
        502,
        'no-connection-to-all-resolved-addresses',
        'UNAVAILABLE',
        'the backend cannot be reached',
        backend.name,
      );
    }
    tried.push(line);
    try {
      const upstream = await line.request(headers);
      backend.connected(line);
      visit.address = line.address;
      joinStreams(stream, upstream, towardsClient, trailersTowardsClient);
      return;
    } catch (error) {
      if (error instanceof FullError) isFull = true;
      else if (error instanceof DialError) backend.setAside(line);
      else throw refused('INVALID_ARGUMENT', 'this cannot be sent to a backend');
    }
  }
}

function refused(grpc: keyof typeof GRPC_STATUS, message: string, backendName?: string): Refusal {
  return new Refusal(502, 'transport-unknown-error', grpc, message, backendName);
}
