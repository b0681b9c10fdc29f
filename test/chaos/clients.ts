import { create, createFileRegistry, type DescService, fromJson, toJson } from '@bufbuild/protobuf';
import {
  FileDescriptorProtoSchema,
  FileDescriptorSetSchema,
  file_google_protobuf_struct,
  type Struct,
  StructSchema,
} from '@bufbuild/protobuf/wkt';
import { createClient } from '@connectrpc/connect';
import { createConnectTransport } from '@connectrpc/connect-node';
import { type ClientOptions, Metadata } from '@grpc/grpc-js';
import type { Dispatcher } from 'undici';
import { connectDialer } from '../../src/connect/index.ts';
import { grpcDialer } from '../../src/grpc/index.ts';
import type { Dialer } from '../../src/index.ts';
import { type EchoClient, echoClient } from '../helpers/grpc-kedge.ts';
import { type Answer, ID, PAD } from './backend.ts';
import type { Call } from './load.ts';

export type Wire = 'h1' | 'h2' | 'grpc' | 'connect';

/** Sends calls over one wire, and says when each has ended: as often as it is told. */
export interface Client {
  readonly wire: Wire;
  send(call: Call, settled: () => void): void;
}

export interface HttpCallOptions {
  /** Bytes of the answer besides the echo. */
  pad?: number;
  path?: string;
  headersTimeout?: number;
  bodyTimeout?: number;
}

type Dispatch = Pick<Dispatcher, 'dispatch'>;

/** Below undici's own API, so that a second end of a call, or a second beginning of its answer, does not go unseen. */
export function httpClient(wire: 'h1' | 'h2', dispatcher: Dispatch, options: HttpCallOptions = {}): Client {
  return {
    wire,
    send: (call, settled) => {
      const { pad = 0, path = '/', ...timeouts } = options;
      const body = call.method === 'GET' ? '' : `body of ${call.id}`;
      const chunks: Buffer[] = [];
      let beginnings = 0;
      const handler: Dispatcher.DispatchHandler = {
        onRequestStart: () => {},
        onResponseStart: (_controller, status) => {
          if (status < 200) return;
          beginnings += 1;
          call.status = status;
          call.begun = true;
        },
        onResponseData: (_controller, chunk) => {
          chunks.push(chunk);
        },
        onResponseEnd: () => {
          const text = Buffer.concat(chunks).toString();
          if (call.status === 200) {
            call.crossed ||= beginnings !== 1 || !isAnswer(text, call, body, pad);
            call.ok = !call.crossed;
          } else call.error = new Error(`status ${call.status}: ${text}`);
          settled();
        },
        onResponseError: (_controller, error) => {
          call.error = error;
          settled();
        },
      };
      const headers = { [ID]: call.id, ...(pad > 0 ? { [PAD]: String(pad) } : {}) };
      const request = { origin: `http://${call.host}`, path, method: call.method as 'GET', headers, ...timeouts };
      dispatcher.dispatch(body === '' ? request : { ...request, body }, handler);
    },
  };
}

/** A truncated answer is no answer either. */
function isAnswer(text: string, call: Call, body: string, pad: number): boolean {
  try {
    const answer = JSON.parse(text) as Answer;
    return answer.id === call.id && answer.host === call.host && answer.body === body && answer.pad.length === pad;
  } catch {
    return false;
  }
}

const RETRIES = {
  methodConfig: [
    {
      name: [{}],
      retryPolicy: {
        maxAttempts: 3,
        initialBackoff: '0.05s',
        maxBackoff: '0.5s',
        backoffMultiplier: 2,
        retryableStatusCodes: ['UNAVAILABLE'],
      },
    },
  ],
};
const DEADLINE_MS = 30_000;

/** Two clients for each host: one retries by its service config, the other never does. */
export function grpcClient(dialer: Dialer, { deadlineMs = DEADLINE_MS }: { deadlineMs?: number } = {}): Client {
  const Echo = grpcDialer(dialer).wrap(echoClient());
  const clients = new Map<string, EchoClient>();
  const clientOf = ({ host, method }: Call): EchoClient => {
    const key = `${method} ${host}`;
    let client = clients.get(key);
    if (client === undefined) {
      const options: ClientOptions = method === 'RETRIED' ? { 'grpc.service_config': JSON.stringify(RETRIES) } : {};
      client = new Echo(host, undefined, options);
      clients.set(key, client);
    }
    return client;
  };
  return {
    wire: 'grpc',
    send: (call, settled) => {
      const metadata = new Metadata();
      metadata.set(ID, call.id);
      const fail = (error: unknown) => {
        call.error = error;
        settled();
      };
      try {
        const deadline = Date.now() + deadlineMs;
        const stream = clientOf(call).unary({ text: call.id }, metadata, { deadline }, (error, reply) => {
          if (error !== null) return fail(error);
          call.crossed = reply?.text !== call.id || reply.authority !== call.host;
          call.ok = !call.crossed;
          settled();
        });
        stream.on('metadata', () => {
          call.begun = true;
        });
      } catch (error) {
        fail(error);
      }
    },
  };
}

const STRUCT = '.google.protobuf.Struct';

/** A method that takes and gives any JSON object, which is what every backend here answers with. */
const Objects = createFileRegistry(
  create(FileDescriptorSetSchema, {
    file: [
      file_google_protobuf_struct.proto,
      create(FileDescriptorProtoSchema, {
        name: 'objects.proto',
        package: 'chaos',
        syntax: 'proto3',
        dependency: ['google/protobuf/struct.proto'],
        service: [{ name: 'Objects', method: [{ name: 'Echo', inputType: STRUCT, outputType: STRUCT }] }],
      }),
    ],
  }),
).getService('chaos.Objects') as DescService;

interface ObjectsClient {
  echo(request: Struct, options: object): Promise<Struct>;
}

/** connect-es with its own protocol over HTTP/2. */
export function connectClient(dialer: Dialer): Client {
  const clients = new Map<string, ObjectsClient>();
  const clientOf = (host: string): ObjectsClient => {
    let client = clients.get(host);
    if (client === undefined) {
      const baseUrl = `http://${host}`;
      const sessionManager = connectDialer(dialer).sessionManager(baseUrl);
      const transport = createConnectTransport({ baseUrl, httpVersion: '2', useBinaryFormat: false, sessionManager });
      client = createClient(Objects, transport) as unknown as ObjectsClient;
      clients.set(host, client);
    }
    return client;
  };
  return {
    wire: 'connect',
    send: async (call, settled) => {
      try {
        const request = { id: call.id };
        const options = { headers: { [ID]: call.id }, timeoutMs: DEADLINE_MS };
        const reply = await clientOf(call.host).echo(fromJson(StructSchema, request), options);
        call.crossed = !isAnswer(JSON.stringify(toJson(StructSchema, reply)), call, JSON.stringify(request), 0);
        call.ok = !call.crossed;
      } catch (error) {
        call.error = error;
      }
      settled();
    },
  };
}
