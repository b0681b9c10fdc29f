import { randomUUID } from 'node:crypto';
import http from 'node:http';
import net from 'node:net';
import { type Duplex, pipeline } from 'node:stream';
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

/** What winch answers itself; `type` is for `X-Winch-Error-Type`. */
class Refusal extends Error {
  readonly status: number;
  readonly type: string;

  constructor(status: number, type: string, message: string) {
    super(message);
    this.status = status;
    this.type = type;
  }
}

/** Statuses, and error types of the original. */
const REFUSALS: Readonly<Record<string, [status: number, type: string]>> = {
  ERR_KEDGE_REQUEST: [400, 'transport-unknown-error'],
  ERR_KEDGE_TARGET: [400, 'no-route'],
  ERR_KEDGE_UNMAPPED: [502, 'no-route'],
  ERR_KEDGE_ROUTE: [502, 'no-route'],
  ERR_KEDGE_UNAUTHORIZED: [502, 'unauthorized'],
  ERR_KEDGE_TOKEN: [502, 'unauthorized'],
  ERR_KEDGE_TOKEN_UNAVAILABLE: [502, 'unauthorized'],
};
/** Whoever talks to a proxy names it, not the next one; the dialer writes `Host` anew, and Node has said 100 Continue. */
const FOR_WINCH = new Set(['expect', 'host', 'proxy-authorization']);
const FORGED = 'a page elsewhere may change nothing behind a kedge: --cors_allowed_origin names those that may';
/** What may be asked of what is behind a kedge: all but CONNECT (RFC 9110 §15.5.6). */
const BUT_CONNECT = 'allow: GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS, TRACE';
const BEHIND = 'is behind a kedge: ask for it with http:, and the kedge is spoken to with TLS';

/** A forward proxy (RFC 9110 §3.7): what is mapped goes through a kedge, all else where it would have gone. */
export function httpProxy({ dialer, debug, cors, log, count }: HttpProxyOptions) {
  const maps = (origin: string): boolean => {
    try {
      return dialer.explain(origin).outcome === 'kedge';
    } catch {
      return false;
    }
  };

  const targetOf = (request: http.IncomingMessage): { origin: string; path: string } => {
    const [, origin, path = ''] = /^(http:\/\/[^/?#]+)([/?].*)?$/i.exec(request.url!) ?? [];
    if (origin === undefined) throw new Refusal(400, 'no-route', 'the request line holds no http: URL');
    // Our tokens would be added to what it wants: pages behind kedges may, and those of `cors`.
    if (cors.isForeign(request, (page) => !maps(origin) || maps(page))) throw new Refusal(403, 'unauthorized', FORGED);
    return { origin, path: path.startsWith('/') ? path : `/${path}` };
  };

  const headersOf = (request: http.IncomingMessage): http.OutgoingHttpHeaders => {
    const own = endToEnd(request.headers, (name) => !FOR_WINCH.has(name));
    own['x-kedge-request-id'] ??= `winch-${randomUUID()}`;
    if (debug) own['x-kedge-info-logs'] = 'true';
    return own;
  };

  /** A request line with an absolute URL. */
  const handle = async (request: http.IncomingMessage, response: http.ServerResponse): Promise<void> => {
    response.once('close', () => count(response.statusCode));
    const { isPreflight, headers: more } = cors.answer(request);
    if (isPreflight) {
      response.writeHead(204, more).end();
      return;
    }
    const abort = new AbortController();
    response.once('close', () => abort.abort());
    try {
      const target = targetOf(request);
      const answer = await dialer.dispatcher.request({
        ...target,
        method: request.method as 'GET',
        headers: headersOf(request),
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
      log(refuse(response, error, more));
    }
  };

  /** WebSocket and other upgrades, given to us as a proxy. */
  const upgrade = async (request: http.IncomingMessage, socket: Duplex, head: Buffer): Promise<void> => {
    socket.on('error', () => {});
    try {
      const { headers, socket: upstream } = await dialer.dispatcher.upgrade({
        ...targetOf(request),
        method: request.method as 'GET',
        protocol: request.headers.upgrade ?? 'websocket',
        headers: headersOf(request),
      });
      const lines = Object.entries(headers).flatMap(([name, value]) =>
        [value ?? []].flat().map((each) => `${name}: ${each}\r\n`),
      );
      join(socket, upstream, head, `101 Switching Protocols\r\n${lines.join('')}`);
    } catch (error) {
      end(socket, error);
    }
  };

  /** A tunnel, which the original never had: to unmapped hosts only, as nothing could be added inside it. */
  const connect = (request: http.IncomingMessage, socket: Duplex, head: Buffer): void => {
    socket.on('error', () => {});
    try {
      const { outcome, target } = dialer.explain(`https://${request.url}`);
      if (outcome !== 'direct') throw new Refusal(405, 'no-route', `${target} ${BEHIND}`);
      const { hostname, port } = new URL(`https://${target}`);
      const to = { host: hostname.replace(/^\[|\]$/g, ''), port: Number(port || 443) };
      const upstream = net.connect(to, () => join(socket, upstream, head, '200 Connection Established\r\n'));
      upstream.on('error', () => end(socket, new Error(`${target} cannot be reached`)));
    } catch (error) {
      end(socket, error);
    }
  };
  return { handle, upgrade, connect };
}

/** Gives what it says. */
export function refuse(response: http.ServerResponse, error: unknown, more: http.OutgoingHttpHeaders = {}): string {
  const { status, type, message } = refusalOf(error);
  const headers = { 'content-type': 'text/plain', 'x-winch-error': message, 'x-winch-error-type': type, ...more };
  if (response.headersSent) response.destroy();
  else response.writeHead(status, headers).end(`winch: ${message}\n`);
  return message;
}

function end(socket: Duplex, error: unknown): void {
  const { status, type, message } = refusalOf(error);
  const lines = [`HTTP/1.1 ${status} ${http.STATUS_CODES[status]}`, ...(status === 405 ? [BUT_CONNECT] : [])];
  lines.push(
    'content-type: text/plain',
    `x-winch-error: ${message}`,
    `x-winch-error-type: ${type}`,
    'connection: close',
  );
  socket.end(`${lines.join('\r\n')}\r\n\r\nwinch: ${message}\n`);
}

/** Its message may go into a header. */
function refusalOf(error: unknown): Refusal {
  if (error instanceof Refusal) return error;
  const [status, type] = (isKedgeError(error) && REFUSALS[error.code]) || [502, 'transport-unknown-error'];
  return new Refusal(status, type, String((error as Error).message).replace(/[^\x20-\x7e]/g, ' '));
}

/** Both ways, from here on. */
function join(socket: Duplex, upstream: Duplex, head: Buffer, answer: string): void {
  socket.write(`HTTP/1.1 ${answer}\r\n`);
  upstream.write(head);
  pipeline(socket, upstream, () => {});
  pipeline(upstream, socket, () => {});
}

function hasBody({ headers }: http.IncomingMessage): boolean {
  return headers['transfer-encoding'] !== undefined || Number(headers['content-length'] ?? 0) > 0;
}
