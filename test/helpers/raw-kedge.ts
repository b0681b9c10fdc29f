import type { AddressInfo, Socket } from 'node:net';
import type { TestContext } from 'node:test';
import tls from 'node:tls';
import { authority, KEDGE_NAME } from './kedge.ts';

/** An HTTP/2 frame (RFC 9113 §4.1). */
export function frame(type: number, flags: number, stream: number, payload: Buffer = Buffer.alloc(0)): Buffer {
  const head = Buffer.alloc(9);
  head.writeUIntBE(payload.length, 0, 3);
  head[3] = type;
  head[4] = flags;
  head.writeUInt32BE(stream, 5);
  return Buffer.concat([head, payload]);
}

export const SETTINGS = frame(4, 0, 0);

export function goaway(lastStream: number, code: number): Buffer {
  const payload = Buffer.alloc(8);
  payload.writeUInt32BE(lastStream, 0);
  payload.writeUInt32BE(code, 4);
  return frame(7, 0, 0, payload);
}

const PREFACE_BYTES = 24;

/** Calls back for each frame that a client sends after its preface, with type and stream. */
export function onFrames(socket: tls.TLSSocket, each: (type: number, stream: number, flags: number) => void): void {
  let rest = Buffer.alloc(0);
  let skip = PREFACE_BYTES;
  socket.on('data', (chunk: Buffer) => {
    rest = Buffer.concat([rest, chunk]);
    while (rest.length >= skip + 9) {
      const end = skip + 9 + rest.readUIntBE(skip, 3);
      if (rest.length < end) return;
      each(rest[skip + 3]!, rest.readUInt32BE(skip + 5), rest[skip + 4]!);
      rest = rest.subarray(end);
      skip = 0;
    }
  });
}

export interface RawKedge {
  readonly url: string;
  readonly connections: number;
}

/** A kedge that is given over byte by byte after TLS, for what no HTTP library can be made to send. */
export async function startRawKedge(
  t: TestContext,
  alpn: 'h2' | 'http/1.1',
  serve: (socket: tls.TLSSocket, tcp: Socket) => void,
): Promise<RawKedge> {
  const ca = await authority();
  const { cert, key } = await ca.issue({ cn: KEDGE_NAME, dns: [KEDGE_NAME] });
  const tcp = new Map<number | undefined, Socket>();
  let connections = 0;
  const server = tls.createServer({ cert, key, ALPNProtocols: [alpn] }, (socket) => {
    connections += 1;
    socket.on('error', () => {});
    serve(socket, tcp.get(socket.remotePort)!);
  });
  server.on('tlsClientError', () => {});
  server.on('connection', (socket) => {
    const { remotePort } = socket;
    tcp.set(remotePort, socket);
    socket.on('close', () => tcp.delete(remotePort));
  });
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
  t.after(() => {
    server.close();
    for (const socket of tcp.values()) socket.destroy();
  });
  const { port } = server.address() as AddressInfo;
  return {
    url: `https://127.0.0.1:${port}`,
    get connections() {
      return connections;
    },
  };
}
