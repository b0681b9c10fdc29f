/** The other end of the benchmarks, in a process of its own: a TLS server that plays a kedge, and a relay with distance. */
import http from 'node:http';
import http2 from 'node:http2';
import net, { type AddressInfo } from 'node:net';
import tls from 'node:tls';
import * as grpc from '@grpc/grpc-js';
import { createAuthority } from '../../examples/pki.ts';
import { echoService } from '../helpers/grpc-kedge.ts';

const ROUND_TRIP_MS = 50;
const NAME = 'us1.kedge.test';
const blob = Buffer.alloc(8 * 1024 * 1024, 'b');

const ca = await createAuthority('bench CA');
const [server, client] = await Promise.all([ca.issue({ cn: NAME, dns: [NAME, 'localhost'] }), ca.issue({ cn: 'pod' })]);

const answer = (
  request: http.IncomingMessage | http2.Http2ServerRequest,
  response: http.ServerResponse | http2.Http2ServerResponse,
) => {
  if (request.url === '/blob') {
    response.end(blob);
    return;
  }
  request.resume();
  request.on('end', () => response.end('ok'));
};
const h1 = http.createServer({ keepAliveTimeout: 60_000 }, answer);
// The blobs wait in memory here; a kedge streams them.
const h2 = http2.createServer(
  { maxSessionMemory: 1000, settings: { maxConcurrentStreams: 1000, initialWindowSize: 1024 * 1024 } },
  answer,
);
h2.on('session', (session) => session.setLocalWindowSize(16 * 1024 * 1024));

const rpc = new grpc.Server();
for (let i = 0; i < 20; i += 1) {
  rpc.addService(echoService(`svc${i}.Echo`), {
    unary: (call: grpc.ServerUnaryCall<{ text: string }, unknown>, callback: grpc.sendUnaryData<unknown>) =>
      callback(null, { text: call.request.text === 'blob' ? 'x'.repeat(2 * 1024 * 1024) : 'ok' }),
    bidi: (call: grpc.ServerDuplexStream<unknown, unknown>) => {
      call.on('data', (message) => call.write(message));
      call.on('end', () => call.end());
    },
  } as grpc.UntypedServiceImplementation);
}
const injector = rpc.createConnectionInjector(grpc.ServerCredentials.createInsecure());

let handshakes = 0;
async function listen(serve: (socket: tls.TLSSocket) => void): Promise<number> {
  const options = {
    cert: server.cert,
    key: server.key,
    ca: ca.cert,
    requestCert: true,
    rejectUnauthorized: false,
    ALPNProtocols: ['h2', 'http/1.1'],
  };
  const listener = tls.createServer(options, (socket) => {
    handshakes += 1;
    socket.on('error', () => {});
    socket.setNoDelay(true);
    serve(socket);
  });
  await new Promise<void>((resolve) => listener.listen(0, '127.0.0.1', resolve));
  return (listener.address() as AddressInfo).port;
}

/** Delays what passes by half a round trip each way, and limits nothing. */
async function relay(to: number): Promise<number> {
  const listener = net.createServer((near) => {
    const far = net.connect(to, '127.0.0.1');
    for (const [from, into] of [
      [near, far],
      [far, near],
    ] as const) {
      from.setNoDelay(true);
      from.on('data', (data) => setTimeout(() => into.writable && into.write(data), ROUND_TRIP_MS / 2));
      from.on('close', () => setTimeout(() => into.destroy(), ROUND_TRIP_MS));
      from.on('error', () => {});
    }
  });
  await new Promise<void>((resolve) => listener.listen(0, '127.0.0.1', resolve));
  return (listener.address() as AddressInfo).port;
}

const httpPort = await listen((socket) => (socket.alpnProtocol === 'h2' ? h2 : h1).emit('connection', socket));
const grpcPort = await listen((socket) => injector.injectConnection(socket));
const plain = http.createServer({ keepAliveTimeout: 60_000 }, answer);
await new Promise<void>((resolve) => plain.listen(0, '127.0.0.1', resolve));
process.on('message', () => process.send!({ handshakes }));
process.on('disconnect', () => process.exit());
process.send!({
  httpPort,
  grpcPort,
  farHttpPort: await relay(httpPort),
  farGrpcPort: await relay(grpcPort),
  plainPort: (plain.address() as AddressInfo).port,
  kedgeCert: server.cert,
  kedgeKey: server.key,
  ca: ca.cert,
  cert: client.cert,
  key: client.key,
});
