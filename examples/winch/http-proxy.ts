import { randomUUID } from 'node:crypto';
import type http from 'node:http';
import net from 'node:net';
import type { Duplex } from 'node:stream';
import { pipeline, type Readable } from 'node:stream';
import { type Dialer, isKedgeError } from 'kedge-dialer';
import { endToEnd } from '../headers.ts';

export interface HttpProxyOptions {
  readonly dialer: Dialer;
  /** Asks kedges for more in their logs, and says more in ours. */
  readonly debug: boolean;
  /** Origins whose pages may read what is proxied; none by default. */
  readonly corsOrigins: ReadonlySet<string>;
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
/** What may be asked of what is behind a kedge: all but CONNECT (RFC 9110 §15.5.6). */
const BUT_CONNECT = 'GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS, TRACE';
const CLIENT_ERRORS = new Set(['ERR_KEDGE_TARGET', 'ERR_KEDGE_REQUEST']);

/** A forward proxy (RFC 9110 §3.7): what is mapped goes through a kedge, all else where it would have gone. */
export class HttpProxy {
  private readonly options: HttpProxyOptions;

  constructor(options: HttpProxyOptions) {
    this.options = options;
  }

  /** A request line with an absolute URL. */
  async handle(request: http.IncomingMessage, response: http.ServerResponse): Promise<void> {
    const { dialer, log, debug, count } = this.options;
    response.once('close', () => count(response.statusCode));
    const cors = this.cors(request);
    if (
      cors !== undefined &&
      request.method === 'OPTIONS' &&
      request.headers['access-control-request-method'] !== undefined
    ) {
      response.writeHead(204, cors).end();
      return;
    }
    const target = targetOf(request.url!);
    if (target === undefined) {
      refuse(response, 400, 'no-route', 'the request line holds no http: URL');
      return;
    }
    const abort = new AbortController();
    response.once('close', () => abort.abort());
    try {
      const answer = (await dialer.dispatcher.request({
        ...target,
        method: request.method as never,
        headers: this.headers(request),
        body: hasBody(request) ? request : null,
        signal: abort.signal,
        onInfo: ({ statusCode, headers }: { statusCode: number; headers: http.IncomingHttpHeaders }) => {
          if (statusCode === 103) response.writeEarlyHints(headers as Record<string, string>);
        },
      } as never)) as {
        statusCode: number;
        headers: http.IncomingHttpHeaders;
        body: Readable;
        trailers: http.IncomingHttpHeaders;
      };
      if (debug) log(`${request.method} ${target.origin} -> ${answer.statusCode}`);
      const head = endToEnd(answer.headers, (name) => !name.startsWith('x-winch-'));
      response.writeHead(answer.statusCode, { ...head, ...cors });
      const withTrailers = async function* (body: AsyncIterable<Buffer>) {
        yield* body;
        response.addTrailers(endToEnd(answer.trailers, () => true));
      };
      // An answer that breaks off must not look whole.
      pipeline(answer.body, withTrailers, response, (error) => error && request.socket.destroy());
    } catch (error) {
      if (abort.signal.aborted) return;
      const code = isKedgeError(error) ? error.code : '';
      log(isKedgeError(error) ? error.message : String(error));
      const status = CLIENT_ERRORS.has(code) ? 400 : 502;
      refuse(response, status, ERROR_TYPES[code] ?? 'transport-unknown-error', messageOf(error), cors);
    }
  }

  /** WebSocket and other upgrades, given to us as a proxy. */
  async upgrade(request: http.IncomingMessage, socket: Duplex, head: Buffer): Promise<void> {
    const target = targetOf(request.url!);
    socket.on('error', () => {});
    if (target === undefined) {
      socket.end('HTTP/1.1 400 Bad Request\r\nconnection: close\r\n\r\n');
      return;
    }
    try {
      const { headers, socket: upstream } = (await this.options.dialer.dispatcher.upgrade({
        ...target,
        method: request.method,
        protocol: request.headers.upgrade ?? 'websocket',
        headers: this.headers(request),
      } as never)) as { headers: http.IncomingHttpHeaders; socket: Duplex };
      const lines = Object.entries(headers).flatMap(([name, value]) =>
        [value ?? []].flat().map((each) => `${name}: ${each}`),
      );
      socket.write(`HTTP/1.1 101 Switching Protocols\r\n${lines.join('\r\n')}\r\n\r\n`);
      upstream.write(head);
      pipeline(socket, upstream, () => {});
      pipeline(upstream, socket, () => {});
    } catch (error) {
      socket.end(`HTTP/1.1 502 Bad Gateway\r\nx-winch-error: ${messageOf(error)}\r\nconnection: close\r\n\r\n`);
    }
  }

  /** A tunnel, which the original never had: to unmapped hosts only, as nothing could be added inside it. */
  connect(request: http.IncomingMessage, socket: Duplex, head: Buffer): void {
    socket.on('error', () => {});
    const end = (status: string, text: string, allow = '') =>
      socket.end(`HTTP/1.1 ${status}\r\n${allow}content-type: text/plain\r\nconnection: close\r\n\r\n${text}\n`);
    let outcome: string;
    let authority: string;
    try {
      ({ outcome, target: authority } = this.options.dialer.explain(`https://${request.url}`));
    } catch (error) {
      end('400 Bad Request', messageOf(error));
      return;
    }
    if (outcome !== 'direct') {
      end(
        '405 Method Not Allowed',
        `winch: ${authority} is behind a kedge: ask for it with http:, and the kedge is spoken to with TLS`,
        `allow: ${BUT_CONNECT}\r\n`,
      );
      return;
    }
    const { hostname, port } = new URL(`https://${authority}`);
    const upstream = net.connect({ host: hostname.replace(/^\[|\]$/g, ''), port: Number(port || 443) }, () => {
      socket.write('HTTP/1.1 200 Connection Established\r\n\r\n');
      upstream.write(head);
      pipeline(socket, upstream, () => {});
      pipeline(upstream, socket, () => {});
    });
    upstream.on('error', () => end('502 Bad Gateway', `winch: ${authority} cannot be reached`));
  }

  private headers(request: http.IncomingMessage): http.OutgoingHttpHeaders {
    const own = endToEnd(request.headers, (name) => !FOR_WINCH.has(name));
    own['x-kedge-request-id'] ??= `winch-${randomUUID()}`;
    if (this.options.debug) own['x-kedge-info-logs'] = 'true';
    return own;
  }

  private cors(request: http.IncomingMessage): http.OutgoingHttpHeaders | undefined {
    const { origin } = request.headers;
    if (origin === undefined || !this.options.corsOrigins.has(origin)) return undefined;
    return {
      'access-control-allow-origin': origin,
      'access-control-allow-credentials': 'true',
      'access-control-allow-methods': request.headers['access-control-request-method'] ?? 'GET',
      'access-control-allow-headers': request.headers['access-control-request-headers'] ?? '',
      vary: 'Origin',
    };
  }
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
