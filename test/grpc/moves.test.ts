import assert from 'node:assert/strict';
import http2 from 'node:http2';
import { describe, it, type TestContext } from 'node:test';
import type { TLSSocket } from 'node:tls';
import * as grpc from '@grpc/grpc-js';
import { grpcDialer } from '../../src/grpc/index.ts';
import { single } from '../../src/index.ts';
import { type Echo, type EchoClient, echoClient, startGrpcKedge, unary } from '../helpers/grpc-kedge.ts';
import { startKedge, type TestKedge } from '../helpers/kedge.ts';
import { rotating } from '../helpers/rotating.ts';

const ADDRESS = 'greeter.us1:9090';
const Client = echoClient();

/** A kedge that takes `bytes` of a call, then does something in place of answering. */
async function startOdd(t: TestContext, bytes: number, then: (stream: http2.ServerHttp2Stream) => void) {
  const kedge: TestKedge & { streams: number } = Object.assign(
    await startKedge(t, { onH2: (socket) => server.emit('connection', socket) }),
    { streams: 0 },
  );
  const server = http2.createServer();
  server.on('session', (session) => session.on('error', () => {}));
  server.on('stream', (stream) => {
    kedge.streams += 1;
    let received = 0;
    let done = false;
    const take = (chunk: Buffer) => {
      received += chunk.length;
      if (done || received < bytes) return;
      done = true;
      then(stream);
    };
    stream.on('error', () => {});
    if (bytes === 0) then(stream);
    else stream.on('data', take);
  });
  return kedge;
}

const refuse = (stream: http2.ServerHttp2Stream) => stream.close(http2.constants.NGHTTP2_REFUSED_STREAM);

type MethodConfig = { name: { service?: string; method?: string }[]; retryPolicy?: object };

const serviceConfig = (...methodConfig: MethodConfig[]): grpc.ClientOptions => ({
  'grpc.service_config': JSON.stringify({ loadBalancingConfig: [], methodConfig }),
});
const retryPolicy = (maxAttempts: number) => ({
  maxAttempts,
  initialBackoff: '0.01s',
  maxBackoff: '0.01s',
  backoffMultiplier: 1,
  retryableStatusCodes: ['UNAVAILABLE'],
});
const retries = (maxAttempts: number) => serviceConfig({ name: [{}], retryPolicy: retryPolicy(maxAttempts) });

async function clientOf(t: TestContext, odd: TestKedge, options: grpc.ClientOptions = {}) {
  const good = await startGrpcKedge(t);
  const dialer = good.dialer({ mapper: single(good.route({ kedge: [odd.url, good.url] })) });
  return { good, dialer, client: new (grpcDialer(dialer).wrap(Client))(ADDRESS, undefined, options) };
}

const words = (count: number) => Array.from({ length: count }, (_, i) => `${i} `);

/** Writes as callers do that wait for nothing, or with a pause after each. */
async function write(call: grpc.ClientWritableStream<{ text: string }>, texts: string[], pause: boolean) {
  for (const text of texts) {
    call.write({ text });
    if (pause) await new Promise(setImmediate);
  }
  call.end();
}

async function clientStream(client: EchoClient, texts: string[], pause: boolean): Promise<string> {
  const { promise, resolve, reject } = Promise.withResolvers<string>();
  const call = client.clientStream(new grpc.Metadata(), (error, reply) =>
    error ? reject(error) : resolve(reply!.text),
  );
  await write(call, texts, pause);
  return promise;
}

async function bidi(client: EchoClient, texts: string[], pause: boolean): Promise<string> {
  const call = client.bidi();
  const written = write(call, texts, pause);
  let all = '';
  for await (const { text } of call as AsyncIterable<Echo>) all += text;
  await written;
  return all;
}

describe('a stream that moves to the next kedge', () => {
  const FRAME = 5 + JSON.stringify({ text: '0 ' }).length;
  for (const count of [1, 4, 1000]) {
    const texts = words(count);
    for (const pause of [false, true]) {
      const name = `brings ${count} messages${pause ? ' that came one by one' : ''}`;

      it(`${name}, in order and once, after a refusal`, async (t) => {
        for (const after of [0, FRAME, FRAME * Math.min(count, 3)]) {
          const odd = await startOdd(t, after, refuse);
          const { client, dialer, good } = await clientOf(t, odd);
          assert.equal(await clientStream(client, texts, pause), texts.join(''));
          assert.equal(await bidi(client, texts, pause), texts.join(''));
          assert.equal(good.calls.length, 2);
          assert.ok(odd.streams >= 1);
          assert.equal(dialer.stats().inFlight, 0);
        }
      });

      it(`${name}, in order and once, after its connection was lost`, async (t) => {
        for (const call of [clientStream, bidi]) {
          // Gone for good: within one kedge grpc-js calls again itself.
          const odd = await startOdd(t, FRAME, () => void odd.close());
          const { client, dialer, good } = await clientOf(t, odd, retries(2));
          assert.equal(await call(client, texts, pause), texts.join(''));
          assert.equal(odd.streams, 1);
          assert.equal(good.calls.length, 1);
          assert.equal(dialer.stats().inFlight, 0);
        }
      });
    }

    it(`brings ${count} messages, in order and once, through rotations`, async (t) => {
      const kedge = await startGrpcKedge(t);
      const identity = rotating(kedge);
      const dialer = kedge.dialer({ identity });
      const client = new (grpcDialer(dialer).wrap(Client))(ADDRESS);
      for (const call of [clientStream, bidi]) {
        const done = call(client, texts, true);
        await identity.rotate();
        assert.equal(await done, texts.join(''));
      }
      assert.equal(dialer.stats().inFlight, 0);
    });
  }

  it('keeps no more than failover.replayBytes of it', async (t) => {
    const odd = await startOdd(t, 100_000, refuse);
    const { client, good } = await clientOf(t, odd);
    const big = 'x'.repeat(50_000);
    await assert.rejects(clientStream(client, [big, big, big], false), { code: grpc.status.UNAVAILABLE });
    assert.equal(good.calls.length, 0);
  });

  it('tells each write once that it is done', async (t) => {
    const odd = await startOdd(t, FRAME * 3, refuse);
    const { client } = await clientOf(t, odd);
    const call = client.bidi();
    const done: string[] = [];
    for (const text of ['0 ', '1 ', '2 ', '3 ']) call.write({ text }, () => done.push(text));
    call.end();
    let all = '';
    for await (const { text } of call as AsyncIterable<Echo>) all += text;
    assert.equal(all, '0 1 2 3 ');
    assert.deepEqual(done, ['0 ', '1 ', '2 ', '3 ']);
  });
});

describe("the caller's retry policy over several kedges", () => {
  /** Kedges that execute and then cut the connection, and how often each did. */
  async function startCutting(t: TestContext, count: number) {
    const kedges = await Promise.all(
      Array.from({ length: count }, () => startOdd(t, 1, ({ session }) => session!.socket.destroySoon())),
    );
    const route = kedges[0]!.route({ kedge: kedges.map(({ url }) => url) });
    const dialer = kedges[0]!.dialer({ mapper: single(route) });
    const client = (options: grpc.ClientOptions) => new (grpcDialer(dialer).wrap(Client))(ADDRESS, undefined, options);
    const executions = () => kedges.reduce((sum, { streams }) => sum + streams, 0);
    return { dialer, client, executions };
  }

  it('is never exceeded', async (t) => {
    for (const maxAttempts of [2, 3, 5]) {
      const { client, executions, dialer } = await startCutting(t, 3);
      await assert.rejects(unary(client(retries(maxAttempts)), 'x'), { code: grpc.status.UNAVAILABLE });
      assert.ok(executions() <= maxAttempts, `${executions()} of ${maxAttempts}`);
      assert.equal(dialer.stats().inFlight, 0);
    }
  });

  it('ends where an answer has begun: what is lost then is not sent again (gRFC A6)', async (t) => {
    for (const begins of [true, false]) {
      const odd = await startOdd(t, 1, (stream) => {
        if (begins) stream.respond({ ':status': 200, 'content-type': 'application/grpc' });
        setTimeout(() => stream.session?.socket.destroySoon(), 50);
      });
      const { good, client } = await clientOf(t, odd, retries(3));
      if (begins) await assert.rejects(unary(client, 'x'), { code: grpc.status.UNAVAILABLE });
      else assert.equal((await unary(client, 'x')).text, 'x');
      assert.deepEqual([odd.streams, good.calls.length], [1, begins ? 0 : 1]);
    }
  });

  it('is never exceeded when a kedge goes away between attempts', async (t) => {
    const odd = await startOdd(t, 1, () => void odd.close());
    let executed = 0;
    const busy = await startGrpcKedge(t, {
      unary: (_call, done) => {
        executed += 1;
        done({ code: grpc.status.UNAVAILABLE, details: 'busy' });
      },
    });
    const dialer = busy.dialer({ mapper: single(busy.route({ kedge: [odd.url, busy.url] })) });
    const client = new (grpcDialer(dialer).wrap(Client))(ADDRESS, undefined, retries(2));
    await assert.rejects(unary(client, 'x'), { code: grpc.status.UNAVAILABLE, details: 'busy' });
    assert.equal(odd.streams + executed, 2);
  });

  it('is that of the method, or of its service, or of all, and never two of them', async (t) => {
    const policy = retryPolicy(2);
    const excluded = [
      serviceConfig({ name: [{}], retryPolicy: policy }, { name: [{ service: 'test.Echo', method: 'Unary' }] }),
      serviceConfig(
        { name: [{ service: 'test.Echo' }], retryPolicy: policy },
        { name: [{ service: 'test.Echo', method: 'Unary' }] },
      ),
      serviceConfig({ name: [{}], retryPolicy: policy }, { name: [{ service: 'test.Echo', method: '' }] }),
    ];
    for (const options of excluded) {
      const { client, executions } = await startCutting(t, 2);
      await assert.rejects(unary(client(options), 'x'), { code: grpc.status.UNAVAILABLE });
      assert.equal(executions(), 1, options['grpc.service_config']);
    }
  });

  it('is read when the client is made, and refused there', async (t) => {
    const kedge = await startGrpcKedge(t);
    const { wrap } = grpcDialer(kedge.dialer());
    const wrong = ['{', JSON.stringify({ methodConfig: [{ name: 1 }] })];
    for (const text of wrong) {
      assert.throws(() => new Client(ADDRESS, grpc.credentials.createInsecure(), { 'grpc.service_config': text }));
      assert.throws(() => new (wrap(Client))(ADDRESS, undefined, { 'grpc.service_config': text }), {
        code: 'ERR_KEDGE_OPTIONS',
      });
    }
  });
});

describe('a kedge that says with GOAWAY that it processed nothing', () => {
  const frame = (type: number, payload = Buffer.alloc(0)) => {
    const head = Buffer.alloc(9);
    head.writeUIntBE(payload.length, 0, 3);
    head[3] = type;
    return Buffer.concat([head, payload]);
  };
  const HEADERS = 1;
  const SETTINGS = 4;
  const GOAWAY = 7;
  const PREFACE_BYTES = 24;

  /** Node's own server does not say that the last stream was 0. */
  const goaway = (socket: TLSSocket, code: number, last: number, after: number) => {
    let bytes = Buffer.alloc(0);
    let at = PREFACE_BYTES;
    let streams = 0;
    socket.write(frame(SETTINGS));
    socket.on('data', (chunk: Buffer) => {
      bytes = Buffer.concat([bytes, chunk]);
      while (bytes.length >= at + 9) {
        if (bytes[at + 3] === HEADERS) streams += 1;
        if (bytes[at + 3] === HEADERS && streams === after) {
          const payload = Buffer.alloc(8);
          payload.writeUInt32BE(last, 0);
          payload.writeUInt32BE(code, 4);
          socket.end(frame(GOAWAY, payload));
        }
        at += 9 + bytes.readUIntBE(at, 3);
      }
    });
  };

  for (const code of [0, 2, 8, 11, 12]) {
    it(`by code ${code} has its calls go to the next one`, async (t) => {
      const odd = await startKedge(t, { onH2: (socket) => goaway(socket, code, 0, 20) });
      const { client, good, dialer } = await clientOf(t, odd);
      const texts = words(20);
      const replies = await Promise.all(texts.map((text) => unary(client, text)));
      assert.deepEqual(
        replies.map(({ text }) => text),
        texts,
      );
      assert.equal(good.calls.length, 20);
      assert.equal(dialer.stats().inFlight, 0);
    });

    it(`by code ${code} has a stream go to the next one, with all that was sent`, async (t) => {
      const odd = await startKedge(t, { onH2: (socket) => goaway(socket, code, 0, 1) });
      const { client } = await clientOf(t, odd);
      assert.equal(await clientStream(client, words(10), false), words(10).join(''));
    });
  }

  it('keeps the call that it may have processed, and the one that its caller cancels', async (t) => {
    const odd = await startKedge(t, { onH2: (socket) => goaway(socket, 2, 1, 2) });
    const { client, good } = await clientOf(t, odd);
    const first = unary(client, 'first');
    first.catch(() => {});
    while (odd.handshakes === 0) await new Promise(setImmediate);
    await new Promise((resolve) => setTimeout(resolve, 100));
    assert.equal((await unary(client, 'second')).text, 'second');
    await assert.rejects(first, { code: grpc.status.INTERNAL });
    assert.equal(good.calls.length, 1);

    const other = await clientOf(t, await startKedge(t, { onH2: (socket) => goaway(socket, 2, 0, 1) }));
    const call = other.client.unary({ text: 'x' }, () => {});
    const ended = new Promise<grpc.StatusObject>((resolve) => call.once('status', resolve));
    call.cancel();
    assert.equal((await ended).code, grpc.status.CANCELLED);
  });
});
