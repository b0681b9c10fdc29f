import { type ClientHttp2Stream, constants, type IncomingHttpHeaders } from 'node:http2';
import { Metadata, type StatusObject, status } from '@grpc/grpc-js';
import type { Session } from '../rpc/session.ts';
import { MessageDecoder } from './message-decoder.ts';

/** What grpc-js knows of the call that it opens on a subchannel. */
export interface StreamListener {
  onReceiveMetadata(metadata: Metadata): void;
  onReceiveMessage(message: Buffer): void;
  onReceiveStatus(status: StreamStatus): void;
}

/** grpc-js makes a call again by itself when `rstCode` is that of RFC 9113 §8.7. */
export type StreamStatus = StatusObject & { rstCode?: number };

/** How a stream ended that the backend gave no status for. */
export type StreamEnd = 'unprocessed' | 'lost' | 'reset';

/** Hears once that the stream of a call is over, and how, where not by a status of the backend or of grpc-js. */
export type OnStreamEnd = (end: StreamEnd | undefined, status: StreamStatus) => void;

const { NGHTTP2_CANCEL, NGHTTP2_ENHANCE_YOUR_CALM, NGHTTP2_INADEQUATE_SECURITY } = constants;
const { NGHTTP2_INTERNAL_ERROR, NGHTTP2_NO_ERROR, NGHTTP2_REFUSED_STREAM } = constants;

/** HTTP statuses of answers that are not gRPC's (gRPC, "HTTP to gRPC Status Code Mapping"). */
const HTTP_STATUSES: Readonly<Record<number, status>> = {
  400: status.INTERNAL,
  401: status.UNAUTHENTICATED,
  // Not in the table: to a client of a proxy it means what 401 means to others (RFC 9110 §15.5.8).
  407: status.UNAUTHENTICATED,
  403: status.PERMISSION_DENIED,
  404: status.UNIMPLEMENTED,
  429: status.UNAVAILABLE,
  502: status.UNAVAILABLE,
  503: status.UNAVAILABLE,
  504: status.UNAVAILABLE,
};

/**
 * One gRPC call on one HTTP/2 stream: what grpc-js's own transport would be, over a session of ours. Statuses and their
 * texts are those of grpc-js, for people and programs look for them.
 */
export class StreamCall {
  private readonly stream: ClientHttp2Stream;
  private readonly session: Session;
  private readonly listener: StreamListener;
  private readonly onEnd: OnStreamEnd;
  private readonly callNumber: number;
  private readonly decoder: MessageDecoder;
  /** Messages that nobody has asked for yet; while there are some, the stream is paused. */
  private readonly unread: Buffer[] = [];
  private canPush = false;
  private isPushing = false;
  private readsClosed = false;
  private httpStatus: number | undefined;
  private serverEnded = false;
  private error: (Error & { code?: string }) | undefined;
  private final: StreamStatus | undefined;
  private how: StreamEnd | undefined;
  private isOver = false;

  constructor(
    stream: ClientHttp2Stream,
    session: Session,
    maxMessageBytes: number,
    callNumber: number,
    listener: StreamListener,
    onEnd: OnStreamEnd,
  ) {
    this.stream = stream;
    this.session = session;
    this.listener = listener;
    this.onEnd = onEnd;
    this.callNumber = callNumber;
    this.decoder = new MessageDecoder(maxMessageBytes);
    stream.on('response', (headers, flags) => this.onResponse(headers, flags));
    stream.on('trailers', (headers) => this.onTrailers(headers));
    stream.on('data', (data: Buffer) => this.onData(data));
    stream.on('end', () => {
      this.readsClosed = true;
      this.settle();
    });
    stream.on('error', (error) => {
      this.error = error;
    });
    stream.on('close', () => {
      this.serverEnded = true;
      // After the session has said why, if it is gone as well.
      setImmediate(() => this.onClose());
    });
  }

  // -- what grpc-js asks of a call on a subchannel

  startRead(): void {
    if (this.final !== undefined && this.final.code !== status.OK) {
      this.readsClosed = true;
      this.settle();
      return;
    }
    this.canPush = true;
    const next = this.unread.shift();
    if (next === undefined) this.stream.resume();
    else this.push(next);
  }

  sendMessageWithContext(context: { callback?: (error?: Error) => void }, message: Buffer): void {
    // Nothing may touch the stream from within its write callback (nodejs/node#49147). What failed says so as it closes.
    const written = () => process.nextTick(() => context.callback?.());
    if (this.stream.destroyed) written();
    else this.stream.write(message, written);
  }

  halfClose(): void {
    if (!this.stream.destroyed && !this.stream.writableEnded) this.stream.end();
  }

  cancelWithStatus(code: status, details: string): void {
    this.end({ code, details, metadata: new Metadata() });
  }

  getPeer(): string {
    return this.session.peer;
  }

  getCallNumber(): number {
    return this.callNumber;
  }

  getDeadlineInfo(): string[] {
    return [`remote_addr=${this.session.peer}`];
  }

  getStatus(): StreamStatus | null {
    return this.final ?? null;
  }

  getAuthContext(): object {
    const { tlsSocket } = this.session;
    if (!tlsSocket?.authorized) return {};
    return { transportSecurityType: 'ssl', sslPeerCertificate: tlsSocket.getPeerCertificate() };
  }

  // -- the stream

  private onResponse(headers: IncomingHttpHeaders & { ':status'?: number }, flags: number): void {
    this.httpStatus = headers[':status'];
    if (flags & constants.NGHTTP2_FLAG_END_STREAM) {
      this.onTrailers(headers);
      return;
    }
    const metadata = metadataOf(headers);
    if (metadata instanceof Metadata) this.listener.onReceiveMetadata(metadata);
    else this.end({ code: status.UNKNOWN, details: metadata.message, metadata: new Metadata() });
  }

  private onTrailers(headers: IncomingHttpHeaders): void {
    this.serverEnded = true;
    const read = metadataOf(headers);
    const metadata = read instanceof Metadata ? read : new Metadata();
    const [code] = metadata.get('grpc-status');
    if (code === undefined) {
      const { httpStatus } = this;
      if (httpStatus !== undefined) this.end({ ...mapped(httpStatus), metadata });
      else this.end({ code: status.UNKNOWN, details: 'No status information received', metadata });
      return;
    }
    const details = decoded(String(metadata.get('grpc-message')[0] ?? ''));
    metadata.remove('grpc-status');
    metadata.remove('grpc-message');
    this.end({ code: Number(code), details, metadata });
  }

  private onData(data: Buffer): void {
    // What still comes after the end flows off, so that the stream can close.
    if (this.isOver) return;
    let messages: Buffer[];
    try {
      messages = this.decoder.write(data);
    } catch (error) {
      // A page of HTML in place of messages: its HTTP status says more than its first bytes taken as a length.
      const { httpStatus } = this;
      const other = httpStatus === undefined || httpStatus === 200 ? undefined : mapped(httpStatus);
      this.end(
        other ?? { code: status.RESOURCE_EXHAUSTED, details: (error as Error).message, metadata: new Metadata() },
      );
      return;
    }
    for (const message of messages) {
      if (this.canPush) {
        this.stream.pause();
        this.push(message);
      } else this.unread.push(message);
    }
  }

  private push(message: Buffer): void {
    this.canPush = false;
    this.isPushing = true;
    process.nextTick(() => {
      this.isPushing = false;
      if (this.isOver) return;
      this.listener.onReceiveMessage(message);
      this.settle();
    });
  }

  private onClose(): void {
    if (this.isOver) return;
    if (this.final !== undefined) {
      // OK, and its caller has not read all yet. The stream has no 'end' any more if it was destroyed before.
      if (this.readsClosed) return;
      if (this.stream.readableLength > 0) {
        this.broken('lost', status.UNAVAILABLE, this.session.why?.message ?? 'Connection dropped', NGHTTP2_NO_ERROR);
        return;
      }
      this.readsClosed = true;
      this.settle();
      return;
    }
    const { rstCode = NGHTTP2_NO_ERROR } = this.stream;
    if (rstCode === NGHTTP2_REFUSED_STREAM) {
      this.broken('unprocessed', status.UNAVAILABLE, 'Stream refused by server', rstCode);
    } else if (this.session.isLost && !this.session.hasErred) {
      this.broken('lost', status.UNAVAILABLE, this.session.why?.message ?? 'Connection dropped', rstCode);
    } else if (rstCode === NGHTTP2_NO_ERROR) {
      const details = `Received RST_STREAM with code ${rstCode} (Call ended without gRPC status)`;
      if (this.httpStatus !== undefined && this.httpStatus !== 200) this.end(mapped(this.httpStatus));
      else this.broken('reset', status.INTERNAL, details, rstCode);
    } else {
      const { code, details } = this.resetBy(rstCode);
      this.broken('reset', code, details, rstCode);
    }
  }

  private resetBy(rstCode: number): { code: status; details: string } {
    switch (rstCode) {
      case NGHTTP2_CANCEL:
        return { code: status.CANCELLED, details: 'Call cancelled' };
      case NGHTTP2_ENHANCE_YOUR_CALM:
        return { code: status.RESOURCE_EXHAUSTED, details: 'Bandwidth exhausted or memory limit exceeded' };
      case NGHTTP2_INADEQUATE_SECURITY:
        return { code: status.PERMISSION_DENIED, details: 'Protocol not secure enough' };
      case NGHTTP2_INTERNAL_ERROR: {
        const details = `Received RST_STREAM with code ${rstCode}`;
        // Node's own error, not the one that it makes of the reset.
        if (this.error === undefined || this.error.code === 'ERR_HTTP2_STREAM_ERROR')
          return { code: status.INTERNAL, details: `${details} (Internal server error)` };
        return {
          code: status.INTERNAL,
          details: `${details} triggered by internal client error: ${this.error.message}`,
        };
      }
      default:
        return { code: status.INTERNAL, details: `Received RST_STREAM with code ${rstCode}` };
    }
  }

  private broken(end: StreamEnd, code: status, details: string, rstCode: number): void {
    if (this.final !== undefined && this.final.code !== status.OK) return;
    this.how = end;
    this.end({ code, details, metadata: new Metadata(), rstCode });
  }

  /** The first status counts, but a failure to read what an OK promised counts more. */
  private end(final: StreamStatus): void {
    if (this.final === undefined || this.final.code === status.OK) {
      this.final = final;
      this.settle();
    }
    const { stream } = this;
    if (stream.destroyed) return;
    if (!this.serverEnded) stream.close(this.final.code === status.OK ? NGHTTP2_NO_ERROR : NGHTTP2_CANCEL);
    else if (!stream.writableEnded) stream.end();
  }

  /** Passes the status on as soon as all that came before it is read. */
  private settle(): void {
    if (this.final === undefined || this.isOver) return;
    const isRead = this.readsClosed && this.unread.length === 0 && !this.isPushing;
    if (this.final.code === status.OK && !isRead) return;
    this.isOver = true;
    const { final } = this;
    this.onEnd(this.how, final);
    // What is thrown above must not disturb what is cleaned up here.
    process.nextTick(() => this.listener.onReceiveStatus(final));
    this.stream.resume();
  }
}

function metadataOf(headers: IncomingHttpHeaders): Metadata | Error {
  try {
    return Metadata.fromHttp2Headers(headers);
  } catch (error) {
    return error as Error;
  }
}

function mapped(httpStatus: number): StreamStatus {
  const code = HTTP_STATUSES[httpStatus] ?? status.UNKNOWN;
  return { code, details: `Received HTTP status code ${httpStatus}`, metadata: new Metadata() };
}

function decoded(message: string): string {
  try {
    return decodeURI(message);
  } catch {
    return message;
  }
}
