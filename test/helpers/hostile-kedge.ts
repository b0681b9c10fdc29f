/**
 * A kedge in a process of its own that fails in one way: `node hostile-kedge.ts <fault> <files as JSON>`. Where the fault comes
 * after the request was passed on, the backend has executed it, as with a real kedge.
 */
import { readFileSync } from 'node:fs';
import http from 'node:http';
import http2 from 'node:http2';
import type { AddressInfo, Socket } from 'node:net';
import tls from 'node:tls';

export type Fault =
  | 'tls-stall'
  | 'wrong-certificate'
  | 'refused-stream'
  | 'goaway'
  | 'reset-before-headers'
  | 'reset-mid-body';

export interface HostileFiles {
  cert: string;
  key: string;
  ca: string;
  /** The backend's port. */
  backend: number;
}

const [fault, json] = process.argv.slice(2) as [Fault, string];
const files = JSON.parse(json) as HostileFiles;

function pass(id: string): Promise<void> {
  return new Promise((resolve) => {
    const options = { host: '127.0.0.1', port: files.backend, headers: { 'x-id': id } };
    http.get(options, (response) => response.resume().on('end', resolve)).on('error', () => resolve());
  });
}

async function serve(
  request: http.IncomingMessage | http2.Http2ServerRequest,
  response: http.ServerResponse | http2.Http2ServerResponse,
) {
  request.on('error', () => {});
  const stream = request instanceof http.IncomingMessage ? undefined : request.stream;
  if (fault === 'refused-stream' && stream !== undefined) {
    stream.close(http2.constants.NGHTTP2_REFUSED_STREAM);
    return;
  }
  if (fault === 'goaway' && stream !== undefined) {
    if (stream.id !== 1) return;
    const id = String(request.headers['x-id']);
    await pass(id);
    response.end(id);
    // "The first was all that I processed", and the end of the connection.
    stream.session!.goaway(http2.constants.NGHTTP2_NO_ERROR, 1);
    setTimeout(() => stream.session?.destroy(), 50);
    return;
  }
  // Not those of a later dialer, which this must not meet while it dials.
  const open = [...sockets];
  await pass(String(request.headers['x-id']));
  if (fault === 'reset-mid-body') {
    response.setHeader('content-length', '1000');
    (response as NodeJS.WritableStream).write('part');
    await new Promise((resolve) => setTimeout(resolve, 300));
  }
  for (const each of open) each.resetAndDestroy();
}

const sockets = new Set<Socket>();
const h1 = http.createServer(serve);
const h2 = http2.createServer(serve);
h2.on('session', (session) => session.on('error', () => {}));
const server = tls.createServer(
  {
    cert: readFileSync(files.cert),
    key: readFileSync(files.key),
    ca: readFileSync(files.ca),
    requestCert: true,
    ALPNProtocols: ['h2', 'http/1.1'],
  },
  (socket) => {
    socket.on('error', () => {});
    (socket.alpnProtocol === 'h2' ? h2 : h1).emit('connection', socket);
  },
);
if (fault === 'tls-stall') server.removeAllListeners('connection');
server.on('connection', (socket: Socket) => {
  sockets.add(socket);
  socket.on('close', () => sockets.delete(socket));
});
server.on('tlsClientError', () => {});
server.listen(0, '127.0.0.1', () => console.log(JSON.stringify({ port: (server.address() as AddressInfo).port })));
