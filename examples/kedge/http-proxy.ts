import http, { type IncomingHttpHeaders, type OutgoingHttpHeaders } from 'node:http';
import type { Duplex, Readable, Writable } from 'node:stream';
import { pipeline } from 'node:stream';
import type { Backend, Config } from './config.ts';
import { type HttpTarget, routeHttp, splitAuthority } from './director.ts';
import { type Caller, towardsBackend, towardsClient } from './headers.ts';

/** One request, over HTTP/1.1 or HTTP/2. */
export interface Exchange {
  readonly method: string;
  /** `Host` or `:authority`. */
  readonly authority: string;
  /** The request target: a path, or an absolute URL from a client that takes us for a forward proxy. */
  readonly url: string;
  readonly headers: IncomingHttpHeaders;
  readonly body: Readable;
  readonly caller: Caller;
  /** Where the answer goes; it closes early when the client goes away. */
  readonly sink: Writable;
  /** Sends the head of the answer; the body goes where it returns, `trailers()` is asked at its end. */
  respond(status: number, headers: OutgoingHttpHeaders, trailers?: () => IncomingHttpHeaders): Writable;
  /** Cuts the answer short, so that nobody takes it for whole. */
  abort(): void;
}

/** The original's error types, for `X-Kedge-Error-Type`. */
export type ErrorType =
  | 'unauthorized'
  | 'no-route'
  | 'no-backend'
  | 'backend-transport-closed'
  | 'no-connection-to-all-resolved-addresses';

/** Proxies HTTP requests to backends on plain HTTP/1.1. */
export class HttpProxy {
  private readonly config: Config['http'];
  private readonly stripProxyAuth: boolean;
  private readonly agent = new http.Agent({ keepAlive: true, maxSockets: 256 });

  constructor(config: Config['http'], stripProxyAuth: boolean) {
    this.config = config;
    this.stripProxyAuth = stripProxyAuth;
  }

  handle(exchange: Exchange): void {
    const found = this.find(exchange);
    if (found === undefined) {
      if (targetOf(exchange) === undefined) refuse(exchange, 400, 'no-route', 'the authority is not a host and port');
      else refuse(exchange, 502, 'no-route', 'unknown route to service');
      return;
    }
    const { backend, target } = found;
    const { dnsName, port } = backend.host;
    const headers = towardsBackend(exchange.headers, exchange.caller, this.stripProxyAuth);
    headers.host = exchange.authority;
    const request = http.request({
      host: dnsName,
      port,
      agent: this.agent,
      method: exchange.method,
      path: target.path,
      headers,
    });
    let answered = false;
    let complete = false;
    request.on('response', (response) => {
      answered = true;
      const head = { ...towardsClient(response.headers), 'x-kedge-backend-name': backend.name };
      const sink = exchange.respond(response.statusCode!, head, () => response.trailers);
      pipeline(response, sink, (error) => {
        if (error) exchange.abort();
        else complete = true;
      });
    });
    request.on('error', (error: NodeJS.ErrnoException) => {
      if (answered) return;
      answered = true;
      const dialled = error.syscall === 'connect' || error.syscall === 'getaddrinfo';
      const type = dialled ? 'no-connection-to-all-resolved-addresses' : 'backend-transport-closed';
      refuse(exchange, 502, type, dialled ? 'the backend cannot be reached' : 'the backend closed the connection');
    });
    pipeline(exchange.body, request, (error) => {
      // The client went away, or sent a body that breaks off: the backend must not take it for whole.
      if (error) request.destroy();
    });
    exchange.sink.once('close', () => {
      if (!complete) request.destroy();
    });
  }

  private find(exchange: Exchange): { target: HttpTarget; backend: Backend } | undefined {
    const target = targetOf(exchange);
    const name = target === undefined ? undefined : routeHttp(this.config.routes, target);
    const backend = name === undefined ? undefined : this.config.backends.get(name);
    return target === undefined || backend === undefined ? undefined : { target, backend };
  }

  /** WebSocket and other upgrades (RFC 9110 §7.8), which HTTP/1.1 only has: both sides are joined as they are. */
  upgrade(exchange: Exchange, socket: Duplex, head: Buffer): void {
    const found = this.find(exchange);
    if (found === undefined) {
      socket.end(
        'HTTP/1.1 502 Bad Gateway\r\nx-kedge-error: unknown route to service\r\nx-kedge-error-type: no-route\r\nconnection: close\r\n\r\n',
      );
      return;
    }
    const { backend, target } = found;
    const headers = towardsBackend(exchange.headers, exchange.caller, this.stripProxyAuth);
    Object.assign(headers, { host: exchange.authority, connection: 'upgrade', upgrade: exchange.headers.upgrade });
    const { dnsName, port } = backend.host;
    const request = http.request({ host: dnsName, port, method: exchange.method, path: target.path, headers });
    const answer = (response: http.IncomingMessage) => {
      const lines = [`HTTP/1.1 ${response.statusCode} ${response.statusMessage}`];
      for (let i = 0; i < response.rawHeaders.length; i += 2)
        lines.push(`${response.rawHeaders[i]}: ${response.rawHeaders[i + 1]}`);
      return `${lines.join('\r\n')}\r\n\r\n`;
    };
    request.on('upgrade', (response, upstream, first) => {
      socket.write(answer(response));
      socket.write(first);
      upstream.write(head);
      // An end of either side is the end of both, and errors are theirs.
      pipeline(socket, upstream, () => {});
      pipeline(upstream, socket, () => {});
    });
    request.on('response', (response) => {
      socket.write(answer(response));
      response.pipe(socket);
    });
    request.on('error', () => socket.end('HTTP/1.1 502 Bad Gateway\r\nconnection: close\r\n\r\n'));
    socket.on('error', () => request.destroy());
    request.end();
  }

  close(): void {
    this.agent.destroy();
  }
}

/** An answer of the kedge's own. The text is ours, so it tells nothing of backends. */
export function refuse(exchange: Exchange, status: number, type: ErrorType, message: string): void {
  if (exchange.sink.destroyed) return;
  exchange.body.resume();
  const headers = { 'content-type': 'text/plain', 'x-kedge-error': message, 'x-kedge-error-type': type };
  exchange.respond(status, headers).end(`kedge: ${message}\n`);
}

function targetOf({ url, authority, headers }: Exchange): HttpTarget | undefined {
  const absolute = /^(https?):\/\/([^/?#]*)(.*)$/i.exec(url);
  const split = splitAuthority(authority);
  if (split === undefined) return undefined;
  // An absolute URL and `Host` that disagree could be routed by one and served by the other (RFC 9112 §3.2.2).
  if (absolute !== null && absolute[2]!.toLowerCase() !== authority.toLowerCase()) return undefined;
  const path: string = absolute === null ? url : absolute[3]!.startsWith('/') ? absolute[3]! : `/${absolute[3]!}`;
  if (!path.startsWith('/') && path !== '*') return undefined;
  const defaultPort = absolute?.[1]?.toLowerCase() === 'https' ? 443 : 80;
  return {
    host: split.host,
    port: split.port ?? defaultPort,
    path,
    headers,
    mode: absolute === null ? ('REVERSE_PROXY' as const) : ('FORWARD_PROXY' as const),
  };
}
