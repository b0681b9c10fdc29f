import http2 from 'node:http2';
import net from 'node:net';

/** A gRPC status that a stream ended with, or the loss of its connection (`UNAVAILABLE`). */
export class StreamError extends Error {
  readonly status: number;

  constructor(status: number, message: string) {
    super(message);
    this.status = status;
  }
}

/** Status codes of gRPC (https://grpc.github.io/grpc/core/md_doc_statuscodes.html). */
export const Status = {
  OK: 0,
  INVALID_ARGUMENT: 3,
  PERMISSION_DENIED: 7,
  RESOURCE_EXHAUSTED: 8,
  UNIMPLEMENTED: 12,
  UNAVAILABLE: 14,
} as const;

/** One call to the agent. */
export interface Stream {
  /** It does not keep the process alive any more. */
  unref(): void;
  close(): void;
}

/** Hears of one call: any number of messages, then once its end, never in the tick of the call. */
export interface StreamObserver {
  message(bytes: Buffer): void;
  ended(error: StreamError): void;
}

/** The agent answers only callers that send it, so that no browser can be made to ask (SPIFFE Workload Endpoint §3). */
const SECURITY_HEADER = 'workload.spiffe.io';
/** A flag for compression, which we do not offer, and the length of the message. */
const FRAME_HEADER_BYTES = 5;
/** No workload has as many identities. */
const MAX_MESSAGE_BYTES = 4 * 1024 * 1024;

/**
 * Calls a server-streaming gRPC method with an empty request and no TLS: all of gRPC that a SPIFFE agent needs
 * (https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md), on a session that can be kept from holding the process.
 */
export function openStream(endpoint: net.NetConnectOpts, path: string, observer: StreamObserver): Stream {
  const session = http2.connect('http://localhost', { createConnection: () => net.connect(endpoint) });
  let end: StreamError | undefined;
  let isOver = false;
  const finish = (error: StreamError) => {
    end ??= error;
    session.destroy();
  };
  session.on('error', (error) => finish(new StreamError(Status.UNAVAILABLE, error.message)));
  // An agent that is shutting down; the stream would go on, for as long as the agent lets it.
  session.on('goaway', () => finish(new StreamError(Status.UNAVAILABLE, 'the agent goes away')));
  session.on('close', () => {
    if (isOver) return;
    isOver = true;
    observer.ended(end ?? new StreamError(Status.UNAVAILABLE, 'the agent closed the connection'));
  });
  const stream = session.request({
    ':method': 'POST',
    ':path': path,
    'content-type': 'application/grpc',
    te: 'trailers',
    [SECURITY_HEADER]: 'true',
  });
  stream.on('error', (error) => finish(new StreamError(Status.UNAVAILABLE, error.message)));
  const status = (headers: http2.IncomingHttpHeaders) => {
    if (headers['grpc-status'] !== undefined) finish(statusOf(headers));
  };
  stream.on('response', (headers) => {
    if (headers[':status'] === 200) status(headers);
    else finish(new StreamError(Status.UNAVAILABLE, `the agent answered ${headers[':status']}`));
  });
  stream.on('trailers', status);
  stream.on('close', () => finish(new StreamError(Status.UNAVAILABLE, 'the stream ended')));
  let buffered: Buffer = Buffer.alloc(0);
  stream.on('data', (chunk: Buffer) => {
    buffered = Buffer.concat([buffered, chunk]);
    while (end === undefined && buffered.length >= FRAME_HEADER_BYTES) {
      const length = buffered.readUInt32BE(1);
      if (buffered[0] !== 0 || length > MAX_MESSAGE_BYTES) {
        finish(new StreamError(Status.RESOURCE_EXHAUSTED, 'a message that is compressed or too long'));
        return;
      }
      if (buffered.length < FRAME_HEADER_BYTES + length) return;
      const message = buffered.subarray(FRAME_HEADER_BYTES, FRAME_HEADER_BYTES + length);
      buffered = buffered.subarray(FRAME_HEADER_BYTES + length);
      observer.message(message);
    }
  });
  stream.end(Buffer.alloc(FRAME_HEADER_BYTES));
  return {
    unref: () => session.unref(),
    close: () => {
      isOver = true;
      session.destroy();
    },
  };
}

function statusOf(headers: http2.IncomingHttpHeaders): StreamError {
  const text = String(headers['grpc-message'] ?? '');
  let message = text;
  try {
    message = decodeURIComponent(text);
  } catch {
    // Shown as it came.
  }
  const code = Number(headers['grpc-status']);
  return new StreamError(code, code === Status.OK ? 'the stream ended' : message || `status ${code}`);
}
