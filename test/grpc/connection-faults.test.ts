import assert from 'node:assert/strict';
import { fork } from 'node:child_process';
import diagnostics from 'node:diagnostics_channel';
import { once } from 'node:events';
import http2 from 'node:http2';
import net from 'node:net';
import { describe, it, type TestContext } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import tls from 'node:tls';
import * as grpc from '@grpc/grpc-js';
import { grpcDialer } from '../../src/grpc/index.ts';
import { isKedgeError, single } from '../../src/index.ts';
import { startBlackHole } from '../helpers/black-hole.ts';
import { echoClient, startGrpcKedge, unary } from '../helpers/grpc-kedge.ts';
import { startKedge, type TestKedge } from '../helpers/kedge.ts';

const ADDRESS = 'greeter.us1:9090';
const NAME = 'two.kedge.test';
const EchoClient = echoClient();

/** Relays on two addresses of the loopback network and one port; `addresses` answers for their name from then on. */
async function startRelays(t: TestContext, upstream: number, delays: readonly [number, number]): Promise<number> {
  const sockets = new Set<net.Socket>();
  const listen = async (host: string, port: number, delayMs: number): Promise<net.AddressInfo> => {
    const server = net.createServer((socket) => {
      const onward = net.connect(upstream, '127.0.0.1');
      for (const [from, to] of [
        [socket, onward],
        [onward, socket],
      ] as const) {
        sockets.add(from);
        from.on('data', (chunk) => setTimeout(() => to.writable && to.write(chunk), delayMs / 2));
        from.on('close', () => to.destroy());
        from.on('error', () => {});
      }
    });
    t.after(() => server.close());
    server.listen(port, host);
    await once(server, 'listening');
    return server.address() as net.AddressInfo;
  };
  t.after(() => {
    for (const socket of sockets) socket.destroy();
  });
  const { port } = await listen('127.0.0.2', 0, delays[0]);
  await listen('127.0.0.3', port, delays[1]);
  return port;
}

/** Makes {@link NAME} have the addresses, for this test. */
async function resolveTo(t: TestContext, ...addresses: string[]): Promise<void> {
  const dns = (await import('node:dns')).default;
  t.mock.method(dns.promises, 'lookup', async () => addresses.map((address) => ({ address, family: 4 })));
  t.mock.method(dns.promises, 'resolve4', async () => addresses.map((address) => ({ address, ttl: 3600 })));
  t.mock.method(dns.promises, 'resolve6', async () => []);
}

const kedgeOf = (kedge: TestKedge, t: TestContext, port: number, more = {}) => {
  void t;
  return kedge.dialer({ mapper: single(kedge.route({ kedge: `https://${NAME}:${port}` })), ...more });
};

describe('a kedge with two addresses', { skip: process.platform !== 'linux' }, () => {
  it('keeps its healthy connection where both are far away', async (t) => {
    const kedge = await startGrpcKedge(t);
    const port = await startRelays(t, kedge.port, [120, 120]);
    await resolveTo(t, '127.0.0.2', '127.0.0.3');
    const dialer = kedgeOf(kedge, t, port, { connect: { handshakeTimeoutMs: 1500 } });
    const client = new (grpcDialer(dialer).wrap(EchoClient))(ADDRESS);
    for (const end = Date.now() + 3000; Date.now() < end; ) await unary(client, 'x');
    const [stats] = dialer.stats().kedges;
    assert.deepEqual([stats!.failures, stats!.breaker, stats!.connections], [0, 'closed', 1]);
  });

  it('fails calls in time when one ends the handshake and the other is a black hole', async (t) => {
    const hole = await startBlackHole(t);
    const kedge = await startGrpcKedge(t);
    const rude = net.createServer((socket) => {
      socket.on('error', () => {});
      socket.once('data', () => socket.destroy());
    });
    t.after(() => rude.close());
    rude.listen(hole.port, '127.0.0.2');
    await once(rude, 'listening');
    await resolveTo(t, '127.0.0.2', '127.0.0.1');
    const dialer = kedgeOf(kedge, t, hole.port, { connect: { timeoutMs: 500 } });
    const client = new (grpcDialer(dialer).wrap(EchoClient))(ADDRESS);
    const began = performance.now();
    await assert.rejects(unary(client, 'x', undefined, { deadline: Date.now() + 6000 }), {
      code: grpc.status.UNAVAILABLE,
      message: /TLS handshake failed|no TCP connection within 500 ms/,
    });
    assert.ok(performance.now() - began < 2500);
    const connections = () => dialer.stats().kedges[0]!.connections;
    for (let i = 0; i < 50 && connections() > 0; i += 1) await sleep(10);
    assert.equal(connections(), 0);
  });

  it('gathers no listeners, whatever policy the service config names', async (t) => {
    const kedge = await startGrpcKedge(t);
    const port = await startRelays(t, kedge.port, [0, 100]);
    await resolveTo(t, '127.0.0.2', '127.0.0.3');
    const warnings: Error[] = [];
    const warn = (warning: Error) => warnings.push(warning);
    process.on('warning', warn);
    t.after(() => process.off('warning', warn));
    const dialer = kedgeOf(kedge, t, port, { connect: { handshakeTimeoutMs: 1000 } });
    const config = { 'grpc.service_config': '{"loadBalancingConfig":[{"round_robin":{}}]}' };
    const client = new (grpcDialer(dialer).wrap(EchoClient))(ADDRESS, undefined, config);
    for (let i = 0; i < 40; i += 1) await unary(client, 'x');
    // The slower one, too, outlives the deadline for SETTINGS.
    await sleep(1300);
    for (let i = 0; i < 40; i += 1) await unary(client, 'x');
    assert.deepEqual(warnings, []);
    assert.equal(kedge.handshakes, 1);
    assert.equal(dialer.stats().kedges[0]!.failures, 0);
  });
});

describe('a kedge whose connection is good and whose next dial fails', () => {
  it('is used again after the back-off', async (t) => {
    let refuses = false;
    const first = await startGrpcKedge(t, {
      server: { 'grpc.max_concurrent_streams': 1 },
      onTcp: (socket) => {
        if (refuses) socket.resetAndDestroy();
        return refuses;
      },
    });
    const second = await startGrpcKedge(t);
    const dialer = first.dialer({
      mapper: single(first.route({ kedge: [first.url, second.url] })),
      failover: { breaker: { failures: 1, backoffMs: 100, maxBackoffMs: 200 } },
      grpc: { maxStreamsPerConnection: 1 },
    });
    const client = new (grpcDialer(dialer).wrap(EchoClient))(ADDRESS);
    await unary(client, 'x');
    refuses = true;
    await Promise.all([unary(client, 'a'), unary(client, 'b')]);
    refuses = false;
    const before = first.calls.length;
    for (let i = 0; i < 100 && first.calls.length < before + 5; i += 1) await unary(client, 'y').then(() => sleep(10));
    assert.ok(first.calls.length >= before + 5, 'calls are back at the first kedge');
    assert.equal(dialer.stats().kedges[0]!.breaker, 'closed');
  });
});

describe('clients with options of their own', () => {
  const open = (dialer: ReturnType<TestKedge['dialer']>, i: number) =>
    new (grpcDialer(dialer).wrap(EchoClient))(ADDRESS, undefined, { 'grpc-node.flow_control_window': 1_000_000 + i });

  it('share the bound of connections, and those of closed clients make room', async (t) => {
    const kedge = await startGrpcKedge(t);
    const dialer = kedge.dialer({ grpc: { maxConnections: 3 } });
    for (let i = 0; i < 12; i += 1) {
      const client = open(dialer, i);
      await unary(client, 'x');
      client.close();
    }
    assert.equal(kedge.handshakes, 12);
    for (let i = 0; i < 50 && kedge.sockets.size > 3; i += 1) await sleep(10);
    assert.ok(kedge.sockets.size <= 3, `${kedge.sockets.size} connections`);
  });

  it('lose their last connection when they are closed and it has been idle', async (t) => {
    t.mock.timers.enable({ apis: ['setInterval'] });
    const kedge = await startGrpcKedge(t);
    const dialer = kedge.dialer();
    const [first, second] = [open(dialer, 1), open(dialer, 2)];
    await Promise.all([unary(first, 'x'), unary(second, 'x')]);
    first.close();
    t.mock.method(
      performance,
      'now',
      (
        (real) => () =>
          real() + 31_000
      )(performance.now.bind(performance)),
    );
    t.mock.timers.tick(5_000);
    for (let i = 0; i < 50 && kedge.sockets.size > 1; i += 1) await sleep(10);
    assert.equal(kedge.sockets.size, 1, 'that of the open client stays');
    await unary(second, 'y');
    assert.equal(kedge.handshakes, 2);
  });
});

describe('a kedge that finds the PINGs too many', () => {
  it('gets fewer of them on its next connections', async (t) => {
    const lives: number[] = [];
    const server = http2.createServer();
    server.on('session', (session) => {
      session.on('error', () => {});
      const began = performance.now();
      let last = 0;
      let strikes = 0;
      session.on('ping', () => {
        const now = performance.now();
        if (now - last < 700) strikes += 1;
        last = now;
        if (strikes < 2) return;
        lives.push(now - began);
        session.goaway(http2.constants.NGHTTP2_ENHANCE_YOUR_CALM, 0, Buffer.from('too_many_pings'));
        session.destroy();
      });
    });
    server.on('stream', (stream) => {
      stream.on('error', () => {});
      stream.respond({ ':status': 200, 'content-type': 'application/grpc' });
    });
    const kedge = await startKedge(t, { onH2: (socket) => server.emit('connection', socket) });
    const dialer = kedge.dialer({ grpc: { keepaliveTimeMs: 200, keepaliveTimeoutMs: 2000 } });
    const client = new (grpcDialer(dialer).wrap(EchoClient))(ADDRESS);
    let over = false;
    const keepStreaming = async () => {
      while (!over) {
        const stream = client.bidi();
        stream.on('error', () => {});
        stream.resume();
        await new Promise((resolve) => stream.on('status', resolve));
      }
    };
    const streaming = keepStreaming();
    await sleep(6000);
    over = true;
    assert.ok(lives.length <= 3, `${lives.length} connections ended for their PINGs`);
    assert.ok(lives.length >= 1);
    await dialer.destroy();
    await streaming;
  });
});

/** A frame of HTTP/2 (RFC 9113 §4.1) on stream 0. */
function frame(type: number, payload: Buffer): Buffer {
  const head = Buffer.alloc(9);
  head.writeUIntBE(payload.length, 0, 3);
  head[3] = type;
  return Buffer.concat([head, payload]);
}

/** SETTINGS, then a GOAWAY that leaves out every stream: Node's own server cannot say that of streams it has seen. */
function answerWithGoaway(socket: net.Socket, code: number): void {
  socket.write(frame(4, Buffer.alloc(0)));
  let bytes = 0;
  socket.on('data', (chunk: Buffer) => {
    bytes += chunk.length;
    // More than the preface and SETTINGS: the call is here.
    if (bytes < 150) return;
    const payload = Buffer.alloc(8);
    payload.writeUInt32BE(code, 4);
    socket.end(frame(7, payload));
  });
}

describe('a GOAWAY with an error', () => {
  it('sends what it says was not processed to the next kedge', async (t) => {
    for (const code of [http2.constants.NGHTTP2_ENHANCE_YOUR_CALM, http2.constants.NGHTTP2_INTERNAL_ERROR]) {
      const odd = await startKedge(t, { onH2: (socket) => answerWithGoaway(socket, code) });
      const good = await startGrpcKedge(t);
      const dialer = good.dialer({ mapper: single(good.route({ kedge: [odd.url, good.url] })) });
      const client = new (grpcDialer(dialer).wrap(EchoClient))(ADDRESS);
      for (let i = 0; i < 5; i += 1) assert.equal((await unary(client, 'x')).text, 'x');
      assert.ok(odd.handshakes > 0);
      assert.equal(good.calls.length, 5);
    }
  });
});

describe('a connection', () => {
  /** The HTTP/2 sessions of this process on which streams are opened, the newest last. */
  const sessionsOf = (t: TestContext) => {
    const sessions: http2.ClientHttp2Session[] = [];
    const see = (message: unknown) => {
      const { session } = (message as { stream: http2.ClientHttp2Stream }).stream;
      if (session !== undefined && !sessions.includes(session as http2.ClientHttp2Session))
        sessions.push(session as http2.ClientHttp2Session);
    };
    diagnostics.subscribe('http2.client.stream.created', see);
    t.after(() => void diagnostics.unsubscribe('http2.client.stream.created', see));
    return sessions;
  };

  it('that comes to the end of its stream numbers is replaced before', async (t) => {
    const kedge = await startGrpcKedge(t);
    const dialer = kedge.dialer();
    const client = new (grpcDialer(dialer).wrap(EchoClient))(ADDRESS);
    const sessions = sessionsOf(t);
    await unary(client, 'x');
    // As after 2^30 calls.
    (sessions[0] as unknown as { setNextStreamID(id: number): void }).setNextStreamID(2 ** 31 - 7);
    const stays = client.bidi();
    stays.on('error', () => {});
    stays.write({ text: 'still here' });
    for (let i = 0; i < 8; i += 1) assert.equal((await unary(client, `${i}`)).text, `${i}`);
    assert.equal(kedge.handshakes, 2);
    stays.end();
    const texts: string[] = [];
    for await (const { text } of stays as AsyncIterable<{ text: string }>) texts.push(text);
    assert.deepEqual(texts, ['still here'], 'its own calls go on');
    for (let i = 0; i < 50 && kedge.sockets.size > 1; i += 1) await sleep(10);
    assert.equal(kedge.sockets.size, 1);
  });

  it('that Node has given up this moment takes no more calls, which go to another one', async (t) => {
    const kedge = await startGrpcKedge(t);
    const dialer = kedge.dialer();
    const client = new (grpcDialer(dialer).wrap(EchoClient))(ADDRESS);
    const sessions = sessionsOf(t);
    const connect = t.mock.method(tls, 'connect');
    const giveUps = {
      destroyed: () => sessions.at(-1)!.destroy(),
      'without its socket': () => connect.mock.calls.at(-1)!.result!.destroy(),
      closed: () => sessions.at(-1)!.close(),
    };
    for (const [how, giveUp] of Object.entries(giveUps)) {
      for (let i = 0; i < 3; i += 1) {
        await unary(client, 'warm');
        giveUp();
        const calls = [unary(client, 'same tick')];
        process.nextTick(() => calls.push(unary(client, 'next tick')));
        await new Promise(setImmediate);
        calls.push(unary(client, 'later'));
        const failed = (await Promise.allSettled(calls)).filter(({ status }) => status === 'rejected');
        assert.deepEqual(failed, [], how);
      }
    }
    assert.equal(kedge.calls.length, 36, 'each call once');
    assert.equal(dialer.stats().inFlight, 0);
  });

  it('on which HTTP/2 cannot begin is a failed dial, and the next one is not', async (t) => {
    const kedge = await startGrpcKedge(t);
    const dialer = kedge.dialer();
    const client = new (grpcDialer(dialer).wrap(EchoClient))(ADDRESS);
    const begin = t.mock.method(http2, 'connect', () => {
      throw new Error('instrumented');
    });
    const failed = (error: grpc.ServiceError) => {
      assert.ok(isKedgeError(error.cause));
      assert.deepEqual([error.cause.code, error.cause.stage], ['ERR_KEDGE_CONNECT', 'connect']);
      assert.equal((error.cause.cause as Error).message, 'instrumented');
      return true;
    };
    await Promise.all(['x', 'y'].map((text) => assert.rejects(unary(client, text), failed)));
    assert.equal(dialer.stats().kedges[0]!.failures, 1);
    begin.mock.restore();
    const patient = new grpc.Metadata({ waitForReady: true });
    assert.equal((await unary(client, 'x', patient)).text, 'x');
    for (let i = 0; i < 50 && kedge.sockets.size > 1; i += 1) await sleep(10);
    assert.equal(kedge.sockets.size, 1);
  });
});

describe('a kedge that is killed again and again under load', () => {
  it('leaves no call waiting on a connection whose end Node missed', async (t) => {
    const { ca, dialer: dialerOf, route } = await startKedge(t);
    const { cert, key } = await ca.issue({ cn: 'us1.kedge.test', dns: ['us1.kedge.test'] });
    const start = async (port: number) => {
      const child = fork(new URL('../helpers/mortal-kedge.ts', import.meta.url));
      t.after(() => child.kill('SIGKILL'));
      child.send({ cert, key, ca: ca.cert, port });
      const [up] = (await once(child, 'message')) as [{ port: number }];
      return { child, port: up.port };
    };
    let { child, port } = await start(0);
    const dialer = dialerOf({ mapper: single(route({ kedge: `https://127.0.0.1:${port}` })) });
    const client = new (grpcDialer(dialer).wrap(EchoClient))(ADDRESS);
    const late: string[] = [];
    let over = false;
    const call = async () => {
      while (!over) {
        await unary(client, 'x'.repeat(20_000), undefined, { deadline: Date.now() + 3000 }).catch(async (error) => {
          await sleep(1);
          if (error.code === grpc.status.DEADLINE_EXCEEDED) late.push(error.details);
        });
      }
    };
    const calls = Array.from({ length: 60 }, call);
    for (let kills = 0; kills < 20; kills += 1) {
      await sleep(300 * (0.5 + Math.random()));
      child.kill('SIGKILL');
      ({ child, port } = await start(port));
    }
    over = true;
    await Promise.all(calls);
    assert.deepEqual(late, []);
  });
});
