import type { IncomingHttpHeaders } from 'node:http';
import type { Duplex, Readable } from 'node:stream';
import type { Dispatcher } from 'undici';
import type { Backend } from './backend.ts';
import type { Exchange } from './exchange.ts';
import { towardsClient } from './headers.ts';
import type { HttpLine } from './http-line.ts';
import type { Join } from './http-proxy.ts';
import { type ErrorType, Refusal } from './refusal.ts';

/** Errors of undici that are about the request, which therefore was not sent. */
const REQUEST_ERRORS = new Set(['UND_ERR_INVALID_ARG', 'UND_ERR_NOT_SUPPORTED', 'UND_ERR_REQ_CONTENT_LENGTH_MISMATCH']);

/** One request on its way: to an address of the backend, or to the next one when that cannot be dialled, and the answer back. */
export class Forward implements Dispatcher.DispatchHandler {
  private readonly exchange: Exchange;
  private readonly backend: Backend<HttpLine>;
  private readonly options: Dispatcher.DispatchOptions;
  private readonly join: Join | undefined;
  private readonly tried: HttpLine[] = [];
  private controller: Dispatcher.DispatchController | undefined;
  /** Bytes of the answer that are still to come; NaN: nobody said. */
  private left = Number.NaN;
  private isOver = false;

  /** `join` is given the backend's connection when it agrees to an upgrade. */
  constructor(exchange: Exchange, backend: Backend<HttpLine>, path: string, join?: Join) {
    this.exchange = exchange;
    this.backend = backend;
    this.join = join;
    const { method, authority, head } = exchange.visit;
    head.headers.push('x-forwarded-host', authority, 'host', authority);
    this.options = {
      path,
      method,
      headers: head.headers,
      body: exchange.body() ?? null,
      upgrade: join === undefined ? null : 'websocket',
    };
  }

  start(): void {
    this.exchange.onGone = () => {
      if (this.controller !== undefined) this.controller.abort(new Error('the client went away'));
    };
    if (this.exchange.isGone) this.over();
    else this.tryNext();
  }

  onRequestStart(controller: Dispatcher.DispatchController): void {
    this.controller = controller;
    const line = this.tried.at(-1)!;
    this.backend.connected(line);
    this.exchange.visit.address = line.address;
    if (this.exchange.isGone) controller.abort(new Error('the client went away'));
  }

  onResponseStart(_controller: Dispatcher.DispatchController, status: number, received: IncomingHttpHeaders): void {
    const { exchange } = this;
    if (status < 200) {
      if (status < 102) throw new Error(`status ${status} was not asked for`);
      if (status === 103) this.hint(received);
      return;
    }
    if (status > 599) throw new Error(`there is no status ${status}`);
    const headers = towardsClient(received);
    headers['x-kedge-backend-name'] = this.backend.name;
    const isEmpty = exchange.visit.method === 'HEAD' || status === 204 || status === 304;
    const length = received['content-length'];
    if (!isEmpty && length !== undefined) this.left = Number(length);
    exchange.respond(status, headers, isEmpty || this.left === 0 ? 'none' : length === undefined ? 'open' : 'length');
  }

  onResponseData(controller: Dispatcher.DispatchController, chunk: Buffer): void {
    const { exchange } = this;
    this.left -= chunk.length;
    if (this.left === 0) {
      // Its last byte is its end: a length leaves no room for trailers (RFC 9112 §7.1.2).
      exchange.end(chunk);
      return;
    }
    if (!exchange.write(chunk, () => controller.resume())) controller.pause();
  }

  onResponseEnd(_controller: Dispatcher.DispatchController, trailers: IncomingHttpHeaders): void {
    if (Number.isNaN(this.left)) this.exchange.end(undefined, trailers);
    else if (!this.exchange.isEnded) this.exchange.end(undefined);
    this.over();
  }

  onRequestUpgrade(
    _controller: Dispatcher.DispatchController,
    _status: number,
    headers: IncomingHttpHeaders,
    socket: Duplex,
  ): void {
    socket.once('close', () => this.over());
    if (headers.upgrade?.toLowerCase() === 'websocket') {
      this.exchange.upgraded();
      this.join!(socket, headers);
    } else {
      socket.destroy();
      this.refuse(502, 'the backend gave no valid answer');
    }
  }

  onResponseError(_controller: Dispatcher.DispatchController, error: Error): void {
    const { exchange, backend } = this;
    const { code } = error as NodeJS.ErrnoException;
    if (this.controller === undefined && !REQUEST_ERRORS.has(code ?? '')) {
      // Nothing was sent.
      backend.setAside(this.tried.at(-1)!);
      if (exchange.isGone) this.over();
      else this.tryNext();
      return;
    }
    if (exchange.status !== undefined) {
      if (!exchange.isEnded) exchange.abort();
    } else if (REQUEST_ERRORS.has(code ?? '')) this.refuse(400, 'this cannot be sent to a backend');
    else if (code === 'UND_ERR_HEADERS_TIMEOUT') this.refuse(504, 'the backend did not answer in time');
    else this.refuse(502, 'the backend gave no valid answer');
    this.over();
  }

  private refuse(status: number, message: string, type: ErrorType = 'transport-unknown-error'): void {
    this.exchange.refuse(new Refusal(status, type, 'UNAVAILABLE', message, this.backend.name));
  }

  private tryNext(): void {
    const line = this.backend.next(this.tried);
    if (line === undefined) {
      this.refuse(502, 'the backend cannot be reached', 'no-connection-to-all-resolved-addresses');
      this.over();
      return;
    }
    this.tried.push(line);
    line.dispatch(this.options, this);
  }

  private hint(received: IncomingHttpHeaders): void {
    try {
      this.exchange.hint(towardsClient(received));
    } catch {
      // A hint that cannot be passed on is none (RFC 8297 §2): the answer is still to come.
    }
  }

  private over(): void {
    if (this.isOver) return;
    this.isOver = true;
    (this.options.body as Readable | null)?.destroy();
    this.backend.shares.release(this.exchange.visit.peer.name);
  }
}
