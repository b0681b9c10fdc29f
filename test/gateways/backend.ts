/** What stands behind the gateways: HTTP and gRPC, with a ledger of what was executed how often. Prints its ports. */
import http from 'node:http';
import type { AddressInfo } from 'node:net';
import * as grpc from '@grpc/grpc-js';
import { echoService } from '../helpers/grpc-kedge.ts';

const TICK_MS = 200;
const ledger = new Map<string, number>();

const server = http.createServer((request, response) => {
  const url = new URL(request.url!, 'http://backend');
  if (url.pathname === '/ledger') {
    response.end(JSON.stringify(Object.fromEntries(ledger)));
    return;
  }
  const id = request.headers['x-id'];
  if (typeof id === 'string') ledger.set(id, (ledger.get(id) ?? 0) + 1);
  if (url.pathname === '/early') {
    response.writeHead(413).end('too large');
    request.resume();
  } else if (url.pathname === '/reset') request.socket.resetAndDestroy();
  else if (url.pathname === '/events') {
    response.writeHead(200, { 'content-type': 'text/event-stream' });
    tick(
      Number(url.searchParams.get('count')),
      (text) => response.write(`data: ${text}\n\n`),
      () => response.end(),
    );
  } else
    request.resume().on('end', () => setTimeout(() => response.end('ok'), Number(url.searchParams.get('ms') ?? 0)));
});
server.keepAliveTimeout = 120_000;
server.requestTimeout = 0;

const rpc = new grpc.Server();
rpc.addService(echoService('test.Echo'), {
  unary: (call: grpc.ServerUnaryCall<{ text: string }, object>, done: grpc.sendUnaryData<object>) => {
    ledger.set(call.request.text, (ledger.get(call.request.text) ?? 0) + 1);
    done(null, { text: call.request.text });
  },
  serverStream: (call: grpc.ServerWritableStream<{ text: string }, object>) =>
    tick(
      Number(call.request.text),
      (text) => call.write({ text }),
      () => call.end(),
    ),
} as grpc.UntypedServiceImplementation);

function tick(count: number, write: (text: string) => void, end: () => void): void {
  let sent = 0;
  const timer = setInterval(() => {
    sent += 1;
    write(String(sent));
    if (sent < count) return;
    clearInterval(timer);
    end();
  }, TICK_MS);
}

await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
const grpcPort = await new Promise<number>((resolve, reject) => {
  const credentials = grpc.ServerCredentials.createInsecure();
  rpc.bindAsync('127.0.0.1:0', credentials, (error, port) => (error === null ? resolve(port) : reject(error)));
});
console.log(JSON.stringify({ http: (server.address() as AddressInfo).port, grpc: grpcPort }));
