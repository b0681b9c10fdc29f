import assert from 'node:assert/strict';
import { once } from 'node:events';
import { describe, it, type TestContext } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import * as grpc from '@grpc/grpc-js';
import { grpcDialer } from '../../src/grpc/index.ts';
import { createDialer, pem, single } from '../../src/index.ts';
import { authority, KEDGE_NAME } from '../helpers/kedge.ts';
import { startReferenceKedge } from '../helpers/reference-kedge.ts';

const ADDRESS = 'matrix.us1:9090';
const bytes = (value: Buffer) => value;
const codec = {
  requestSerialize: bytes,
  requestDeserialize: bytes,
  responseSerialize: bytes,
  responseDeserialize: bytes,
};
const method = (name: string, requestStream: boolean, responseStream: boolean) => ({
  path: `/test.Matrix/${name}`,
  requestStream,
  responseStream,
  ...codec,
});
const service = {
  unary: method('Unary', false, false),
  clientStream: method('ClientStream', true, false),
  serverStream: method('ServerStream', false, true),
  bidi: method('Bidi', true, true),
};
type Kind = keyof typeof service;

interface MatrixClient extends grpc.Client {
  unary(request: Buffer, metadata: grpc.Metadata, options: grpc.CallOptions, done: Done): grpc.ClientUnaryCall;
  clientStream(metadata: grpc.Metadata, options: grpc.CallOptions, done: Done): grpc.ClientWritableStream<Buffer>;
  serverStream(request: Buffer, metadata: grpc.Metadata, options: grpc.CallOptions): grpc.ClientReadableStream<Buffer>;
  bidi(metadata: grpc.Metadata, options: grpc.CallOptions): grpc.ClientDuplexStream<Buffer, Buffer>;
}
type Done = (error: grpc.ServiceError | null, reply?: Buffer) => void;
const MatrixClient = grpc.makeGenericClientConstructor(service, 'test.Matrix') as unknown as {
  new (address: string, credentials: grpc.ChannelCredentials, options?: Partial<grpc.ClientOptions>): MatrixClient;
};

/** What the server is told to do, in the metadata of the call. */
type Order = 'echo' | 'hang' | 'fail' | 'cancel';

interface Outcome {
  replies: Buffer[];
  status: grpc.StatusObject;
  initial: grpc.Metadata | undefined;
}

/** One call of any kind, to its status; `requests` are sent, `onReply` may slow the reading. */
async function call(
  client: MatrixClient,
  kind: Kind,
  order: Order,
  requests: Buffer[],
  {
    metadata = new grpc.Metadata(),
    onReply,
    onCall,
    ...options
  }: grpc.CallOptions & {
    metadata?: grpc.Metadata;
    onReply?: () => Promise<unknown>;
    onCall?: (call: grpc.ClientUnaryCall) => void;
  } = {},
): Promise<Outcome> {
  metadata.set('order', order);
  const replies: Buffer[] = [];
  let initial: grpc.Metadata | undefined;
  const done: Done = (_error, reply) => void (reply !== undefined && replies.push(reply));
  const made =
    kind === 'unary'
      ? client.unary(requests[0]!, metadata, options, done)
      : kind === 'clientStream'
        ? client.clientStream(metadata, options, done)
        : kind === 'serverStream'
          ? client.serverStream(requests[0]!, metadata, options)
          : client.bidi(metadata, options);
  made.on('metadata', (received: grpc.Metadata) => {
    initial = received;
  });
  const ended = new Promise<grpc.StatusObject>((resolve) => made.once('status', resolve));
  made.on('error', () => {});
  onCall?.(made as grpc.ClientUnaryCall);
  const reading = (async () => {
    if (kind !== 'serverStream' && kind !== 'bidi') return;
    try {
      for await (const reply of made as grpc.ClientReadableStream<Buffer>) {
        replies.push(reply as Buffer);
        await onReply?.();
      }
    } catch {
      // The status says it.
    }
  })();
  if (kind === 'clientStream' || kind === 'bidi') {
    const writer = made as grpc.ClientWritableStream<Buffer>;
    for (const request of requests)
      if (!writer.write(request)) await Promise.race([once(writer, 'drain').catch(() => {}), ended]);
    writer.end();
  }
  const status = await ended;
  await reading;
  return { replies, status, initial };
}

type AnyCall = grpc.ServerUnaryCall<Buffer, Buffer> & grpc.ServerDuplexStream<Buffer, Buffer>;

/** Does what the order says; true where the call is dealt with. */
function obey(call: AnyCall, done?: grpc.sendUnaryData<Buffer>): boolean {
  const order = call.metadata.get('order')[0] as Order;
  const echoed = new grpc.Metadata();
  for (const value of call.metadata.get('echo-bin')) echoed.add('echo-bin', value);
  if (order !== 'hang') call.sendMetadata(echoed);
  if (order === 'hang') return true;
  if (order === 'echo') return false;
  const error = {
    code: order === 'fail' ? grpc.status.FAILED_PRECONDITION : grpc.status.CANCELLED,
    details: order === 'fail' ? 'not today' : 'enough',
    metadata: echoed,
  };
  if (done !== undefined) done(error);
  else call.emit('error', error);
  return true;
}

async function setUp(t: TestContext, through: 'reference kedge' | 'grpc-js itself'): Promise<MatrixClient> {
  const unlimited = { 'grpc.max_receive_message_length': -1, 'grpc.max_send_message_length': -1 };
  const server = new grpc.Server(unlimited);
  server.addService(service, {
    unary: (call: AnyCall, done: grpc.sendUnaryData<Buffer>) => void (obey(call, done) || done(null, call.request)),
    clientStream: (call: AnyCall, done: grpc.sendUnaryData<Buffer>) => {
      if (obey(call, done)) return;
      const chunks: Buffer[] = [];
      call.on('data', (chunk: Buffer) => chunks.push(chunk));
      call.on('end', () => done(null, Buffer.concat(chunks)));
    },
    serverStream: async (call: AnyCall) => {
      if (obey(call)) return;
      // The first four bytes say how many replies; the rest is the reply.
      const count = call.request.readUInt32BE(0);
      for (let i = 0; i < count; i += 1) if (!call.write(call.request.subarray(4))) await once(call, 'drain');
      call.end();
    },
    bidi: (call: AnyCall) => {
      if (obey(call)) return;
      call.pipe(call as unknown as NodeJS.WritableStream);
    },
  } as never);
  const ca = await authority();
  const [certificate, client] = await Promise.all([
    ca.issue({ cn: KEDGE_NAME, dns: [KEDGE_NAME] }),
    ca.issue({ cn: 'pod' }),
  ]);
  const bind = (credentials: grpc.ServerCredentials) =>
    new Promise<number>((resolve, reject) => {
      server.bindAsync('127.0.0.1:0', credentials, (error, port) => (error === null ? resolve(port) : reject(error)));
    });
  t.after(() => server.forceShutdown());
  let port: number;
  if (through === 'grpc-js itself') {
    const pair = { cert_chain: Buffer.from(certificate.cert), private_key: Buffer.from(certificate.key) };
    port = await bind(grpc.ServerCredentials.createSsl(Buffer.from(ca.cert), [pair], true));
  } else {
    const backends = [
      { name: 'matrix', host: { dns_name: '127.0.0.1', port: await bind(grpc.ServerCredentials.createInsecure()) } },
    ];
    const { kedge } = await startReferenceKedge(t, {
      director: { grpc: { routes: [{ backend_name: 'matrix' }] } },
      backendPool: { grpc: { backends } },
    });
    port = kedge.port;
  }
  const dialer = createDialer({
    mapper: single({ kedge: `https://127.0.0.1:${port}`, serverName: KEDGE_NAME }),
    identity: pem({ cert: client.cert, key: client.key, ca: ca.cert }),
  });
  t.after(() => dialer.destroy());
  return new (grpcDialer(dialer).wrap(MatrixClient))(ADDRESS, undefined, unlimited);
}

const counted = (count: number, reply: Buffer) => {
  const head = Buffer.alloc(4);
  head.writeUInt32BE(count);
  return Buffer.concat([head, reply]);
};
const total = (replies: Buffer[]) => replies.reduce((sum, reply) => sum + reply.length, 0);

for (const through of ['grpc-js itself', 'reference kedge'] as const) {
  for (const kind of Object.keys(service) as Kind[]) {
    describe(`${kind} through ${through}`, () => {
      const request = kind === 'serverStream' ? counted(1, Buffer.from('hi')) : Buffer.from('hi');

      it('echoes, with binary metadata both ways', async (t) => {
        const client = await setUp(t, through);
        const metadata = new grpc.Metadata();
        metadata.set('echo-bin', Buffer.from([0, 1, 254, 255]));
        const { status, replies, initial } = await call(client, kind, 'echo', [request], { metadata });
        assert.equal(status.code, grpc.status.OK, status.details);
        assert.deepEqual(Buffer.concat(replies).toString(), 'hi');
        assert.deepEqual(initial!.get('echo-bin'), [Buffer.from([0, 1, 254, 255])]);
      });

      it('ends by deadline, by either side, and with the details of an error', async (t) => {
        const client = await setUp(t, through);
        const late = await call(client, kind, 'hang', [request], { deadline: Date.now() + 150 });
        assert.equal(late.status.code, grpc.status.DEADLINE_EXCEEDED);
        const cancelled = await call(client, kind, 'hang', [request], {
          onCall: (made) => setTimeout(() => made.cancel(), 100),
        });
        assert.equal(cancelled.status.code, grpc.status.CANCELLED);
        const byServer = await call(client, kind, 'cancel', [request]);
        assert.deepEqual([byServer.status.code, byServer.status.details], [grpc.status.CANCELLED, 'enough']);
        const metadata = new grpc.Metadata();
        metadata.set('echo-bin', Buffer.from('why'));
        const failed = await call(client, kind, 'fail', [request], { metadata });
        assert.deepEqual([failed.status.code, failed.status.details], [grpc.status.FAILED_PRECONDITION, 'not today']);
      });

      it('carries 16 MiB each way, and 10,000 small messages', async (t) => {
        const client = await setUp(t, through);
        const large = Buffer.alloc(16 * 1024 * 1024, 'L');
        const one = await call(client, kind, 'echo', [kind === 'serverStream' ? counted(1, large) : large]);
        assert.equal(one.status.code, grpc.status.OK, one.status.details);
        assert.equal(total(one.replies), large.length);
        if (kind === 'unary') {
          const calls = Array.from({ length: 10_000 }, (_, i) => i);
          const worker = async () => {
            while (calls.pop() !== undefined)
              assert.equal((await call(client, kind, 'echo', [request])).status.code, grpc.status.OK);
          };
          await Promise.all(Array.from({ length: 50 }, worker));
          return;
        }
        const small = kind === 'serverStream' ? [counted(10_000, Buffer.from('hi'))] : Array(10_000).fill(request);
        const many = await call(client, kind, 'echo', small);
        assert.equal(many.status.code, grpc.status.OK, many.status.details);
        assert.equal(total(many.replies), 20_000);
      });

      if (kind === 'serverStream' || kind === 'bidi') {
        it('waits for a slow reader', async (t) => {
          const client = await setUp(t, through);
          const chunk = Buffer.alloc(256 * 1024, 's');
          const requests = kind === 'serverStream' ? [counted(40, chunk)] : Array(40).fill(chunk);
          const { status, replies } = await call(client, kind, 'echo', requests, { onReply: () => sleep(5) });
          assert.equal(status.code, grpc.status.OK, status.details);
          assert.equal(total(replies), 40 * chunk.length);
        });
      }
    });
  }
}
