import type http from 'node:http';
import type { IncomingHttpHeaders, OutgoingHttpHeaders } from 'node:http';
import { constants, type ServerHttp2Stream } from 'node:http2';
import { Readable, type Writable } from 'node:stream';
import type { AccessLog } from './access-log.ts';
import { type Head, trailersTowardsClient } from './headers.ts';
import type { Peer } from './peer.ts';
import { errorHeaders, type Refusal } from './refusal.ts';
import { Visit } from './visit.ts';

/** How the length of an answer's body is known: there is none, it is in the head, or it ends when it ends. */
export type Framing = 'none' | 'length' | 'open';

/** One HTTP request and its answer, over HTTP/1.1 or HTTP/2. */
export abstract class Exchange {
  readonly visit: Visit;
  /** Called once when the client went away before the answer was whole. */
  onGone: (() => void) | undefined;
  protected readonly sink: Writable;
  private readonly log: AccessLog;
  /** The whole answer was given. */
  isEnded = false;
  private isClosed = false;

  constructor(sink: Writable, visit: Visit, log: AccessLog) {
    this.sink = sink;
    this.visit = visit;
    this.log = log;
    log.began(visit);
  }

  /** To be told by whoever made it, when the sink is closed. */
  closed(): void {
    this.isClosed = true;
    this.log.ended(this.visit, this.status);
    if (!this.isEnded) this.onGone?.();
  }

  /** The client went away, or was answered. */
  get isGone(): boolean {
    return this.isClosed || this.sink.destroyed;
  }

  /** Of the answer, once there is one. */
  abstract get status(): number | undefined;

  /** The body, as a stream of its own; undefined when there is none. */
  abstract body(): Readable | undefined;

  /** Sends the head of the answer; throws when it cannot be sent. */
  abstract respond(status: number, headers: OutgoingHttpHeaders, framing: Framing): void;

  /** 103 Early Hints, where the client's protocol has them. */
  abstract hint(headers: OutgoingHttpHeaders): void;

  /** Cuts the answer short, so that nobody takes it for whole. */
  abstract abort(): void;

  /** Drops a body that nobody reads. */
  protected abstract discard(): void;

  /** False when `resume` will be called before there should be more. */
  write(chunk: Buffer, resume: () => void): boolean {
    if (this.sink.write(chunk)) return true;
    this.sink.once('drain', resume);
    return false;
  }

  /** The connection is the backend's from now on. */
  upgraded(): void {
    this.isEnded = true;
    this.log.ended(this.visit, 101);
  }

  end(chunk: Buffer | undefined, _trailers?: IncomingHttpHeaders): void {
    this.isEnded = true;
    this.sink.end(chunk);
  }

  /** An answer of the kedge's own. */
  refuse(refusal: Refusal): void {
    this.visit.refusal = refusal;
    if (this.isGone || this.status !== undefined) return;
    const text = Buffer.from(`kedge: ${refusal.message}\n`);
    const own = { 'content-type': 'text/plain', 'content-length': text.length };
    this.discard();
    this.respond(refusal.http, { ...own, ...errorHeaders(refusal) }, 'length');
    this.end(text);
  }
}

export class H1Exchange extends Exchange {
  private readonly request: http.IncomingMessage;
  private readonly response: http.ServerResponse;

  constructor(request: http.IncomingMessage, response: http.ServerResponse, peer: Peer, head: Head, log: AccessLog) {
    const { method, url, rawHeaders } = request;
    super(response, new Visit('http/1.1', method!, url!, head.host ?? '', peer, head, rawHeaders), log);
    this.request = request;
    this.response = response;
  }

  get status(): number | undefined {
    return this.response.headersSent ? this.response.statusCode : undefined;
  }

  body(): Readable | undefined {
    return this.visit.head.hasBody ? new Body(this.request, () => this.request.complete) : undefined;
  }

  respond(status: number, headers: OutgoingHttpHeaders): void {
    this.response.writeHead(status, headers);
  }

  override end(chunk: Buffer | undefined, trailers?: IncomingHttpHeaders): void {
    if (trailers !== undefined) this.response.addTrailers(trailersTowardsClient(trailers) as http.OutgoingHttpHeaders);
    super.end(chunk);
  }

  hint(headers: OutgoingHttpHeaders): void {
    this.response.writeEarlyHints(headers as Record<string, string>);
  }

  abort(): void {
    this.request.socket.destroy();
  }

  protected discard(): void {
    this.request.resume();
  }
}

export class H2Exchange extends Exchange {
  private readonly stream: ServerHttp2Stream;
  private readonly hasBody: boolean;
  private trailers: IncomingHttpHeaders = {};

  constructor(stream: ServerHttp2Stream, visit: Visit, hasBody: boolean, log: AccessLog) {
    super(stream, visit, log);
    this.stream = stream;
    this.hasBody = hasBody;
  }

  get status(): number | undefined {
    return this.stream.sentHeaders?.[':status'] as number | undefined;
  }

  override get isGone(): boolean {
    return super.isGone || this.stream.closed;
  }

  body(): Readable | undefined {
    const { stream } = this;
    if (!this.hasBody) return undefined;
    if (this.visit.head.expects && !this.isGone) stream.additionalHeaders({ ':status': 100 });
    // Node ends what was reset as if it were whole.
    return new Body(stream, () => !stream.aborted && stream.rstCode === constants.NGHTTP2_NO_ERROR);
  }

  respond(status: number, headers: OutgoingHttpHeaders, framing: Framing): void {
    headers[':status'] = status;
    this.stream.respond(headers, { endStream: framing === 'none', waitForTrailers: framing === 'open' });
    if (framing === 'open') this.stream.once('wantTrailers', () => this.sendTrailers());
  }

  override end(chunk: Buffer | undefined, trailers?: IncomingHttpHeaders): void {
    if (trailers !== undefined) this.trailers = trailers;
    super.end(chunk);
  }

  hint(headers: OutgoingHttpHeaders): void {
    if (!this.isGone) this.stream.additionalHeaders({ ':status': 103, ...headers });
  }

  abort(): void {
    // Not `close()`, which ends what was begun before it resets.
    this.stream.destroy(new Error('the answer breaks off'));
  }

  protected discard(): void {
    this.stream.resume();
  }

  private sendTrailers(): void {
    if (!this.isGone) this.stream.sendTrailers(trailersTowardsClient(this.trailers));
  }
}

/**
 * What a client sends, as a stream of its own: whoever ends it early ends neither the client's connection nor its answer, and
 * what still comes is dropped. What breaks off ends with an error: nobody must take it for whole.
 */
class Body extends Readable {
  private readonly source: Readable;

  constructor(source: Readable, isWhole: () => boolean) {
    super();
    this.source = source;
    source.on('data', (chunk: Buffer) => {
      if (!this.destroyed && !this.push(chunk)) source.pause();
    });
    source.once('end', () => {
      if (isWhole()) this.push(null);
      else this.destroy(new Error('the body breaks off'));
    });
    source.once('close', () => {
      if (!this.readableEnded && !isWhole()) this.destroy(new Error('the body breaks off'));
    });
    source.pause();
  }

  override _read(): void {
    this.source.resume();
  }

  override _destroy(error: Error | null, callback: (error: Error | null) => void): void {
    this.source.resume();
    callback(error);
  }
}
