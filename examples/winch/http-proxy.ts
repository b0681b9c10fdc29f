import { randomUUID } from 'node:crypto';
import type http from 'node:http';
import net from 'node:net';
import type { Duplex } from 'node:stream';
import { pipeline } from 'node:stream';
import { type Dialer, isKedgeError } from 'kedge-dialer';
import { endToEnd } from '../headers.ts';
import { type Cors, joined } from './cors.ts';

export interface HttpProxyOptions {
  readonly dialer: Dialer;
  /** Asks kedges for more in their logs, and says more in ours. */
  readonly debug: boolean;
  readonly cors: Cors;
  log(message: string): void;
  count(status: number): void;
}

/** Error types of the original, for `X-Winch-Error-Type`. */
const ERROR_TYPES: Readonly<Record<string, string>> = {
  ERR_KEDGE_UNAUTHORIZED: 'unauthorized',
  ERR_KEDGE_TOKEN: 'unauthorized',
  ERR_KEDGE_TOKEN_UNAVAILABLE: 'unauthorized',
  ERR_KEDGE_TARGET: 'no-route',
  ERR_KEDGE_UNMAPPED: 'no-route',
  ERR_KEDGE_ROUTE: 'no-route',
};
/** Whoever talks to a proxy names it, not the next one; the dialer writes `Host` anew, and Node has said 100 Continue. */
const FOR_WINCH = new Set(['expect', 'host', 'proxy-authorization']);
const FORGED = 'a page elsewhere may change nothing behind a kedge: --cors_allowed_origin names those that may';
const CLIENT_ERRORS = new Set(['ERR_KEDGE_TARGET', 'ERR_KEDGE_REQUEST']);

/** A forward proxy (RFC 9110 §3.7): what is mapped goes through a kedge, all else where it would have gone. */
export class HttpProxy {
  private readonly options: HttpProxyOptions;

  constructor(options: HttpProxyOptions) {
    this.options = options;
  }

  /** A request line with an absolute URL. */
  async handle(request: http.IncomingMessage, response: http.ServerResponse): Promise<void> {
    const { dialer, log, debug, count, cors } = this.options;
    response.once('close', () => count(response.statusCode));
    const { isPreflight, headers: more } = cors.answer(request);
    if (isPreflight) {
      response.writeHead(204, more).end();
      return;
    }
    const target = targetOf(request.url!);
    if (target === undefined) {
      refuse(response, 400, 'no-route', 'the request line holds no http: URL');
      return;
    }
    if (this.isForged(request, target.origin)) {
      refuse(response, 403, 'unauthorized', FORGED, more);
      return;
    }
    const abort = new AbortController();
    response.once('close', () => abort.abort());
    try {
      const answer = await dialer.dispatcher.request({
        ...target,
        method: request.method as 'GET',
        headers: this.headers(request),
        body: hasBody(request) ? request : null,
        signal: abort.signal,
        onInfo: ({ statusCode, headers }) => {
          if (statusCode === 103) response.writeEarlyHints(headers as Record<string, string>);
        },
      });
      if (debug) log(`${request.method} ${target.origin} -> ${answer.statusCode}`);
      const head = endToEnd(answer.headers, (name) => !name.startsWith('x-winch-'));
      response.writeHead(answer.statusCode, joined(head, more));
      const withTrailers = async function* (body: AsyncIterable<Buffer>) {
        yield* body;
        response.addTrailers(endToEnd(answer.trailers, () => true));
      };
      // An answer that breaks off must not look whole.
      pipeline(answer.body, withTrailers, response, (error) => error && request.socket.destroy());
    } catch (error) {
      if (abort.signal.aborted) return;
      const code = isKedgeError(error) ? error.code : '';
      log(messageOf(error));
      const status = CLIENT_ERRORS.has(code) ? 400 : 502;
      refuse(response, status, ERROR_TYPES[code] ?? 'transport-unknown-error', messageOf(error), more);
    }
  }

  /** WebSocket and other upgrades, given to us as a proxy. */
  async upgrade(request: http.IncomingMessage, socket: Duplex, head: Buffer): Promise<void> {
    socket.on('error', () => {});
    const target = targetOf(request.url!);
    if (target === undefined) {
      end(socket, '400 Bad Request', 'the request line holds no http: URL');
      return;
    }
    if (this.isForged(request, target.origin)) {
      end(socket, '403 Forbidden', FORGED);
      return;
    }
    try {
      const { headers, socket: upstream } = await this.options.dialer.dispatcher.upgrade({
        ...target,
        method: request.method as 'GET',
        protocol: request.headers.upgrade ?? 'websocket',
        headers: this.headers(request),
      });
      const lines = Object.entries(headers).flatMap(([name, value]) =>
        [value ?? []].flat().map((each) => `${name}: ${each}\r\n`),
      );
      join(socket, upstream, head, `101 Switching Protocols\r\n${lines.join('')}`);
    } catch (error) {
      end(socket, '502 Bad Gateway', messageOf(error));
    }
  }

  /** A tunnel, which the original never had: to unmapped hosts only, as nothing could be added inside it. */
  connect(request: http.IncomingMessage, socket: Duplex, head: Buffer): void {
    socket.on('error', () => {});
    let outcome: string;
    let authority: string;
    try {
      ({ outcome, target: authority } = this.options.dialer.explain(`https://${request.url}`));
    } catch (error) {
      end(socket, '400 Bad Request', messageOf(error));
      return;
    }
    if (outcome !== 'direct') {
      const how = 'ask for it with http:, and the kedge is spoken to with TLS';
      end(socket, '405 Method Not Allowed', `${authority} is behind a kedge: ${how}`);
      return;
    }
    const { hostname, port } = new URL(`https://${authority}`);
    const upstream = net.connect({ host: hostname.replace(/^\[|\]$/g, ''), port: Number(port || 443) }, () =>
      join(socket, upstream, head, '200 Connection Established\r\n'),
    );
    upstream.on('error', () => end(socket, '502 Bad Gateway', `${authority} cannot be reached`));
  }

  /** A page elsewhere would have our tokens added to what it wants: pages behind kedges may, and those of `cors`. */
  private isForged(request: http.IncomingMessage, target: string): boolean {
    return this.options.cors.isForeign(request, (origin) => !this.maps(target) || this.maps(origin));
  }

  private maps(origin: string): boolean {
    try {
      return this.options.dialer.explain(origin).outcome === 'kedge';
    } catch {
      return false;
    }
  }

  private headers(request: http.IncomingMessage): http.OutgoingHttpHeaders {
    const own = endToEnd(request.headers, (name) => !FOR_WINCH.has(name));
    own['x-kedge-request-id'] ??= `winch-${randomUUID()}`;
    if (this.options.debug) own['x-kedge-info-logs'] = 'true';
    return own;
  }
}

/** Both ways, from here on. */
function join(socket: Duplex, upstream: Duplex, head: Buffer, answer: string): void {
  socket.write(`HTTP/1.1 ${answer}\r\n`);
  upstream.write(head);
  pipeline(socket, upstream, () => {});
  pipeline(upstream, socket, () => {});
}

function end(socket: Duplex, status: string, text: string): void {
  const head = `content-type: text/plain\r\nx-winch-error: ${text}\r\nconnection: close`;
  socket.end(`HTTP/1.1 ${status}\r\n${head}\r\n\r\nwinch: ${text}\n`);
}

function targetOf(url: string): { origin: string; path: string } | undefined {
  const [, origin, path] = /^(http:\/\/[^/?#]+)([/?].*)?$/i.exec(url) ?? [];
  if (origin === undefined) return undefined;
  return { origin, path: path === undefined ? '/' : path.startsWith('/') ? path : `/${path}` };
}

function hasBody({ headers }: http.IncomingMessage): boolean {
  return headers['transfer-encoding'] !== undefined || Number(headers['content-length'] ?? 0) > 0;
}

/** What may go into a header. */
function messageOf(error: unknown): string {
  return String(error instanceof Error ? error.message : error).replace(/[^\x20-\x7e]/g, ' ');
}

export function refuse(
  response: http.ServerResponse,
  status: number,
  type: string,
  message: string,
  more: http.OutgoingHttpHeaders = {},
): void {
  if (response.headersSent) {
    response.destroy();
    return;
  }
  const headers = { 'content-type': 'text/plain', 'x-winch-error': message, 'x-winch-error-type': type, ...more };
  response.writeHead(status, headers).end(`winch: ${message}\n`);
}
