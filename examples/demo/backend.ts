/** The services of one cluster: an HTTP and a gRPC backend on plain TCP, which only their kedge can reach. */
import http from 'node:http';
import type { AddressInfo } from 'node:net';
import * as grpc from '@grpc/grpc-js';
import { type Answer, GreeterService, type Greeting, type Hello } from '../grpc/greeter.ts';

const cluster = process.argv[2]!;

function answer(backend: string, client: unknown): Answer {
  return { cluster, backend, client: String(client) };
}

const server = http.createServer((request, response) => {
  if (request.url === '/download') {
    const from = answer('orders', request.headers['x-kedge-client-subject']);
    response.setHeader(
      'x-reply',
      JSON.stringify({ from, host: request.headers.host, bytes: 0, via: request.headers.via }),
    );
    const chunk = Buffer.alloc(64 * 1024, cluster);
    let left = 16;
    const write = () => {
      while (left > 0) {
        left -= 1;
        if (!response.write(chunk)) {
          response.once('drain', write);
          return;
        }
      }
      response.end();
    };
    write();
    return;
  }
  let bytes = 0;
  request.on('data', (chunk: Buffer) => {
    bytes += chunk.length;
  });
  request.on('end', () => {
    const from = answer('orders', request.headers['x-kedge-client-subject']);
    response.setHeader('content-type', 'application/json');
    // `Via` (RFC 9110 §7.6.3) says which protocol the kedge was spoken to in.
    response.end(JSON.stringify({ from, host: request.headers.host, bytes, via: request.headers.via ?? null }));
  });
});

const rpc = new grpc.Server();
const greet = ({ name }: Hello, metadata: grpc.Metadata): Greeting => ({
  text: `Hello ${name}, from ${cluster}`,
  from: answer('greeter', metadata.get('x-kedge-client-subject')[0]),
});
rpc.addService(GreeterService, {
  sayHello: (call: grpc.ServerUnaryCall<Hello, Greeting>, callback: grpc.sendUnaryData<Greeting>) =>
    callback(null, greet(call.request, call.metadata)),
  chat: (call: grpc.ServerDuplexStream<Hello, Greeting>) => {
    call.on('data', (hello: Hello) => call.write(greet(hello, call.metadata)));
    call.on('end', () => call.end());
  },
});

await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
const grpcPort = await new Promise<number>((resolve, reject) => {
  const credentials = grpc.ServerCredentials.createInsecure();
  rpc.bindAsync('127.0.0.1:0', credentials, (error, port) => (error === null ? resolve(port) : reject(error)));
});
console.log(JSON.stringify({ ready: true, httpPort: (server.address() as AddressInfo).port, grpcPort }));
