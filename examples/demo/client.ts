/** A service that calls two other clusters, with the public API only. */
import assert from 'node:assert/strict';
import { once } from 'node:events';
import { createDialer, type Identity, type Route } from 'kedge-dialer';
import { grpcDialer } from 'kedge-dialer/grpc';
import { request } from 'undici';
import { type Answer, GreeterClient, type Greeting } from '../grpc/greeter.ts';

export interface Row {
  call: string;
  target: string;
  answer: Answer | undefined;
  protocol: string;
  ms: number;
  error?: unknown;
}

export interface ClientOptions {
  identity: Identity;
  /** Cluster name -> the route to its kedge. */
  clusters: ReadonlyMap<string, Route>;
  /** `host:port` of a service in our own cluster, which no kedge serves. */
  neighbour: string;
}

interface Reply {
  from: Answer;
  host: string;
  bytes: number;
  via: string | null;
}

/** Makes every call, checks every answer, and reports what happened. */
export async function runClient(options: ClientOptions): Promise<{ rows: Row[]; handshakes: number }> {
  const { identity, clusters, neighbour } = options;
  const dialer = createDialer({
    identity,
    mapper: ({ hostname }) => clusters.get(/\.([a-z0-9]+)\.prod\.clusters\.local$/.exec(hostname)?.[1] ?? ''),
  });
  const { dispatcher } = dialer;
  const Greeter = grpcDialer(dialer).wrap(GreeterClient);
  const rows: Row[] = [];

  const call = async (
    name: string,
    target: string,
    make: () => Promise<{ answer: Answer | undefined; protocol: string }>,
  ) => {
    const begin = performance.now();
    const row: Row = { call: name, target, answer: undefined, protocol: '', ms: 0 };
    rows.push(row);
    try {
      Object.assign(row, await make());
    } catch (error) {
      row.error = error;
    }
    row.ms = performance.now() - begin;
  };

  for (const cluster of clusters.keys()) {
    const orders = `orders.shop.svc.${cluster}.prod.clusters.local:8080`;
    const greeter = `greeter.shop.svc.${cluster}.prod.clusters.local:9090`;
    const check = (from: Answer, backend: string) => {
      assert.deepEqual(from, { cluster, backend, client: 'CN=checkout' });
      return from;
    };
    const checkReply = (reply: Reply, bytes: number) => {
      assert.equal(reply.host, orders, 'the backend saw another Host');
      assert.equal(reply.bytes, bytes);
      return { answer: check(reply.from, 'orders'), protocol: protocolOf(reply) };
    };

    await call('fetch', orders, async () => {
      const response = await fetch(`http://${orders}/v1/orders?state=open`, { dispatcher });
      return checkReply((await response.json()) as Reply, 0);
    });
    await call('undici request', orders, async () => {
      const { body } = await request(`http://${orders}/v1/orders`, { dispatcher, method: 'POST', body: 'one order' });
      return checkReply((await body.json()) as Reply, 9);
    });
    await call('streamed upload', orders, async () => {
      const body = ReadableStream.from(chunks(16));
      const response = await fetch(`http://${orders}/upload`, { dispatcher, method: 'POST', body, duplex: 'half' });
      return checkReply((await response.json()) as Reply, 16 * 64 * 1024);
    });
    await call('streamed download', orders, async () => {
      const response = await fetch(`http://${orders}/download`, { dispatcher });
      let bytes = 0;
      for await (const chunk of response.body!) bytes += chunk.length;
      assert.equal(bytes, 16 * 64 * 1024);
      return checkReply(JSON.parse(response.headers.get('x-reply') ?? '{}'), 0);
    });

    const client = new Greeter(greeter);
    await call('gRPC unary', greeter, async () => {
      const reply = await new Promise<Greeting>((resolve, reject) => {
        client.sayHello({ name: 'Ada' }, (error, value) => (error === null ? resolve(value!) : reject(error)));
      });
      assert.equal(reply.text, `Hello Ada, from ${cluster}`);
      return { answer: check(reply.from, 'greeter'), protocol: 'h2' };
    });
    await call('gRPC bidirectional', greeter, async () => {
      const chat = client.chat();
      let from: Answer | undefined;
      for (const name of ['Ada', 'Grace', 'Barbara']) {
        chat.write({ name });
        const [reply] = (await once(chat, 'data')) as [Greeting];
        assert.equal(reply.text, `Hello ${name}, from ${cluster}`);
        from = check(reply.from, 'greeter');
      }
      chat.end();
      await once(chat, 'end');
      return { answer: from, protocol: 'h2' };
    });
    client.close();
  }

  await call('fetch, unmapped', neighbour, async () => {
    const response = await fetch(`http://${neighbour}/`, { dispatcher });
    const { from, via } = (await response.json()) as Reply;
    assert.deepEqual(from, { cluster: 'home', backend: 'orders', client: 'undefined' });
    assert.equal(via, null, 'it went through a kedge');
    return { answer: { ...from, client: '-' }, protocol: 'direct' };
  });

  const { handshakes } = dialer.stats();
  await dialer.close();
  return { rows, handshakes };
}

function protocolOf({ via }: Reply): string {
  return via === null ? '' : via.startsWith('2') ? 'h2' : 'h1';
}

function* chunks(count: number): Generator<Buffer> {
  for (let i = 0; i < count; i += 1) yield Buffer.alloc(64 * 1024, i);
}
