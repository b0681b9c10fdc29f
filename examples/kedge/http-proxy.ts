import type { IncomingHttpHeaders } from 'node:http';
import type { Duplex } from 'node:stream';
import { admit, after } from './admission.ts';
import type { Gate } from './auth.ts';
import type { HttpRoute } from './config.ts';
import { type HttpTarget, routeHttp, splitAuthority } from './director.ts';
import type { Exchange } from './exchange.ts';
import { Forward } from './forward.ts';
import { towardsClient, valuesOf } from './headers.ts';
import type { HttpLine } from './http-line.ts';
import { Refusal, unauthorized } from './refusal.ts';
import type { WireState } from './state.ts';
import type { Visit } from './visit.ts';

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

  handle(exchange: Exchange, join?: Join): void {
    const { visit } = exchange;
    const failed = (error: unknown) => (error instanceof Refusal ? exchange.refuse(error) : exchange.abort());
    try {
      const started = after(this.gate.admits(visit.head.proxyAuthorization), (isAdmitted) => {
        if (!isAdmitted) throw unauthorized();
        const target = targetOf(visit);
        const state = this.state();
        const named = { host: target.host, port: target.namedPort };
        return after(admit(state, routeHttp(state.routes, target), named, visit), (backend) =>
          new Forward(exchange, backend, target.path, join).start(),
        );
      });
      if (started instanceof Promise) started.catch(failed);
    } catch (error) {
      failed(error);
    }
  }
}

interface Target extends HttpTarget {
  /** Undefined where the request named none. */
  readonly namedPort: number | undefined;
}

const SLASH = 47;

function targetOf({ url, authority, rawHeaders }: Visit): Target {
  const refused = (text: string) => new Refusal(400, 'no-route', 'INVALID_ARGUMENT', text);
  const split = splitAuthority(authority);
  if (split === undefined) throw refused('the authority is not a host and port');
  let path = url;
  let defaultPort = 80;
  const isForward = url.charCodeAt(0) !== SLASH;
  if (isForward) {
    // An absolute URL and `Host` that disagree could be routed by one and served by the other (RFC 9112 §3.2.2).
    const [, scheme, named, rest = ''] = /^(https?):\/\/([^/?#]*)(.*)$/i.exec(url) ?? [];
    if (scheme === undefined || named!.toLowerCase() !== authority.toLowerCase())
      throw refused('the request target is not a path, or is for another host');
    path = rest.startsWith('/') ? rest : `/${rest}`;
    if (scheme.length === 'https'.length) defaultPort = 443;
  }
  return {
    host: split.host,
    port: split.port ?? defaultPort,
    namedPort: split.port,
    path,
    mode: isForward ? 'FORWARD_PROXY' : 'REVERSE_PROXY',
    get headers() {
      return valuesOf(rawHeaders);
    },
  };
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
