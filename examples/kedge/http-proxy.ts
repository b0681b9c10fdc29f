import type { IncomingHttpHeaders } from 'node:http';
import type { Duplex } from 'node:stream';
import { AdhocError, resolveAdhoc } from './adhoc.ts';
import type { Gate } from './auth.ts';
import type { Backend } from './backend.ts';
import type { HttpRoute } from './config.ts';
import { AmbiguousPathError, type HttpTarget, routeHttp, splitAuthority } from './director.ts';
import type { ErrorType, Exchange } from './exchange.ts';
import { Forward } from './forward.ts';
import { towardsClient, valuesOf } from './headers.ts';
import type { HttpLine } from './http-line.ts';
import { isAllowed } from './peer.ts';
import { lookUp, type WireState } from './state.ts';

/** Why a request goes nowhere. */
class Refusal extends Error {
  readonly status: number;
  readonly type: ErrorType;

  constructor(status: number, type: ErrorType, message: string) {
    super(message);
    this.status = status;
    this.type = type;
  }
}

/** Where the backend's connection goes when it agrees to an upgrade. */
export type Join = (socket: Duplex, headers: IncomingHttpHeaders) => void;

/** Proxies HTTP requests to backends. */
export class HttpProxy {
  private readonly state: () => WireState<HttpRoute, HttpLine>;
  private readonly gate: Gate;

  constructor(state: () => WireState<HttpRoute, HttpLine>, gate: Gate) {
    this.state = state;
    this.gate = gate;
  }

  /** Waits for nothing that is there already: most requests are on their way when this returns. */
  handle(exchange: Exchange, join?: Join): void {
    const isAdmitted = this.gate.admits(exchange.head.proxyAuthorization);
    if (isAdmitted === true) this.route(exchange, join);
    else if (isAdmitted === false) exchange.refuse(401, 'unauthorized', 'unauthorized');
    else
      isAdmitted.then(
        (late) => (late ? this.route(exchange, join) : exchange.refuse(401, 'unauthorized', 'unauthorized')),
        () => exchange.abort(),
      );
  }

  private route(exchange: Exchange, join: Join | undefined): void {
    try {
      const target = targetOf(exchange);
      const backend = this.backendOf(target, exchange);
      if (backend instanceof Promise) {
        backend.then(
          (found) => this.send(exchange, found, target.path, join),
          (error) => failed(exchange, error),
        );
      } else this.send(exchange, backend, target.path, join);
    } catch (error) {
      failed(exchange, error);
    }
  }

  private send(exchange: Exchange, backend: Backend<HttpLine>, path: string, join: Join | undefined): void {
    const start = () => new Forward(exchange, backend, path, join).start();
    const waits = backend.ready();
    const isTaken = waits === undefined ? backend.shares.take(exchange.peer.name) : undefined;
    if (isTaken === true) {
      start();
      return;
    }
    const refuse = (status: number, type: ErrorType, text: string) => exchange.refuse(status, type, text, backend.name);
    (async () => {
      try {
        await waits;
      } catch {
        refuse(502, 'no-resolution-available', 'the backend has no address');
        return;
      }
      if (!(await (isTaken ?? backend.shares.take(exchange.peer.name))))
        refuse(503, 'transport-unknown-error', 'this client has too many requests under way');
      else start();
    })().catch(() => exchange.abort());
  }

  /** The backend of the first route that matches, or of an adhoc rule. */
  private backendOf(target: Target, { peer }: Exchange): Backend<HttpLine> | Promise<Backend<HttpLine>> {
    const { routes, adhocRules, backends, adhoc } = this.state();
    const route = routeHttp(routes, target);
    if (route !== undefined) {
      if (isAllowed(route.allowedClients, peer)) return backends.get(route.backendName)!;
      throw new Refusal(403, 'unauthorized', 'this client is not allowed');
    }
    return resolveAdhoc(adhocRules, target.host, target.namedPort, lookUp).then((address) => {
      if (address === undefined) throw new Refusal(502, 'no-route', 'unknown route to service');
      return adhoc(address);
    });
  }
}

function failed(exchange: Exchange, error: unknown): void {
  if (error instanceof Refusal) exchange.refuse(error.status, error.type, error.message);
  else if (error instanceof AdhocError) exchange.refuse(error.http, 'unknown-route-error', error.message);
  else if (error instanceof AmbiguousPathError) exchange.refuse(400, 'no-route', error.message);
  else exchange.abort();
}

/** A client's target, whose headers are read when a route looks at them. */
class Target implements HttpTarget {
  readonly host: string;
  readonly port: number;
  /** Undefined where the request named none. */
  readonly namedPort: number | undefined;
  readonly path: string;
  readonly mode: HttpTarget['mode'];
  private readonly rawHeaders: readonly string[];

  constructor(host: string, namedPort: number | undefined, scheme: string, path: string, raw: readonly string[]) {
    this.host = host;
    this.namedPort = namedPort;
    this.port = namedPort ?? (scheme === 'https' ? 443 : 80);
    this.path = path;
    this.mode = scheme === '' ? 'REVERSE_PROXY' : 'FORWARD_PROXY';
    this.rawHeaders = raw;
  }

  get headers(): Record<string, string[]> {
    return valuesOf(this.rawHeaders);
  }
}

const SLASH = 47;

function targetOf({ url, authority, rawHeaders }: Exchange): Target {
  const split = splitAuthority(authority);
  if (split === undefined) throw new Refusal(400, 'no-route', 'the authority is not a host and port');
  if (url.charCodeAt(0) === SLASH) return new Target(split.host, split.port, '', url, rawHeaders);
  // An absolute URL and `Host` that disagree could be routed by one and served by the other (RFC 9112 §3.2.2).
  const [, scheme, named, rest = ''] = /^(https?):\/\/([^/?#]*)(.*)$/i.exec(url) ?? [];
  if (scheme === undefined || named!.toLowerCase() !== authority.toLowerCase())
    throw new Refusal(400, 'no-route', 'the request target is not a path, or is for another host');
  const path = rest.startsWith('/') ? rest : `/${rest}`;
  return new Target(split.host, split.port, scheme.toLowerCase(), path, rawHeaders);
}

/** Joins the client's connection with the backend's, as they are: an end of either side is the end of both. */
export function joinSockets(client: Duplex, head: Buffer, backend: Duplex, received: IncomingHttpHeaders): void {
  const lines = ['HTTP/1.1 101 Switching Protocols', 'connection: upgrade', 'upgrade: websocket'];
  for (const [name, value] of Object.entries(towardsClient(received)))
    for (const each of [value ?? []].flat()) lines.push(`${name}: ${each}`);
  client.write(`${lines.join('\r\n')}\r\n\r\n`, 'latin1');
  backend.write(head);
  for (const [one, other] of [
    [client, backend],
    [backend, client],
  ] as const) {
    one.on('error', () => other.destroy());
    one.once('close', () => other.destroy());
    one.pipe(other);
  }
}
