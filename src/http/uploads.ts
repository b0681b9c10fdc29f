import { type ClientHttp2Session, type ClientHttp2Stream, constants } from 'node:http2';
import { MAX_INT32 } from '../support/timer.ts';

/** The most of one upload that Node is handed at a time, in bytes: three DATA frames. */
const PIECE_BYTES = 48 * 1024;
/** Any upload may go on by this much, in bytes, whatever the others hold. */
const LEAST_BYTES = 1024;
/** What all uploads of a connection may have with Node together, in bytes. */
const BUDGET_BYTES = 2 * 1024 * 1024;
/** Of what is left of the budget, the next piece of any upload may have this part. */
const SHARE = 1 / 16;
/** What a connection may have lost count of, in bytes, before another takes its place. */
const LOST_BYTES = 2 * 1024 * 1024;

type Written = (error?: Error | null) => void;

/** The methods of a stream that an {@link Upload} stands before. */
interface Inherited {
  write(this: ClientHttp2Stream, chunk: unknown, encoding?: BufferEncoding, written?: Written): boolean;
  end(this: ClientHttp2Stream): void;
}

/**
 * Bounds what the uploads of one HTTP/2 connection have with Node, across all of them. Node counts what it was given and
 * cannot send yet against the session's `maxSessionMemory`, 10 MB, which undici does not set; above that it resets every
 * answer that arrives with ENHANCE_YOUR_CALM. A body in one `Buffer`, which undici writes at once, does that alone. So
 * bodies are handed over in pieces, and the more uploads there are, the smaller these get: each may have a share of
 * what the others have left (Choudhury and Hahne's dynamic thresholds, which are fair without a queue).
 *
 * When a stream ends before Node has sent what it was given, Node goes on counting that (`Http2Stream::Destroy()` in
 * nodejs/node src/node_http2.cc never gives `available_outbound_length_` back). Before this adds up, the connection retires.
 */
export class Uploads {
  private readonly session: ClientHttp2Session;
  /** Bytes that Node has. */
  private handed = 0;
  /** Bytes that Node had when their stream ended. */
  private lost = 0;
  private isRetired = false;
  /** Bytes of bodies that were too large to go at once. */
  uploaded = 0;

  constructor(session: ClientHttp2Session) {
    this.session = session;
  }

  /** Takes charge of what is written to a stream. */
  watch(stream: ClientHttp2Stream): void {
    const upload = stream.writableEnded ? undefined : new Upload(stream, this);
    stream.once('close', () => {
      upload?.stop();
      if (this.lost > LOST_BYTES || stream.rstCode === constants.NGHTTP2_ENHANCE_YOUR_CALM) this.retire();
    });
  }

  /** How large the next piece may be. */
  get share(): number {
    return Math.max(LEAST_BYTES, Math.min(PIECE_BYTES, Math.floor((BUDGET_BYTES - this.handed) * SHARE)));
  }

  hand(bytes: number): void {
    this.handed += bytes;
  }

  sent(bytes: number): void {
    this.handed -= bytes;
  }

  lose(bytes: number): void {
    this.handed -= bytes;
    this.lost += bytes;
  }

  /** To undici it looks as if the kedge had asked for it: calls under way finish, others meet a new connection. */
  retire(): void {
    if (this.isRetired) return;
    this.isRetired = true;
    setImmediate(() => {
      if (!this.session.closed) this.session.emit('goaway', constants.NGHTTP2_NO_ERROR, MAX_INT32);
    });
  }
}

/** One body on its way. It stands before `write()` and `end()` of its stream, and waits where Node would only take notes. */
class Upload {
  private readonly stream: ClientHttp2Stream;
  private readonly uploads: Uploads;
  private readonly inherited: Inherited;
  /** Bytes that Node has. */
  private handed = 0;
  private readonly waiting: { rest: Uint8Array; written: Written | undefined }[] = [];
  /** A piece is with Node: the next one follows it, whatever is written or drained meanwhile. */
  private isHanding = false;
  private isEnding = false;
  private isOver = false;

  constructor(stream: ClientHttp2Stream, uploads: Uploads) {
    this.stream = stream;
    this.uploads = uploads;
    this.inherited = Object.getPrototypeOf(stream);
    stream.write = this.write.bind(this) as ClientHttp2Stream['write'];
    stream.end = this.end.bind(this) as ClientHttp2Stream['end'];
  }

  stop(): void {
    this.isOver = true;
    this.waiting.length = 0;
    this.uploads.lose(this.handed);
  }

  private write(chunk: unknown, encoding?: BufferEncoding | Written, written?: Written): boolean {
    if (typeof encoding === 'function') return this.write(chunk, undefined, encoding);
    const bytes = typeof chunk === 'string' ? Buffer.from(chunk, encoding) : chunk;
    // Node refuses whatever else it is, and says so of a stream that is over.
    if (this.isOver || !(bytes instanceof Uint8Array))
      return this.inherited.write.call(this.stream, bytes, encoding, written);
    if (this.waiting.length === 0 && bytes.length <= this.uploads.share) return this.hand(bytes, written);
    this.waiting.push({ rest: bytes, written });
    this.next();
    return false;
  }

  private end(chunk?: unknown, encoding?: BufferEncoding | Written, ended?: Written): ClientHttp2Stream {
    if (typeof chunk === 'function') return this.end(undefined, undefined, chunk as Written);
    if (typeof encoding === 'function') return this.end(chunk, undefined, encoding);
    if (chunk !== undefined && chunk !== null) this.write(chunk, encoding);
    if (ended !== undefined) this.stream.once('finish', ended);
    this.isEnding = true;
    if (this.waiting.length === 0) this.inherited.end.call(this.stream);
    return this.stream;
  }

  private hand(bytes: Uint8Array, written: Written | undefined): boolean {
    const { length } = bytes;
    this.handed += length;
    this.uploads.hand(length);
    return this.inherited.write.call(this.stream, bytes, undefined, (error) => {
      // Node 26 tells of no error where a stream was destroyed before its bytes were sent.
      if (!this.isOver && !error && !this.stream.destroyed) {
        this.handed -= length;
        this.uploads.sent(length);
      }
      written?.(error);
    });
  }

  /** Hands over the next piece; with the last one goes the end, so that Node puts both into one frame. */
  private next(): void {
    const [first] = this.waiting;
    if (first === undefined || this.isHanding) return;
    this.isHanding = true;
    const most = Math.min(this.uploads.share, Math.max(1, this.stream.writableHighWaterMark - 1));
    const isWhole = first.rest.length <= most;
    this.uploads.uploaded += Math.min(first.rest.length, most);
    this.hand(isWhole ? first.rest : first.rest.subarray(0, most), (error) => {
      this.isHanding = false;
      if (isWhole) first.written?.(error);
      if (this.isOver || this.stream.closed || error) return;
      if (this.waiting.length > 0) this.next();
      // A write() that returned true is followed by no 'drain' of Node's.
      else if (!this.isEnding) this.stream.emit('drain');
    });
    if (!isWhole) {
      first.rest = first.rest.subarray(most);
      return;
    }
    this.waiting.shift();
    if (this.waiting.length === 0 && this.isEnding) this.inherited.end.call(this.stream);
  }
}
