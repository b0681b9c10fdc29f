import { create, createFileRegistry, type DescService, type MessageShape } from '@bufbuild/protobuf';
import {
  FileDescriptorProtoSchema,
  FileDescriptorSetSchema,
  file_google_protobuf_wrappers,
  type StringValueSchema,
} from '@bufbuild/protobuf/wkt';
import { createClient, type Transport } from '@connectrpc/connect';

const TEXT = '.google.protobuf.StringValue';

/** What protobuf-es generates from a `.proto`, made here from the descriptor. */
export const Greeter = createFileRegistry(
  create(FileDescriptorSetSchema, {
    file: [
      file_google_protobuf_wrappers.proto,
      create(FileDescriptorProtoSchema, {
        name: 'greeter.proto',
        package: 'test',
        syntax: 'proto3',
        dependency: ['google/protobuf/wrappers.proto'],
        service: [
          {
            name: 'Greeter',
            method: [
              { name: 'Unary', inputType: TEXT, outputType: TEXT },
              { name: 'Down', inputType: TEXT, outputType: TEXT, serverStreaming: true },
              { name: 'Up', inputType: TEXT, outputType: TEXT, clientStreaming: true },
              { name: 'Both', inputType: TEXT, outputType: TEXT, clientStreaming: true, serverStreaming: true },
            ],
          },
        ],
      }),
    ],
  }),
).getService('test.Greeter') as DescService;

export type Text = MessageShape<typeof StringValueSchema>;
/** The four call kinds; the types of a descriptor made at run time know of none. */
export interface GreeterClient {
  unary(request: { value: string }, options?: object): Promise<Text>;
  down(request: { value: string }, options?: object): AsyncIterable<Text>;
  up(requests: AsyncIterable<{ value: string }>): Promise<Text>;
  both(requests: AsyncIterable<{ value: string }>): AsyncIterable<Text>;
}

export function greeterClient(transport: Transport): GreeterClient {
  return createClient(Greeter, transport) as unknown as GreeterClient;
}
