import http2 from 'node:http2';
import { isIPv6 } from 'node:net';
import type { Line } from './backend.ts';
import { DIAL_MS, type Dial, DialError } from './dial.ts';
import type { Address } from './resolver.ts';

const WINDOW_BYTES = 1024 * 1024;
const MAX_SESSIONS = 32;
/** Of the streams that there can be at one address, what one client may have. */
const PART = 4;

/** All sessions are full. */
export class FullError extends Error {}

interface Session {
  readonly http2: http2.ClientHttp2Session;
  streams: number;
}

/** One address over HTTP/2: another connection is opened when those there are have no stream left. */
export class GrpcLine implements Line {
  readonly address: string;
  private readonly origin: string;
  private readonly dial: () => ReturnType<Dial>;
  private readonly sessions: Session[] = [];
  private opening: Promise<void> | undefined;
  private isClosed = false;

  constructor({ host, port }: Address, dial: Dial, isTls: boolean) {
    this.address = `${isIPv6(host) ? `[${host}]` : host}:${port}`;
    this.origin = `${isTls ? 'https' : 'http'}://${this.address}`;
    this.dial = () => dial({ host, port }, ['h2']);
    this.open().catch(() => {});
  }

  get share(): number {
    const [first] = this.sessions;
    const limit = first === undefined ? DEFAULT_STREAMS : limitOf(first);
    return Math.max(1, Math.ceil((limit * MAX_SESSIONS) / PART));
  }

  /** Rejects with a {@link DialError} or a {@link FullError}: nothing was sent. */
  async request(headers: http2.OutgoingHttpHeaders): Promise<http2.ClientHttp2Stream> {
    for (;;) {
      const session = this.sessions.find((each) => each.streams < limitOf(each) && !isOver(each));
      if (session !== undefined) return begin(session, headers);
      if (this.sessions.length >= MAX_SESSIONS) throw new FullError('every connection is full');
      await this.open();
    }
  }

  close(): void {
    this.isClosed = true;
    for (const { http2 } of this.sessions) http2.close();
  }

  private open(): Promise<void> {
    this.opening ??= this.connect().finally(() => {
      this.opening = undefined;
    });
    return this.opening;
  }

  private async connect(): Promise<void> {
    if (this.isClosed) throw new DialError('the address is gone');
    const socket = await this.dial();
    const session = {
      http2: http2.connect(this.origin, {
        createConnection: () => socket,
        settings: { initialWindowSize: WINDOW_BYTES, enablePush: false },
      }),
      streams: 0,
    };
    const gone = () => {
      const at = this.sessions.indexOf(session);
      if (at !== -1) this.sessions.splice(at, 1);
    };
    session.http2.once('goaway', () => {
      gone();
      session.http2.close();
    });
    session.http2.once('close', gone);
    await greeted(session.http2);
    if (this.isClosed) session.http2.close();
    else if (!isOver(session)) this.sessions.push(session);
    else throw new DialError('the connection ended at once');
  }
}

const DEFAULT_STREAMS = 100;

function limitOf({ http2 }: Session): number {
  return Math.min(http2.remoteSettings?.maxConcurrentStreams ?? DEFAULT_STREAMS, 1_000);
}

function isOver({ http2 }: Session): boolean {
  return http2.closed || http2.destroyed;
}

function begin(session: Session, headers: http2.OutgoingHttpHeaders): http2.ClientHttp2Stream {
  const stream = session.http2.request(headers);
  session.streams += 1;
  stream.once('close', () => {
    session.streams -= 1;
  });
  return stream;
}

/** Before its SETTINGS nobody knows how many streams a server takes. */
function greeted(session: http2.ClientHttp2Session): Promise<void> {
  return new Promise((resolve, reject) => {
    const failed = (cause?: Error) => {
      clearTimeout(late);
      session.destroy();
      reject(new DialError('this is no HTTP/2 server', { cause }));
    };
    const late = setTimeout(failed, DIAL_MS);
    // Later errors are those of its streams, which report them.
    session.on('error', failed);
    session.once('close', failed);
    session.once('remoteSettings', () => {
      clearTimeout(late);
      session.off('close', failed);
      resolve();
    });
  });
}
