import type { IncomingHttpHeaders } from 'node:http';
import type { Duplex } from 'node:stream';
import type { Dispatcher } from './undici.ts';

type Controller = Dispatcher.DispatchController;
type Handler = Dispatcher.DispatchHandler;
type RawHeaders = NonNullable<Controller['rawHeaders']>;

/** The handler contract of undici 6 and 7, which the built-in fetch of Node 22 and 24 speaks. */
export interface LegacyHandler {
  onConnect?(abort: (reason?: Error) => void, context?: unknown): void;
  onUpgrade?(statusCode: number, rawHeaders: Buffer[] | null, socket: Duplex): void;
  onHeaders?(statusCode: number, rawHeaders: Buffer[], resume: () => void, statusText: string): unknown;
  onData?(chunk: Buffer): unknown;
  onComplete?(rawTrailers: Buffer[] | null): void;
  onError?(error: Error): void;
  onBodySent?(chunk: Buffer): void;
  onRequestSent?(): void;
  onResponseStarted?(): void;
}

/** Whether a handler speaks the legacy contract only. */
export function isLegacy(handler: object): handler is LegacyHandler {
  return typeof (handler as Handler).onRequestStart !== 'function';
}

/** A legacy handler behind today's contract. */
export class LegacyAdapter implements Handler {
  private readonly handler: LegacyHandler;

  constructor(handler: LegacyHandler) {
    this.handler = handler;
  }

  onRequestStart(controller: Controller, context: unknown): void {
    this.handler.onConnect?.((reason) => controller.abort(reason as Error), context);
  }

  onRequestUpgrade(controller: Controller, statusCode: number, headers: IncomingHttpHeaders, socket: Duplex): void {
    this.handler.onUpgrade?.(statusCode, rawOf(controller.rawHeaders ?? headers), socket);
  }

  onResponseStart(controller: Controller, statusCode: number, headers: IncomingHttpHeaders, statusText = ''): void {
    const raw = rawOf(controller.rawHeaders ?? headers);
    if (this.handler.onHeaders?.(statusCode, raw, () => controller.resume(), statusText) === false) controller.pause();
  }

  onResponseData(controller: Controller, chunk: Buffer): void {
    if (this.handler.onData?.(chunk) === false) controller.pause();
  }

  onResponseEnd(controller: Controller, trailers: IncomingHttpHeaders): void {
    this.handler.onComplete?.(rawOf(controller.rawTrailers ?? trailers));
  }

  onResponseError(_controller: Controller | null, error: Error): void {
    if (this.handler.onError === undefined) throw error;
    this.handler.onError(error);
  }

  onBodySent(chunk: Buffer): void {
    this.handler.onBodySent?.(chunk);
  }

  onRequestSent(): void {
    this.handler.onRequestSent?.();
  }

  onResponseStarted(): void {
    this.handler.onResponseStarted?.();
  }
}

/**
 * Today's handler with the legacy contract beside it, for a fallback dispatcher whose age is unknown: undici 6 (Node
 * 22's own) knows the legacy half only, later ones prefer the other.
 */
export class DualHandler implements LegacyHandler, Handler {
  private readonly handler: Handler;
  private readonly legacy = new LegacyController();

  constructor(handler: Handler) {
    this.handler = handler;
  }

  onRequestStart(controller: Controller, context: unknown): void {
    this.handler.onRequestStart?.(controller, context);
  }

  onRequestUpgrade(controller: Controller, statusCode: number, headers: IncomingHttpHeaders, socket: Duplex): void {
    this.handler.onRequestUpgrade?.(controller, statusCode, headers, socket);
  }

  onResponseStart(controller: Controller, statusCode: number, headers: IncomingHttpHeaders, statusText?: string): void {
    this.handler.onResponseStart?.(controller, statusCode, headers, statusText);
  }

  onResponseData(controller: Controller, chunk: Buffer): void {
    this.handler.onResponseData?.(controller, chunk);
  }

  onResponseEnd(controller: Controller, trailers: IncomingHttpHeaders): void {
    this.handler.onResponseEnd?.(controller, trailers);
  }

  onResponseError(controller: Controller, error: Error): void {
    this.handler.onResponseError?.(controller, error);
  }

  onConnect(abort: (reason?: Error) => void, context?: unknown): void {
    this.legacy.abortLive = abort;
    this.handler.onRequestStart?.(this.legacy, context);
  }

  onUpgrade(statusCode: number, rawHeaders: Buffer[] | null, socket: Duplex): void {
    this.legacy.rawHeaders = rawHeaders;
    this.handler.onRequestUpgrade?.(this.legacy, statusCode, parse(rawHeaders), socket);
  }

  onHeaders(statusCode: number, rawHeaders: Buffer[], resume: () => void, statusText: string): boolean {
    this.legacy.rawHeaders = rawHeaders;
    this.legacy.resumeLive = resume;
    this.handler.onResponseStart?.(this.legacy, statusCode, parse(rawHeaders), statusText);
    return !this.legacy.paused;
  }

  onData(chunk: Buffer): boolean {
    this.handler.onResponseData?.(this.legacy, chunk);
    return !this.legacy.paused;
  }

  onComplete(rawTrailers: Buffer[] | null): void {
    this.legacy.rawTrailers = rawTrailers;
    this.handler.onResponseEnd?.(this.legacy, parse(rawTrailers));
  }

  onError(error: Error): void {
    this.handler.onResponseError?.(this.legacy, error);
  }

  onBodySent(chunk: Buffer): void {
    this.handler.onBodySent?.(chunk);
  }

  onRequestSent(): void {
    this.handler.onRequestSent?.();
  }

  onResponseStarted(): void {
    this.handler.onResponseStarted?.();
  }
}

/** The controller that legacy dispatchers do not have. */
class LegacyController implements Controller {
  aborted = false;
  paused = false;
  reason: Error | null = null;
  rawHeaders: Buffer[] | null = null;
  rawTrailers: Buffer[] | null = null;
  abortLive: ((reason?: Error) => void) | undefined;
  resumeLive: (() => void) | undefined;

  abort(reason: Error): void {
    if (this.aborted) return;
    this.aborted = true;
    this.reason = reason;
    this.abortLive?.(reason);
  }

  pause(): void {
    this.paused = true;
  }

  resume(): void {
    if (!this.paused) return;
    this.paused = false;
    this.resumeLive?.();
  }
}

/** Name and value in turn, as Buffers; over HTTP/2 undici gives an object. */
function rawOf(headers: RawHeaders): Buffer[] {
  const raw: Buffer[] = [];
  if (Array.isArray(headers)) {
    for (const part of headers) raw.push(typeof part === 'string' ? Buffer.from(part, 'latin1') : part);
    return raw;
  }
  for (const [name, value] of Object.entries(headers)) {
    for (const each of Array.isArray(value) ? value : [value]) {
      raw.push(Buffer.from(name, 'latin1'), Buffer.from(String(each), 'latin1'));
    }
  }
  return raw;
}

function parse(raw: Buffer[] | null): IncomingHttpHeaders {
  const headers: Record<string, string | string[]> = {};
  for (let i = 0; raw !== null && i < raw.length; i += 2) {
    const name = raw[i]!.toString('latin1').toLowerCase();
    const value = raw[i + 1]!.toString('latin1');
    const present = Object.hasOwn(headers, name) ? headers[name] : undefined;
    const next = present === undefined ? value : Array.isArray(present) ? [...present, value] : [present, value];
    Object.defineProperty(headers, name, { value: next, enumerable: true, configurable: true, writable: true });
  }
  return headers;
}
