import { once } from 'node:events';
import tls from 'node:tls';

/** Frame types (RFC 9113 §6). */
export const FRAME = {
  DATA: 0,
  HEADERS: 1,
  PRIORITY: 2,
  RST_STREAM: 3,
  SETTINGS: 4,
  PUSH_PROMISE: 5,
  PING: 6,
  GOAWAY: 7,
  WINDOW_UPDATE: 8,
  CONTINUATION: 9,
} as const;
export const END_STREAM = 1;
export const ACK = 1;
export const END_HEADERS = 4;

const PREFACE = Buffer.from('PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n');
/** No dynamic table, so that each header block can be read alone. */
const NO_TABLE = Buffer.from([0, 1, 0, 0, 0, 0]);

export interface Frame {
  type: number;
  flags: number;
  stream: number;
  payload: Buffer;
}

export function frame(type: number, flags: number, stream: number, payload: Buffer | number[] = []): Buffer {
  const body = Buffer.from(payload as Buffer);
  const head = Buffer.alloc(9);
  head.writeUIntBE(body.length, 0, 3);
  head[3] = type;
  head[4] = flags;
  head.writeUInt32BE(stream, 5);
  return Buffer.concat([head, body]);
}

/** A header block of literals (RFC 7541 §6.2.2), exactly as they are given. */
export function block(headers: readonly (readonly [string, string])[]): Buffer {
  const text = (value: string) => {
    const bytes = Buffer.from(value, 'latin1');
    return Buffer.concat([integer(bytes.length), bytes]);
  };
  return Buffer.concat(headers.flatMap(([name, value]) => [Buffer.from([0]), text(name), text(value)]));
}

function integer(value: number): Buffer {
  if (value < 127) return Buffer.from([value]);
  const bytes = [127];
  for (let rest = value - 127; ; rest >>= 7) {
    if (rest < 128) return Buffer.from([...bytes, rest]);
    bytes.push((rest & 127) | 128);
  }
}

export const uint32 = (value: number): Buffer => {
  const bytes = Buffer.alloc(4);
  bytes.writeUInt32BE(value >>> 0);
  return bytes;
};

export const request = (path: string, more: readonly (readonly [string, string])[] = [], method = 'GET') =>
  block([[':method', method], [':scheme', 'https'], [':authority', 'app.us1'], [':path', path], ...more]);

/** An HTTP/2 connection whose frames are written one by one; nothing is sent that is not asked for, not even an ACK. */
export class RawH2 {
  readonly frames: Frame[] = [];
  readonly socket: tls.TLSSocket;
  isClosed = false;
  private rest = Buffer.alloc(0);
  private wake = Promise.withResolvers<void>();

  private constructor(socket: tls.TLSSocket) {
    this.socket = socket;
    socket.on('error', () => {});
    socket.on('close', () => {
      this.isClosed = true;
      this.wake.resolve();
    });
    socket.on('data', (chunk: Buffer) => {
      this.rest = Buffer.concat([this.rest, chunk]);
      while (this.rest.length >= 9 && this.rest.length >= 9 + this.rest.readUIntBE(0, 3)) {
        const end = 9 + this.rest.readUIntBE(0, 3);
        const [type, flags] = [this.rest[3]!, this.rest[4]!];
        const stream = this.rest.readUInt32BE(5) & 0x7fffffff;
        this.frames.push({ type, flags, stream, payload: this.rest.subarray(9, end) });
        this.rest = this.rest.subarray(end);
      }
      this.wake.resolve();
      this.wake = Promise.withResolvers<void>();
    });
  }

  /** `settings`: identifiers and values after the preface; undefined: no preface at all. */
  static async connect(options: tls.ConnectionOptions, settings: readonly [number, number][] | undefined = []) {
    const socket = tls.connect({ ...options, ALPNProtocols: ['h2'] });
    const raw = new RawH2(socket);
    await once(socket, 'secureConnect');
    if (settings === undefined) return raw;
    const pairs = settings.map(([id, value]) => Buffer.concat([Buffer.from([0, id]), uint32(value)]));
    raw.write(PREFACE, frame(FRAME.SETTINGS, 0, 0, Buffer.concat([NO_TABLE, ...pairs])));
    return raw;
  }

  write(...frames: Buffer[]): void {
    if (!this.socket.destroyed) this.socket.write(Buffer.concat(frames));
  }

  /** The first frame that is wanted, or undefined when the connection closed or `ms` passed first. */
  async first(wanted: (frame: Frame) => boolean, ms = 5_000): Promise<Frame | undefined> {
    const late = performance.now() + ms;
    for (;;) {
      const found = this.frames.find(wanted);
      if (found !== undefined || this.isClosed || performance.now() >= late) return found;
      let timer: NodeJS.Timeout | undefined;
      const timeout = new Promise<void>((resolve) => {
        timer = setTimeout(resolve, late - performance.now());
      });
      await Promise.race([this.wake.promise, timeout]);
      clearTimeout(timer);
    }
  }

  /** What became of a stream: its final status, `reset <code>`, `goaway <code>`, `closed` or `silence`. */
  async outcome(stream: number, ms = 5_000): Promise<string> {
    const isFinal = (each: Frame) =>
      each.type === FRAME.HEADERS && each.stream === stream && !/^1/.test(statusOf(each));
    const found = await this.first(
      (each) =>
        isFinal(each) || (each.type === FRAME.RST_STREAM && each.stream === stream) || each.type === FRAME.GOAWAY,
      ms,
    );
    if (found === undefined) return this.isClosed ? 'closed' : 'silence';
    if (found.type === FRAME.HEADERS) return statusOf(found);
    if (found.type === FRAME.RST_STREAM) return `reset ${found.payload.readUInt32BE(0)}`;
    return `goaway ${found.payload.readUInt32BE(4)}`;
  }

  async closed(ms: number): Promise<boolean> {
    await this.first(() => false, ms);
    return this.isClosed;
  }

  destroy(): void {
    this.socket.destroy();
  }
}

const INDEXED: Readonly<Record<number, string>> = {
  136: '200',
  137: '204',
  138: '206',
  139: '304',
  140: '400',
  141: '404',
  142: '500',
};

/** `:status`, which comes first (RFC 7541 appendices A and B: three digits). */
export function statusOf({ payload }: Frame): string {
  let at = 0;
  while ((payload[at]! & 0xe0) === 0x20) at += 1;
  const indexed = INDEXED[payload[at]!];
  if (indexed !== undefined) return indexed;
  const length = payload[at + 1]!;
  const bytes = payload.subarray(at + 2, at + 2 + (length & 0x7f));
  if ((length & 0x80) === 0) return bytes.toString('latin1');
  const bits = [...bytes].map((byte) => byte.toString(2).padStart(8, '0')).join('');
  let digits = '';
  for (let i = 0; digits.length < 3 && i < bits.length; ) {
    const short = Number.parseInt(bits.slice(i, i + 5), 2);
    if (short < 3) {
      digits += String(short);
      i += 5;
    } else {
      digits += String(Number.parseInt(bits.slice(i, i + 6), 2) - 22);
      i += 6;
    }
  }
  return digits;
}
