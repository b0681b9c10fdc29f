import type { TestContext } from 'node:test';
import * as grpc from '@grpc/grpc-js';
import { startKedge, type TestKedge, type TestKedgeOptions } from './kedge.ts';

/** What the kedge saw of one call. */
export interface SeenCall {
  service: string;
  path: string;
  authority: string;
  metadata: grpc.Metadata;
  /** The client certificate of the connection that it came on. */
  clientSubject: string;
  clientSerial: string;
}

export interface Echo {
  text: string;
  authority: string;
}

const json = (value: unknown) => Buffer.from(JSON.stringify(value));
const parse = (buffer: Buffer) => JSON.parse(buffer.toString());
const method = (service: string, name: string, requestStream: boolean, responseStream: boolean) => ({
  path: `/${service}/${name}`,
  requestStream,
  responseStream,
  requestSerialize: json,
  requestDeserialize: parse,
  responseSerialize: json,
  responseDeserialize: parse,
});

/** An echo service of any name, with the four call kinds. */
export function echoService(name: string) {
  return {
    unary: method(name, 'Unary', false, false),
    clientStream: method(name, 'ClientStream', true, false),
    serverStream: method(name, 'ServerStream', false, true),
    bidi: method(name, 'Bidi', true, true),
  };
}

type Callback = (error: grpc.ServiceError | null, reply?: Echo) => void;

/** What a generated client of {@link echoService} looks like. */
export interface EchoClient extends grpc.Client {
  unary(request: { text: string }, callback: Callback): grpc.ClientUnaryCall;
  unary(request: { text: string }, metadata: grpc.Metadata, callback: Callback): grpc.ClientUnaryCall;
  unary(
    request: { text: string },
    metadata: grpc.Metadata,
    options: Partial<grpc.CallOptions>,
    callback: Callback,
  ): grpc.ClientUnaryCall;
  clientStream(metadata: grpc.Metadata, callback: Callback): grpc.ClientWritableStream<{ text: string }>;
  serverStream(request: { text: string }, metadata?: grpc.Metadata): grpc.ClientReadableStream<Echo>;
  bidi(metadata?: grpc.Metadata): grpc.ClientDuplexStream<{ text: string }, Echo>;
}

export interface EchoClientConstructor {
  new (address: string, credentials: grpc.ChannelCredentials, options?: Partial<grpc.ClientOptions>): EchoClient;
  readonly service: ReturnType<typeof echoService>;
}

export function echoClient(name = 'test.Echo'): EchoClientConstructor {
  return grpc.makeGenericClientConstructor(echoService(name), name) as unknown as EchoClientConstructor;
}

export interface GrpcKedge extends TestKedge {
  readonly calls: SeenCall[];
  readonly server: grpc.Server;
}

export interface GrpcKedgeOptions extends TestKedgeOptions, GrpcServerOptions {}

export interface GrpcServerOptions {
  /** Names of the echo services. Default: `test.Echo`. */
  services?: readonly string[];
  server?: grpc.ServerOptions;
  /** Replaces the answer to unary calls. */
  unary?: grpc.handleUnaryCall<{ text: string }, Echo>;
  /** Adds services of the test's own. */
  addServices?: (server: grpc.Server) => void;
}

function echoServer(options: GrpcServerOptions, calls: SeenCall[]): grpc.Server {
  const server = new grpc.Server({ 'grpc.max_receive_message_length': -1, ...options.server });
  for (const service of options.services ?? ['test.Echo']) {
    const see = (call: grpc.ServerUnaryCall<unknown, unknown> | grpc.ServerDuplexStream<unknown, unknown>) => {
      const certificate = call.getAuthContext().sslPeerCertificate;
      calls.push({
        service,
        path: call.getPath(),
        authority: call.getHost(),
        metadata: call.metadata,
        clientSubject: String(certificate?.subject.CN),
        clientSerial: String(certificate?.serialNumber),
      });
      return call.getHost();
    };
    server.addService(echoService(service), {
      unary: (call: grpc.ServerUnaryCall<{ text: string }, Echo>, callback: grpc.sendUnaryData<Echo>) => {
        const authority = see(call as never);
        if (options.unary !== undefined) options.unary(call, callback);
        else callback(null, { text: call.request.text, authority });
      },
      clientStream: (call: grpc.ServerReadableStream<{ text: string }, Echo>, callback: grpc.sendUnaryData<Echo>) => {
        const authority = see(call as never);
        let text = '';
        call.on('data', (message: { text: string }) => {
          text += message.text;
        });
        call.on('end', () => callback(null, { text, authority }));
      },
      serverStream: (call: grpc.ServerWritableStream<{ text: string }, Echo>) => {
        const authority = see(call as never);
        for (const text of call.request.text) call.write({ text, authority });
        call.end();
      },
      bidi: (call: grpc.ServerDuplexStream<{ text: string }, Echo>) => {
        const authority = see(call as never);
        call.on('data', (message: { text: string }) => call.write({ text: message.text, authority }));
        call.on('end', () => call.end());
      },
    } as grpc.UntypedServiceImplementation);
  }
  options.addServices?.(server);
  return server;
}

/** The echo server on a plain port, as a backend behind a kedge. */
export async function startEchoServer(
  t: TestContext,
  options: GrpcServerOptions = {},
): Promise<{ port: number; calls: SeenCall[] }> {
  const calls: SeenCall[] = [];
  const server = echoServer(options, calls);
  t.after(() => server.forceShutdown());
  const port = await new Promise<number>((resolve, reject) => {
    const credentials = grpc.ServerCredentials.createInsecure();
    server.bindAsync('127.0.0.1:0', credentials, (error, bound) => (error === null ? resolve(bound) : reject(error)));
  });
  return { port, calls };
}

/** A kedge whose HTTP/2 connections are served by grpc-js itself. */
export async function startGrpcKedge(t: TestContext, options: GrpcKedgeOptions = {}): Promise<GrpcKedge> {
  const calls: SeenCall[] = [];
  const server = echoServer(options, calls);
  const injector = server.createConnectionInjector(grpc.ServerCredentials.createInsecure());
  const kedge = await startKedge(t, {
    ...options,
    onH2: (socket) => injector.injectConnection(socket),
  });
  t.after(() => server.forceShutdown());
  return Object.defineProperties(kedge, Object.getOwnPropertyDescriptors({ calls, server })) as GrpcKedge;
}

/** A unary call as a promise. */
export function unary(
  client: EchoClient,
  text: string,
  metadata = new grpc.Metadata(),
  options: Partial<grpc.CallOptions> = {},
): Promise<Echo> {
  return new Promise((resolve, reject) => {
    client.unary({ text }, metadata, options, (error, reply) => (error === null ? resolve(reply!) : reject(error)));
  });
}
