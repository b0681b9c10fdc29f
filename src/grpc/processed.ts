import type { ClientHttp2Session, ClientHttp2Stream } from 'node:http2';

/**
 * Which streams of a connection its other end cannot have processed: those above the last stream of its GOAWAY, whatever
 * the code of that says (RFC 9113 §6.8). Node ends them with that code, and grpc-js tells no more.
 */
export class Processed {
  private session: ClientHttp2Session | undefined;
  private newest: ClientHttp2Stream | undefined;
  private last = Number.POSITIVE_INFINITY;

  /** Every stream, as it is created. */
  saw(stream: ClientHttp2Stream, session: ClientHttp2Session): void {
    this.newest = stream;
    if (this.session === undefined) {
      this.session = session;
      session.on('goaway', (_code, lastStream: number) => {
        this.last = Math.min(this.last, lastStream);
      });
    } else if (this.session !== session) {
      // grpc-js dialled again by itself: nobody knows which session a call was on.
      this.last = Number.NaN;
    }
  }

  /** For {@link noneAfter}, before a call gets its streams. */
  get mark(): number {
    return this.newest?.id ?? 0;
  }

  /** Whether no stream that was created after `mark` was read was processed. */
  noneAfter(mark: number): boolean {
    return this.last <= mark;
  }
}
