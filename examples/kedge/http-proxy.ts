import http, { type IncomingHttpHeaders, type OutgoingHttpHeaders } from 'node:http';
import http2 from 'node:http2';
import type { Socket } from 'node:net';
import type { Duplex, Readable, Writable } from 'node:stream';
import { pipeline } from 'node:stream';
import { AdhocError, resolveAdhoc } from './adhoc.ts';
import type { Backend, Line } from './backend.ts';
import type { HttpRoute } from './config.ts';
import { type HttpTarget, routeHttp, splitAuthority } from './director.ts';
import { type Caller, isAllowed, isSaidByKedge, towardsBackend, towardsClient } from './headers.ts';
import { lookUp, type WireState } from './state.ts';

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
  /** 103 Early Hints, where the client's protocol has them. */
  hint?(headers: OutgoingHttpHeaders): void;
  isAnswered(): boolean;
  /** Cuts the answer short, so that nobody takes it for whole. */
  abort(): void;
}

/** The original's error types, for `X-Kedge-Error-Type`. */
export type ErrorType =
  | 'unauthorized'
  | 'no-route'
  | 'no-backend'
  | 'backend-transport-closed'
  | 'no-resolution-available'
  | 'no-connection-to-all-resolved-addresses';

interface Found {
  readonly target: HttpTarget;
  readonly backend: Backend;
}

/** Proxies HTTP requests to backends: HTTP/1.1 where they are plain, HTTP/2 where their TLS offers it. */
export class HttpProxy {
  private readonly state: () => WireState<HttpRoute>;
  private readonly stripProxyAuth: boolean;
  /** Answered to the end; whatever else closes was cut off. */
  private readonly complete = new WeakSet<Exchange>();

  constructor(state: () => WireState<HttpRoute>, stripProxyAuth: boolean) {
    this.state = state;
    this.stripProxyAuth = stripProxyAuth;
  }

  async handle(exchange: Exchange): Promise<void> {
    const found = await this.find(exchange);
    if (found === undefined) return;
    const headers = towardsBackend(exchange.headers, exchange.caller, this.stripProxyAuth);
    headers.host = exchange.authority;
    try {
      await found.backend.dial('http', (line) => this.send(exchange, found, headers, line));
    } catch {
      refuse(exchange, 502, 'no-connection-to-all-resolved-addresses', 'the backend cannot be reached');
    }
  }

  /** WebSocket and other upgrades (RFC 9110 §7.8), which HTTP/1.1 only has: both sides are joined as they are. */
  async upgrade(exchange: Exchange, socket: Duplex, head: Buffer): Promise<void> {
    const refused = (status: number, type: string, message: string) =>
      socket.end(
        `HTTP/1.1 ${status} ${http.STATUS_CODES[status]}\r\nx-kedge-error: ${message}\r\nx-kedge-error-type: ${type}\r\nconnection: close\r\n\r\n`,
      );
    const found = await this.find(exchange, refused);
    if (found === undefined) return;
    const headers = towardsBackend(exchange.headers, exchange.caller, this.stripProxyAuth);
    Object.assign(headers, { host: exchange.authority, connection: 'upgrade', upgrade: exchange.headers.upgrade });
    const { path } = found.target;
    const use = async (line: Line) => {
      if (line.is === 'h2') return false;
      const request = http.request({ ...line.options, method: exchange.method, path, headers });
      request.on('upgrade', (response, upstream, first) => {
        socket.write(answerOf(response));
        socket.write(first);
        upstream.write(head);
        // An end of either side is the end of both, and errors are theirs.
        pipeline(socket, upstream, () => {});
        pipeline(upstream, socket, () => {});
      });
      request.on('response', (response) => {
        socket.write(answerOf(response));
        response.pipe(socket);
      });
      const isConnected = await connected(request);
      request.on('error', () => socket.end('HTTP/1.1 502 Bad Gateway\r\nconnection: close\r\n\r\n'));
      socket.on('error', () => request.destroy());
      if (isConnected) request.end();
      return isConnected;
    };
    await found.backend.dial('http', use).catch(() => {
      refused(502, 'no-connection-to-all-resolved-addresses', 'the backend cannot be reached');
    });
  }

  /** Whether the address could be dialled; what comes after that is answered here. */
  private async send(exchange: Exchange, found: Found, headers: OutgoingHttpHeaders, line: Line): Promise<boolean> {
    const { path } = found.target;
    if (line.is === 'h2') {
      if (line.session.closed || line.session.destroyed) return false;
      const { host, ...rest } = headers;
      const pseudo = {
        ':method': exchange.method,
        ':path': path,
        ':authority': exchange.authority,
        ':scheme': 'https',
      };
      const stream = line.session.request({ ...rest, ...pseudo });
      let trailers: IncomingHttpHeaders = {};
      stream.on('trailers', (received) => {
        trailers = received;
      });
      stream.on('response', (head) => this.answer(exchange, found, head[':status']!, head, stream, () => trailers));
      this.pump(exchange, stream, () => stream.close(http2.constants.NGHTTP2_CANCEL));
      return true;
    }
    const request = http.request({ ...line.options, method: exchange.method, path, headers });
    request.on('response', (response) => {
      // A length leaves no room for trailers (RFC 9112 §7.1.2), and an answer that waits for none ends with its last byte.
      const trailers = response.headers['content-length'] === undefined ? () => response.trailers : undefined;
      this.answer(exchange, found, response.statusCode!, response.headers, response, trailers);
    });
    request.on('information', ({ statusCode, headers: hints }) => {
      if (statusCode === 103) exchange.hint?.(towardsClient(hints as IncomingHttpHeaders));
    });
    if (!(await connected(request))) return false;
    this.pump(exchange, request, () => request.destroy());
    return true;
  }

  private pump(exchange: Exchange, request: Writable, cancel: () => void): void {
    // Whoever went away while the backend was dialled closes nothing any more.
    if (exchange.sink.destroyed) {
      request.on('error', () => {});
      cancel();
      return;
    }
    request.on('error', () => {
      if (!exchange.isAnswered())
        refuse(exchange, 502, 'backend-transport-closed', 'the backend closed the connection');
    });
    pipeline(exchange.body, request, (error) => {
      // The client went away, or sent a body that breaks off: the backend must not take it for whole.
      if (error) cancel();
    });
    exchange.sink.once('close', () => {
      if (!this.complete.has(exchange)) cancel();
    });
  }

  private answer(
    exchange: Exchange,
    { backend }: Found,
    status: number,
    received: IncomingHttpHeaders,
    body: Readable,
    trailers: (() => IncomingHttpHeaders) | undefined,
  ): void {
    if (exchange.isAnswered()) {
      body.resume();
      return;
    }
    const head = { ...towardsClient(received), 'x-kedge-backend-name': backend.name };
    pipeline(body, exchange.respond(status, head, trailers), (error) => {
      if (error) exchange.abort();
      else this.complete.add(exchange);
    });
  }

  /** The backend of the request, or of an adhoc rule; whatever stands in the way is answered. */
  private async find(
    exchange: Exchange,
    refused = (status: number, type: ErrorType, message: string) => refuse(exchange, status, type, message),
  ): Promise<Found | undefined> {
    const target = targetOf(exchange);
    if (target === undefined) {
      refused(400, 'no-route', 'the authority is not a host and port');
      return undefined;
    }
    const { routes, adhocRules, backends, adhoc } = this.state();
    const route = routeHttp(routes, target);
    if (route !== undefined) {
      if (isAllowed(route.allowedClients, exchange.caller))
        return { target, backend: backends.get(route.backendName)! };
      refused(403, 'unauthorized', 'this client is not allowed');
      return undefined;
    }
    try {
      const address = await resolveAdhoc(adhocRules, target.host, target.namedPort, lookUp);
      if (address !== undefined) return { target, backend: adhoc(address) };
      refused(502, 'no-route', 'unknown route to service');
    } catch (error) {
      if (!(error instanceof AdhocError)) throw error;
      refused(error.http, error.http === 502 ? 'no-resolution-available' : 'no-route', error.message);
    }
    return undefined;
  }
}

/** Whether a request's socket connects; until then nothing of it has been sent. */
function connected(request: http.ClientRequest): Promise<boolean> {
  return new Promise((resolve) => {
    request.once('error', () => resolve(false));
    request.once('socket', (socket: Socket) => {
      if (!socket.connecting) resolve(true);
      // A TLS socket is there when TLS is.
      else socket.once('encrypted' in socket ? 'secureConnect' : 'connect', () => resolve(true));
    });
  });
}

function answerOf(response: http.IncomingMessage): string {
  const lines = [`HTTP/1.1 ${response.statusCode} ${response.statusMessage}`];
  const { rawHeaders } = response;
  for (let i = 0; i < rawHeaders.length; i += 2) {
    if (!isSaidByKedge(rawHeaders[i]!)) lines.push(`${rawHeaders[i]}: ${rawHeaders[i + 1]}`);
  }
  return `${lines.join('\r\n')}\r\n\r\n`;
}

/** An answer of the kedge's own. The text is ours, so it tells nothing of backends. */
export function refuse(exchange: Exchange, status: number, type: ErrorType, message: string): void {
  if (exchange.sink.destroyed || exchange.isAnswered()) return;
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
    namedPort: split.port,
    path,
    headers,
    mode: absolute === null ? ('REVERSE_PROXY' as const) : ('FORWARD_PROXY' as const),
  };
}
