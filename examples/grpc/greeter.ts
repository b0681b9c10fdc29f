/**
 * A service as a code generator would give it, with JSON in place of protobuf so that the examples need no build step.
 */
import * as grpc from '@grpc/grpc-js';

export interface Hello {
  name: string;
}

export interface Greeting {
  text: string;
  /** What answered, for the demo. */
  from: Answer;
}

/** Who answered a call, and what the kedge told it about the caller. */
export interface Answer {
  cluster: string;
  backend: string;
  /** The client certificate's subject, as the kedge saw it. */
  client: string;
}

const serialize = (value: object) => Buffer.from(JSON.stringify(value));
const deserialize = (bytes: Buffer) => JSON.parse(bytes.toString());
const codec = {
  requestSerialize: serialize,
  requestDeserialize: deserialize,
  responseSerialize: serialize,
  responseDeserialize: deserialize,
};

export const GreeterService = {
  sayHello: { path: '/demo.Greeter/SayHello', requestStream: false, responseStream: false, ...codec },
  chat: { path: '/demo.Greeter/Chat', requestStream: true, responseStream: true, ...codec },
};

export interface GreeterClient extends grpc.Client {
  sayHello(request: Hello, callback: (error: grpc.ServiceError | null, reply?: Greeting) => void): grpc.ClientUnaryCall;
  chat(): grpc.ClientDuplexStream<Hello, Greeting>;
}

export const GreeterClient = grpc.makeGenericClientConstructor(GreeterService, 'demo.Greeter') as unknown as {
  new (address: string, credentials: grpc.ChannelCredentials, options?: Partial<grpc.ClientOptions>): GreeterClient;
};
