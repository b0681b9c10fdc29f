import { Readable } from 'node:stream';

type Source = AsyncIterable<unknown> | Iterable<unknown> | NodeJS.ReadableStream;
type Cursor = { next(): Promise<IteratorResult<unknown>> | IteratorResult<unknown>; return?(): unknown };

/**
 * A body that can be read once, made readable again for as long as no more than `limit` bytes of it were read: every
 * body of a fetch is such a generator, even a string, and a request that a kedge never processed should not be lost for
 * that. Chunks beyond the limit are passed on and not kept.
 */
export class ReplayBody implements AsyncIterable<unknown> {
  private readonly source: object;
  private readonly cursor: Cursor;
  private readonly limit: number;
  private kept: unknown[] = [];
  private bytes = 0;
  private done = false;
  private failure: { readonly error: unknown } | undefined;
  private broken = false;
  private pending: Promise<void> | undefined;
  /** Readers are numbered: an attempt that was given up must not eat what belongs to the next. */
  private reader = 0;

  constructor(source: Source, limit: number) {
    // Streams from before Node 0.10 flow by themselves and do not iterate.
    const iterable = isIterable(source) ? source : new Readable().wrap(source);
    this.source = iterable;
    this.cursor = Symbol.asyncIterator in iterable ? iterable[Symbol.asyncIterator]() : iterable[Symbol.iterator]();
    this.limit = limit;
  }

  /** Whether this is the error by which the caller's own source ended. */
  brokeWith(error: unknown): boolean {
    return this.broken && this.failure?.error === error;
  }

  /** Whether the next reader would still get it whole. */
  get replayable(): boolean {
    return this.bytes <= this.limit && this.failure === undefined;
  }

  async *[Symbol.asyncIterator](): AsyncGenerator<unknown, void, void> {
    this.reader += 1;
    const reader = this.reader;
    let position = 0;
    for (;;) {
      // An end would look like the whole body to whoever receives it.
      if (reader !== this.reader) throw new Error('this attempt was given up');
      if (position < this.kept.length) {
        position += 1;
        yield this.kept[position - 1];
        continue;
      }
      if (this.failure !== undefined) throw this.failure.error;
      if (this.done) return;
      if (!this.replayable) {
        // This reader is the last that can be: nothing is kept for another.
        this.kept = [];
        position = 0;
      }
      this.pending ??= this.pull();
      await this.pending;
    }
  }

  /** The call is over: the source learns that nobody reads on, and whoever still does finds an error, never an end. */
  async end(): Promise<void> {
    this.reader += 1;
    this.kept = [];
    this.failure ??= { error: new Error('the call is over') };
    if (this.done) return;
    this.done = true;
    if (isStream(this.source)) {
      this.source.destroy();
      return;
    }
    try {
      await this.cursor.return?.();
    } catch {
      // Its failure concerns a call that has its answer.
    }
  }

  private async pull(): Promise<void> {
    try {
      const { done, value } = await this.cursor.next();
      if (done === true) {
        this.done = true;
      } else {
        this.bytes += sizeOf(value);
        this.kept.push(value);
      }
    } catch (error) {
      this.done = true;
      this.broken = this.failure === undefined;
      this.failure ??= { error };
    } finally {
      this.pending = undefined;
    }
  }
}

/** Whether a body is read once only; all others undici can send again as they are. */
export function isOneShot(body: unknown): body is Source {
  if (typeof body !== 'object' || body === null) return false;
  if (body instanceof Uint8Array || body instanceof ArrayBuffer || body instanceof Blob || ArrayBuffer.isView(body))
    return false;
  // FormData iterates its entries, and undici serialises it itself.
  if (typeof (body as { append?: unknown }).append === 'function') return false;
  return isIterable(body) || isStream(body);
}

function isIterable(body: object): body is AsyncIterable<unknown> | Iterable<unknown> {
  return Symbol.asyncIterator in body || Symbol.iterator in body;
}

export function isStream(body: unknown): body is Readable {
  return typeof body === 'object' && body !== null && typeof (body as Partial<Readable>).on === 'function';
}

function sizeOf(chunk: unknown): number {
  if (typeof chunk === 'string') return Buffer.byteLength(chunk);
  return chunk instanceof Uint8Array ? chunk.byteLength : 0;
}

/** A body of so many bytes goes out at once. */
const PIECE_BYTES = 64 * 1024;

/** What is in memory as a whole, as pieces that can be read again and again; undefined where it is small, or something else. */
export function pieces(body: unknown): (Iterable<Uint8Array> & { readonly length: number }) | undefined {
  if (typeof body === 'string') return body.length > PIECE_BYTES ? new Pieces(Buffer.from(body)) : undefined;
  if (!(ArrayBuffer.isView(body) || body instanceof ArrayBuffer) || body.byteLength <= PIECE_BYTES) return undefined;
  if (body instanceof ArrayBuffer) return new Pieces(new Uint8Array(body));
  return new Pieces(new Uint8Array(body.buffer, body.byteOffset, body.byteLength));
}

class Pieces implements Iterable<Uint8Array> {
  private readonly bytes: Uint8Array;

  constructor(bytes: Uint8Array) {
    this.bytes = bytes;
  }

  get length(): number {
    return this.bytes.length;
  }

  *[Symbol.iterator](): Generator<Uint8Array, void, void> {
    for (let at = 0; at < this.bytes.length; at += PIECE_BYTES) yield this.bytes.subarray(at, at + PIECE_BYTES);
  }
}
