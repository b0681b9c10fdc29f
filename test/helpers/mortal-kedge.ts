import * as grpc from '@grpc/grpc-js';
import { echoService } from './grpc-kedge.ts';

/** A kedge in a process of its own, to be killed: it answers gRPC calls after a moment. */
process.once('message', ({ cert, key, ca, port }: { cert: string; key: string; ca: string; port: number }) => {
  const server = new grpc.Server();
  server.addService({ unary: echoService('test.Echo').unary } as grpc.ServiceDefinition, {
    unary: (call: grpc.ServerUnaryCall<{ text: string }, { text: string }>, done: grpc.sendUnaryData<unknown>) => {
      setTimeout(() => done(null, { text: call.request.text }), Math.random() * 30);
    },
  });
  const pair = { private_key: Buffer.from(key), cert_chain: Buffer.from(cert) };
  const credentials = grpc.ServerCredentials.createSsl(Buffer.from(ca), [pair], true);
  server.bindAsync(`127.0.0.1:${port}`, credentials, (_error, bound) => process.send!({ port: bound }));
});
