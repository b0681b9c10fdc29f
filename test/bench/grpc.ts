import * as grpc from '@grpc/grpc-js';
import { grpcDialer } from '../../src/grpc/index.ts';
import { type EchoClient, echoClient, unary } from '../helpers/grpc-kedge.ts';
import { AUTHORITY, type Bench, NAME } from './bench.ts';

const MESSAGES = 1000;

/** `MESSAGES` messages there and back on one stream. */
function chat(client: EchoClient, host?: string): Promise<void> {
  return new Promise((resolve, reject) => {
    const call = (client.bidi as (metadata: grpc.Metadata, options: object) => ReturnType<EchoClient['bidi']>)(
      new grpc.Metadata(),
      host === undefined ? {} : { host },
    );
    let left = MESSAGES;
    call.on('error', reject);
    call.on('end', resolve);
    call.on('data', () => {
      left -= 1;
      if (left === 0) call.end();
    });
    for (let i = 0; i < MESSAGES; i += 1) call.write({ text: 'x' });
  });
}

export async function grpcRows(bench: Bench): Promise<void> {
  const { server, dial, row, fact } = bench;
  const { ca, cert, key } = server;
  // A new object for each channel: grpc-js shares connections between equal credentials.
  const credentials = () => grpc.credentials.createSsl(Buffer.from(ca), Buffer.from(key), Buffer.from(cert));
  const raw = (
    service: string,
    port = server.grpcPort,
    options: grpc.ClientOptions = { 'grpc-node.flow_control_window': 8 << 20 },
  ) =>
    new (echoClient(service))(`127.0.0.1:${port}`, credentials(), {
      'grpc.ssl_target_name_override': NAME,
      ...options,
    });
  const host = { host: AUTHORITY };

  for (const concurrency of [1, 100, 500]) {
    const dialer = dial(server.grpcPort);
    const client = new (grpcDialer(dialer).wrap(echoClient('svc0.Echo')))(AUTHORITY);
    const rawClient = raw('svc0.Echo');
    const ours = () => unary(client, 'x');
    const theirs = () => unary(rawClient, 'x', undefined, host);
    await row(`grpc unary c=${concurrency}`, 'raw channel', concurrency, ours, theirs);
    if (concurrency === 100) {
      const name = `grpc stream of ${MESSAGES} messages there and back c=4`;
      await row(
        name,
        'raw channel',
        4,
        () => chat(client),
        () => chat(rawClient, AUTHORITY),
      );
    }
    rawClient.close();
    await dialer.close();
  }

  const dialer = dial(server.grpcPort);
  const { wrap } = grpcDialer(dialer);
  const names = Array.from({ length: 20 }, (_, i) => `svc${i}`);
  const shared = names.map((name) => new (wrap(echoClient(`${name}.Echo`)))(`${name}.us1:9090`));
  const single = names.map((name) => raw(`${name}.Echo`));
  let next = 0;
  const each = (clients: readonly EchoClient[]) => () => {
    next += 1;
    return unary(clients[next % clients.length]!, 'x', undefined, clients === single ? host : {});
  };
  await row('grpc unary, 20 services c=100', 'one channel for each', 100, each(shared), each(single));
  for (const client of single) client.close();
  await fact('grpc overhead of createCall() and start()', 'raw channel', async () => {
    const client = shared[0]!;
    const rawClient = raw('svc0.Echo');
    await Promise.all([unary(client, 'x'), unary(rawClient, 'x', undefined, host)]);
    const nanos = await createCallNanos(client.getChannel(), rawClient.getChannel());
    rawClient.close();
    return nanos;
  });
  await dialer.close();

  await fact('grpc over 50 ms, 4 x 2 MiB', "grpc-js's defaults, goal >= 20x", async () => {
    const dialer = dial(server.farGrpcPort);
    const client = new (grpcDialer(dialer).wrap(echoClient('svc0.Echo')))(AUTHORITY);
    const rawClient = raw('svc0.Echo', server.farGrpcPort, {});
    await unary(client, 'x');
    await unary(rawClient, 'x', undefined, host);
    const ours = await speed(() => unary(client, 'blob'));
    const theirs = await speed(() => unary(rawClient, 'blob', undefined, host));
    rawClient.close();
    await dialer.close();
    return `${ours.toFixed(1)} against ${theirs.toFixed(2)} MiB/s: ${(ours / theirs).toFixed(1)}x`;
  });
}

async function speed(call: () => Promise<{ text: string }>): Promise<number> {
  const begin = performance.now();
  const replies = await Promise.all(Array.from({ length: 4 }, call));
  const bytes = replies.reduce((sum, { text }) => sum + text.length, 0);
  return bytes / 1024 / 1024 / ((performance.now() - begin) / 1000);
}

/** What our facade adds to a call before it is grpc-js's, in ns: calls that are made, started and cancelled at once. */
async function createCallNanos(ours: grpc.ChannelInterface, theirs: grpc.ChannelInterface): Promise<string> {
  const CALLS = 2000;
  const time = async (channel: grpc.ChannelInterface, host: string | null) => {
    const spent: number[] = [];
    for (let round = 0; round < CALLS / 100; round += 1) {
      const calls: { cancelWithStatus(status: grpc.status, details: string): void }[] = [];
      const ended: Promise<unknown>[] = [];
      for (let i = 0; i < 100; i += 1) {
        const { promise, resolve } = Promise.withResolvers<unknown>();
        ended.push(promise);
        const listener = { onReceiveMetadata() {}, onReceiveMessage() {}, onReceiveStatus: resolve };
        const metadata = new grpc.Metadata();
        const begin = process.hrtime.bigint();
        const call = channel.createCall('/svc0.Echo/Unary', Number.POSITIVE_INFINITY, host, null, undefined);
        call.start(metadata, listener as never);
        spent.push(Number(process.hrtime.bigint() - begin));
        calls.push(call);
      }
      for (const call of calls) call.cancelWithStatus(grpc.status.CANCELLED, 'measured');
      await Promise.all(ended);
    }
    return spent.sort((a, b) => a - b)[CALLS / 2]!;
  };
  const rounds: number[] = [];
  for (let i = 0; i < 9; i += 1) {
    const [a, b] = [await time(ours, null), await time(theirs, AUTHORITY)];
    if (i > 1) rounds.push(a - b);
  }
  rounds.sort((a, b) => a - b);
  return `${rounds[3]!.toFixed(0)} ns (${rounds[0]!.toFixed(0)}-${rounds.at(-1)!.toFixed(0)})`;
}
