import assert from 'node:assert/strict';
import http2 from 'node:http2';
import { describe, it, type TestContext } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import * as grpc from '@grpc/grpc-js';
import { grpcDialer } from '../../src/grpc/index.ts';
import { single } from '../../src/index.ts';
import { startBlackHole, startGate } from '../helpers/black-hole.ts';
import { echoClient, startGrpcKedge, unary } from '../helpers/grpc-kedge.ts';
import { startKedge, type TestKedge } from '../helpers/kedge.ts';
import { runNode } from '../helpers/process.ts';
import { rotating } from '../helpers/rotating.ts';

const ADDRESS = 'greeter.us1:9090';
const DEAD = 'https://127.0.0.1:1';
const EchoClient = echoClient();
const patient = () => new grpc.Metadata({ waitForReady: true });
const ready = (client: grpc.Client, ms: number) =>
  new Promise<void>((resolve, reject) =>
    client.waitForReady(Date.now() + ms, (error) => (error === undefined ? resolve() : reject(error))),
  );

describe('a route with a dead kedge and a good one', () => {
  it('serves calls that wait for readiness, and readiness itself', async (t) => {
    const kedge = await startGrpcKedge(t);
    const dialer = () => kedge.dialer({ mapper: single(kedge.route({ kedge: [DEAD, kedge.url] })) });
    const calling = new (grpcDialer(dialer()).wrap(EchoClient))(ADDRESS);
    assert.equal((await unary(calling, 'x', patient(), { deadline: Date.now() + 3000 })).text, 'x');
    const waiting = new (grpcDialer(dialer()).wrap(EchoClient))(ADDRESS);
    await ready(waiting, 3000);
    assert.equal(waiting.getChannel().getConnectivityState(false), grpc.connectivityState.READY);
  });

  it('waits once for a kedge that is silent after TLS, then avoids it', async (t) => {
    const [kedge, mute] = await Promise.all([startGrpcKedge(t), startKedge(t, { onH2: () => {} })]);
    const dialer = kedge.dialer({
      mapper: single(kedge.route({ kedge: [mute.url, kedge.url] })),
      connect: { timeoutMs: 150, handshakeTimeoutMs: 150 },
    });
    const client = new (grpcDialer(dialer).wrap(EchoClient))(ADDRESS);
    await Promise.all(Array.from({ length: 20 }, () => unary(client, 'x')));
    await Promise.all(Array.from({ length: 20 }, () => unary(client, 'x')));
    assert.equal(mute.handshakes, 1);
    const breaker = () => dialer.stats().kedges.find(({ kedge: name }) => name.endsWith(`:${mute.port}`))!.breaker;
    for (let i = 0; i < 50 && breaker() !== 'open'; i += 1) await sleep(20);
    assert.equal(breaker(), 'open');
  });
});

describe('a route whose first kedge is slow', () => {
  it('asks the next one after a head start, and goes back when the first is there', async (t) => {
    const [first, second] = await Promise.all([startGrpcKedge(t), startGrpcKedge(t)]);
    const gate = await startGate(t, first.port);
    const dialer = first.dialer({ mapper: single(first.route({ kedge: [gate.url, second.url] })) });
    const client = new (grpcDialer(dialer).wrap(EchoClient))(ADDRESS);
    const began = performance.now();
    await Promise.all(Array.from({ length: 10 }, () => unary(client, 'x')));
    assert.ok(performance.now() - began < 4000, 'no call waited for the deadline of the dial');
    assert.equal(second.calls.length, 10);
    // Known to be slow: nobody else waits for it.
    const later = performance.now();
    await unary(client, 'y');
    assert.ok(performance.now() - later < 200);
    gate.open();
    for (let i = 0; i < 100 && first.calls.length === 0; i += 1) await unary(client, 'z').then(() => sleep(10));
    assert.ok(first.calls.length > 0, 'new calls fail back');
  });

  it('asks the next one after a head start also where timers are early', async (t) => {
    const [first, second] = await Promise.all([startGrpcKedge(t), startGrpcKedge(t)]);
    const gate = await startGate(t, first.port);
    const dialer = first.dialer({ mapper: single(first.route({ kedge: [gate.url, second.url] })) });
    const client = new (grpcDialer(dialer).wrap(EchoClient))(ADDRESS);
    // Node's may be by up to 1 ms.
    const now = performance.now.bind(performance);
    t.mock.method(performance, 'now', () => now() * 0.98);
    const began = now();
    assert.equal((await unary(client, 'x')).text, 'x');
    assert.ok(now() - began < 3000, 'the call waited for the deadline of the dial');
    assert.equal(second.calls.length, 1);
  });

  it('leaves no socket behind when a black hole is given up', { skip: process.platform !== 'linux' }, async (t) => {
    const kedge = await startGrpcKedge(t);
    const hole = await startBlackHole(t);
    const dialer = kedge.dialer({
      mapper: single(kedge.route({ kedge: [hole.url, kedge.url] })),
      connect: { timeoutMs: 300, handshakeTimeoutMs: 100 },
    });
    const client = new (grpcDialer(dialer).wrap(EchoClient))(ADDRESS);
    assert.equal((await unary(client, 'x')).text, 'x');
    const stats = () => dialer.stats().kedges.find(({ kedge: name }) => name === hole.name)!;
    assert.equal(stats().connections, 1);
    for (let i = 0; i < 100 && stats().breaker !== 'open'; i += 1) await sleep(20);
    assert.equal(stats().breaker, 'open');
    for (let i = 0; i < 50 && stats().connections > 0; i += 1) await sleep(10);
    assert.equal(stats().connections, 0);
  });
});

describe('a route with one kedge', () => {
  it('that takes two streams on a connection gets another connection for the third', async (t) => {
    const slow: grpc.handleUnaryCall<{ text: string }, { text: string; authority: string }> = (call, done) => {
      setTimeout(() => done(null, { text: call.request.text, authority: '' }), 300);
    };
    const kedge = await startGrpcKedge(t, { unary: slow, server: { 'grpc.max_concurrent_streams': 2 } });
    const client = new (grpcDialer(kedge.dialer()).wrap(EchoClient))(ADDRESS);
    await unary(client, 'learns the limit');
    const began = performance.now();
    await Promise.all(Array.from({ length: 6 }, () => unary(client, 'x')));
    assert.equal(kedge.handshakes, 3);
    assert.ok(performance.now() - began < 850, 'no call waited for two others');
  });

  it('that comes up while a call waits for it serves that call', async (t) => {
    const first = await startGrpcKedge(t);
    const { port } = first;
    await first.close();
    const dialer = first.dialer();
    const client = new (grpcDialer(dialer).wrap(EchoClient))(ADDRESS);
    const waiting = unary(client, 'x', patient(), { deadline: Date.now() + 5000 });
    const becomesReady = ready(client, 5000);
    await sleep(400);
    // One that does not wait is told at once, though another is still waiting.
    await assert.rejects(unary(client, 'y', undefined, { deadline: Date.now() + 5000 }), {
      code: grpc.status.UNAVAILABLE,
    });
    const second = await startGrpcKedge(t, { at: { host: '127.0.0.1', port } });
    await Promise.all([waiting, becomesReady]);
    assert.equal(second.calls.length, 1);
  });

  it('that refuses the client certificate is not stormed, and no socket is left', async (t) => {
    const kedge = await startGrpcKedge(t);
    const dialer = kedge.dialer({
      identity: undefined,
      mapper: single(kedge.route({ peer: { dangerouslySkipVerification: true } })),
      onWarning: () => {},
    });
    const client = new (grpcDialer(dialer).wrap(EchoClient))(ADDRESS);
    const end = Date.now() + 600;
    let calls = 0;
    const impatient = async () => {
      while (Date.now() < end) {
        calls += 1;
        await assert.rejects(unary(client, 'x'), (error: grpc.ServiceError) => {
          assert.equal((error.cause as { code?: string }).code, 'ERR_KEDGE_CLIENT_CERTIFICATE');
          return true;
        });
        await sleep(1);
      }
    };
    await Promise.all(Array.from({ length: 20 }, impatient));
    const [stats] = dialer.stats().kedges;
    assert.ok(calls > 500, `${calls} calls`);
    assert.ok(stats!.failures <= 5, `${stats!.failures} dials`);
    for (let i = 0; i < 50 && dialer.stats().kedges[0]!.connections > 0; i += 1) await sleep(20);
    assert.equal(dialer.stats().kedges[0]!.connections, 0);
  });

  it('is still watched after a rotation', async (t) => {
    const kedge = await startGrpcKedge(t);
    const identity = rotating(kedge);
    const client = new (grpcDialer(kedge.dialer({ identity })).wrap(EchoClient))(ADDRESS);
    const channel = client.getChannel();
    const { IDLE, READY } = grpc.connectivityState;
    const changed = (from: grpc.connectivityState) =>
      new Promise<void>((resolve, reject) =>
        channel.watchConnectivityState(from, Date.now() + 3000, (error) => (error ? reject(error) : resolve())),
      );
    assert.equal(channel.getConnectivityState(false), IDLE);
    const leavesIdle = changed(IDLE);
    await identity.rotate();
    await unary(client, 'x');
    await leavesIdle;
    assert.equal(channel.getConnectivityState(false), READY);
    const leavesReady = changed(READY);
    await identity.rotate();
    await leavesReady;
    assert.equal(channel.getConnectivityState(false), IDLE);
  });

  it('may be given up for another while both are watched', async (t) => {
    const [one, two] = await Promise.all([startGrpcKedge(t), startGrpcKedge(t)]);
    const routes = { one: single(one.route()), two: single(two.route()) };
    const dialer = one.dialer({
      mapper: (target) => (target.hostname.startsWith('one') ? routes.one : routes.two)(target),
      maxKedges: 1,
    });
    const { wrap } = grpcDialer(dialer);
    const clients = [new (wrap(EchoClient))('one.us1:1'), new (wrap(EchoClient))('two.us1:1')];
    let woken = 0;
    for (const client of clients) {
      client.getChannel().watchConnectivityState(grpc.connectivityState.IDLE, Date.now() + 200, () => {
        woken += 1;
      });
    }
    for (const client of [...clients, ...clients]) assert.equal((await unary(client, 'x')).text, 'x');
    await sleep(250);
    assert.equal(woken, 2);
  });
});

describe('close()', () => {
  it('leaves no connection and no timer, and lets the process exit', {
    skip: process.platform !== 'linux',
  }, async (t) => {
    const [kedge, hole] = await Promise.all([startGrpcKedge(t), startBlackHole(t)]);
    const source = (path: string) => JSON.stringify(new URL(path, import.meta.url).href);
    const code = `
      import { createDialer, pem, single } from ${source('../../src/index.ts')};
      import { grpcDialer } from ${source('../../src/grpc/index.ts')};
      import { echoClient, unary } from ${source('../helpers/grpc-kedge.ts')};
      const { cert, key, ca, kedge } = JSON.parse(process.argv[1]);
      const dialer = createDialer({ mapper: single(kedge), identity: pem({ cert, key, ca }) });
      const client = new (grpcDialer(dialer).wrap(echoClient()))('greeter.us1:9090');
      await Promise.all(Array.from({ length: 250 }, () => unary(client, 'x')));
      await dialer.close();
      await new Promise((resolve) => setTimeout(resolve, 50));
      console.log(process.getActiveResourcesInfo().filter((kind) => /TCP|TLS|Timeout/.test(kind)).length);
    `;
    const { cert, key } = kedge.client;
    const init = { cert, key, ca: kedge.ca.cert, kedge: kedge.route({ kedge: [hole.url, kedge.url] }) };
    const { status, out } = await runNode(['--input-type=module', '-e', code, JSON.stringify(init)]);
    assert.equal(status, 0, out);
    assert.equal(out.trim(), '0');
  });
});

describe('a call that has begun', () => {
  /** A kedge that does something to every call in place of answering. */
  const startOdd = async (t: TestContext, onStream: (stream: http2.ServerHttp2Stream, cut: () => void) => void) => {
    const seen: string[] = [];
    const server = http2.createServer();
    server.on('session', (session) => session.on('error', () => {}));
    server.on('stream', (stream, headers) => {
      seen.push(String(headers[':path']));
      stream.on('error', () => {});
      onStream(stream, () => kedge.reset());
    });
    const kedge = await startKedge(t, { onH2: (socket) => server.emit('connection', socket) });
    return { kedge, seen };
  };
  const policy = (codes: string[]) => ({
    'grpc.service_config': JSON.stringify({
      loadBalancingConfig: [],
      methodConfig: [
        {
          name: [{ service: 'test.Echo' }],
          retryPolicy: {
            maxAttempts: 2,
            initialBackoff: '0.01s',
            maxBackoff: '0.01s',
            backoffMultiplier: 1,
            retryableStatusCodes: codes,
          },
        },
      ],
    }),
  });
  const clientOf = async (t: TestContext, odd: TestKedge, options: grpc.ClientOptions = {}) => {
    const good = await startGrpcKedge(t);
    const dialer = good.dialer({ mapper: single(good.route({ kedge: [odd.url, good.url] })) });
    return { good, dialer, client: new (grpcDialer(dialer).wrap(EchoClient))(ADDRESS, undefined, options) };
  };

  it('and was refused unprocessed goes to the next kedge, with all that was sent', async (t) => {
    const { kedge, seen } = await startOdd(t, (stream) => stream.close(http2.constants.NGHTTP2_REFUSED_STREAM));
    const { good, client, dialer } = await clientOf(t, kedge);
    assert.equal((await unary(client, 'x')).text, 'x');
    const chat = client.bidi();
    const letters: string[] = [];
    chat.write({ text: '1' }, () => letters.push('written'));
    setTimeout(() => chat.end({ text: '2' }), 20);
    for await (const { text } of chat as AsyncIterable<{ text: string }>) letters.push(text);
    assert.deepEqual(
      letters.filter((each) => each !== 'written'),
      ['1', '2'],
    );
    assert.equal(letters.filter((each) => each === 'written').length, 1);
    assert.ok(seen.length >= 2);
    assert.equal(good.calls.length, 2);
    assert.equal(dialer.stats().inFlight, 0);
  });

  it('and lost its connection goes to the next kedge only where the caller may call again', async (t) => {
    const { kedge, seen } = await startOdd(t, (_stream, cut) => cut());
    const lost = (error: grpc.ServiceError) => {
      assert.equal(error.code, grpc.status.UNAVAILABLE);
      assert.equal((error.cause as { code?: string }).code, 'ERR_KEDGE_CONNECTION');
      return true;
    };
    const once = await clientOf(t, kedge);
    await assert.rejects(unary(once.client, 'x'), lost);
    assert.equal(once.good.calls.length, 0);
    assert.equal(seen.length, 1, 'not even on the same kedge');
    const other = await clientOf(t, kedge, policy(['RESOURCE_EXHAUSTED']));
    await assert.rejects(unary(other.client, 'x'), lost);
    // Within a kedge that is still there grpc-js calls again itself, as often as the policy says.
    const gone = await startOdd(t, () => void gone.kedge.close());
    const again = await clientOf(t, gone.kedge, policy(['UNAVAILABLE']));
    assert.equal((await unary(again.client, 'x')).text, 'x');
    assert.equal(gone.seen.length, 1);
    assert.equal(again.good.calls.length, 1);
  });

  it('and was answered stays, whatever the answer says', async (t) => {
    const forged = { ':status': 200, 'content-type': 'application/grpc', 'grpc-status': '14' };
    for (const message of ['Stream refused by server', 'Connection dropped', 'read ECONNRESET']) {
      const { kedge } = await startOdd(t, (stream) =>
        stream.respond({ ...forged, 'grpc-message': message }, { endStream: true }),
      );
      const { good, client } = await clientOf(t, kedge);
      await assert.rejects(unary(client, 'x'), { code: grpc.status.UNAVAILABLE, details: message });
      assert.equal(good.calls.length, 0);
    }
    const { kedge } = await startOdd(t, (stream, cut) => {
      stream.respond({ ':status': 200, 'content-type': 'application/grpc' });
      setTimeout(cut, 50);
    });
    const { good, client } = await clientOf(t, kedge, policy(['UNAVAILABLE']));
    await assert.rejects(unary(client, 'x'), { code: grpc.status.UNAVAILABLE });
    assert.equal(good.calls.length, 0);
  });
});
