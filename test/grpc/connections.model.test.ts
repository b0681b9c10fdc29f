/**
 * gRPC connections against a simple model: seeded random rounds of calls while addresses are dead, silent, slow or well, kedges
 * say GOAWAY, change their limits and cut connections, certificates rotate, and clients with options of their own come and
 * go. KEDGE_TEST_MODEL_STEPS walks further, KEDGE_TEST_SEED walks the same way again.
 */
import assert from 'node:assert/strict';
import { subscribe } from 'node:diagnostics_channel';
import dns from 'node:dns';
import { once } from 'node:events';
import http2 from 'node:http2';
import net from 'node:net';
import { describe, it, type TestContext } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import * as grpc from '@grpc/grpc-js';
import { grpcDialer } from '../../src/grpc/index.ts';
import { single } from '../../src/index.ts';
import { pick, random as seeded } from '../chaos/random.ts';
import { exitAtOnce } from '../helpers/exit.ts';
import { type EchoClient, echoClient } from '../helpers/grpc-kedge.ts';
import { startKedge } from '../helpers/kedge.ts';
import { trackLeaks } from '../helpers/leaks.ts';
import { rotating } from '../helpers/rotating.ts';
import { until } from '../helpers/until.ts';

exitAtOnce();

const STEPS = Number(process.env.KEDGE_TEST_MODEL_STEPS ?? 100_000);
const SEED = Number(process.env.KEDGE_TEST_SEED ?? Math.floor(Math.random() * 2 ** 31));
const STEPS_OF_A_WORLD = 10_000;
const MAX_CONNECTIONS = 6;
const CALLS = 100;
/** What a call may take, and what it may be late in a busy process, in ms. */
const DEADLINE_MS = 1_500;
const LATE_MS = 2_500;
const NAME = 'two.kedge.test';
const Client = echoClient();

const DEEDS = ['answer', 'answer', 'answer', 'late', 'refuse', 'reset', 'goaway', 'angry', 'cut', 'silent'] as const;
type Deed = (typeof DEEDS)[number];
const DOORS = ['open', 'open', 'closes', 'stalls', 'slow'] as const;
type Door = (typeof DOORS)[number];
type Random = () => number;

/** Our ends of connections: a kedge in this process may miss the end of one. */
const sockets = new Set<net.Socket>();
/** Those of the relays are not ours. */
const relayed = new WeakSet<net.Socket>();
subscribe('net.client.socket', (message) => {
  const { socket } = message as { socket: net.Socket };
  queueMicrotask(() => {
    if (relayed.has(socket) || socket.destroyed) return;
    sockets.add(socket);
    socket.once('close', () => sockets.delete(socket));
  });
});

function startServer(counts: { streams: number }) {
  const server = http2.createServer();
  const sessions = new Set<http2.ServerHttp2Session>();
  server.on('session', (session) => {
    sessions.add(session);
    session.on('error', () => {});
    session.once('close', () => sessions.delete(session));
  });
  const { NGHTTP2_CANCEL, NGHTTP2_ENHANCE_YOUR_CALM, NGHTTP2_REFUSED_STREAM } = http2.constants;
  const deeds: Record<Deed, (stream: http2.ServerHttp2Stream) => void> = {
    answer: (stream) => {
      if (stream.closed) return;
      stream.on('wantTrailers', () => stream.sendTrailers({ 'grpc-status': '0' }));
      stream.respond({ ':status': 200, 'content-type': 'application/grpc' }, { waitForTrailers: true });
      stream.end(Buffer.from([0, 0, 0, 0, 2, 0x7b, 0x7d]));
    },
    late: (stream) => void setTimeout(() => deeds.answer(stream), 5),
    refuse: (stream) => stream.close(NGHTTP2_REFUSED_STREAM),
    reset: (stream) => stream.close(NGHTTP2_CANCEL),
    goaway: (stream) => {
      stream.session?.goaway(0);
      setTimeout(() => deeds.answer(stream), 5);
    },
    angry: (stream) => stream.session?.goaway(NGHTTP2_ENHANCE_YOUR_CALM),
    // Not while its stream is being announced: Node's server corrupts its memory (22: "onread->IsFunction()", 26: malloc()).
    cut: (stream) => void setImmediate(() => stream.session?.destroy()),
    silent: () => {},
  };
  server.on('stream', (stream, headers) => {
    stream.on('error', () => {});
    counts.streams += 1;
    deeds[headers['x-deed'] as Deed](stream.resume());
  });
  return { server, sessions };
}

/** One address of the kedge, which a door stands before. */
async function startAddress(t: TestContext, host: string, port: number, upstream: number) {
  const address = { door: 'open' as Door, port };
  const open = new Set<net.Socket>();
  const track = (socket: net.Socket) => {
    open.add(socket);
    socket.on('error', () => {});
    socket.once('close', () => open.delete(socket));
  };
  const server = net.createServer((socket) => {
    track(socket);
    const { door } = address;
    if (door === 'closes') socket.destroy();
    else if (door === 'stalls') socket.resume();
    else {
      const onward = net.connect(upstream, '127.0.0.1');
      relayed.add(onward);
      track(onward);
      onward.once('close', () => socket.destroy());
      socket.once('close', () => onward.destroy());
      if (door === 'open') socket.pipe(onward).pipe(socket);
      else setTimeout(() => socket.pipe(onward).pipe(socket), 30);
    }
  });
  server.listen(port, host);
  await once(server, 'listening');
  address.port = (server.address() as net.AddressInfo).port;
  t.after(() => {
    for (const socket of open) socket.destroy();
    server.close();
  });
  return address;
}

/** One call: it ends once, and in time. */
async function call(client: EchoClient, random: Random, deed: Deed): Promise<void> {
  const metadata = new grpc.Metadata({ waitForReady: random() < 0.2 });
  metadata.set('x-deed', deed);
  const deadlineMs = deed === 'silent' ? 50 : DEADLINE_MS;
  const began = performance.now();
  let ends = 0;
  await new Promise<void>((resolve) => {
    const running = client.unary({ text: 'x' }, metadata, { deadline: Date.now() + deadlineMs }, () => {
      ends += 1;
      resolve();
    });
    if (random() < 0.1) setTimeout(() => running.cancel(), random() * 20);
  });
  const took = performance.now() - began;
  assert.ok(took < deadlineMs + LATE_MS, `a call took ${took} ms`);
  await sleep(1);
  assert.equal(ends, 1);
}

async function walk(t: TestContext, random: Random, steps: number): Promise<number> {
  const counts = [{ streams: 0 }, { streams: 0 }] as const;
  const servers = counts.map(startServer);
  const kedges = await Promise.all(
    servers.map(({ server }) => startKedge(t, { onH2: (socket) => server.emit('connection', socket) })),
  );
  const [first, second] = kedges as [(typeof kedges)[0], (typeof kedges)[0]];
  const one = await startAddress(t, '127.0.0.2', 0, first.port);
  const two = await startAddress(t, '127.0.0.3', one.port, first.port);
  const identity = rotating(first);
  const dialer = first.dialer({
    identity,
    mapper: single(first.route({ kedge: [`https://${NAME}:${one.port}`, second.url] })),
    connect: { timeoutMs: 200, handshakeTimeoutMs: 150 },
    drainTimeoutMs: 500,
    grpc: {
      maxConnections: MAX_CONNECTIONS,
      maxStreamsPerConnection: 20,
      keepaliveTimeMs: 100,
      keepaliveTimeoutMs: 1000,
    },
    failover: { breaker: { failures: 3, backoffMs: 20, maxBackoffMs: 40 } },
    onWarning: () => {},
  });
  const { wrap } = grpcDialer(dialer);
  const open = () => {
    const options = { 'grpc-node.flow_control_window': pick(random, [1_000_000, 1_000_001, 1_000_002]) };
    return new (wrap(Client))('greeter.us1:9090', undefined, options);
  };
  const clients = [open(), open()];
  let done = 0;
  while (done < steps) {
    const calm = random() < 0.3;
    for (const address of [one, two]) {
      done += 1;
      address.door = calm ? 'open' : pick(random, DOORS);
    }
    for (const { sessions } of servers) {
      const maxConcurrentStreams = calm ? 100 : pick(random, [0, 1, 5, 100]);
      for (const session of sessions) {
        if (session.closed || session.destroyed) continue;
        session.settings({ maxConcurrentStreams });
        // None for a moment (RFC 9113 §6.5.2).
        if (maxConcurrentStreams === 0) {
          setTimeout(() => session.destroyed || session.settings({ maxConcurrentStreams: 10 }), 20);
        }
        if (random() < 0.05) session.destroy();
      }
    }
    if (random() < 0.1) await identity.rotate();
    if (random() < 0.3) {
      done += 1;
      if (clients.length > 2) clients.shift()!.close();
      else clients.push(open());
    }
    const deeds = calm ? (['answer', 'late'] as const) : DEEDS;
    const calls = Array.from({ length: CALLS }, async () => {
      if (random() < 0.3) await sleep(random() * 10);
      done += 3;
      await call(pick(random, clients), random, pick(random, deeds));
    });
    await Promise.all(calls);
    await until('no call is held', () => dialer.stats().inFlight === 0);
    await until('no more connections than allowed', () =>
      dialer.stats().kedges.every(({ connections }) => connections <= MAX_CONNECTIONS),
    );
  }
  for (const address of [one, two]) address.door = 'open';
  const before = counts[0].streams;
  for (let i = 0; i < 300 && counts[0].streams === before; i += 1) {
    await call(clients[0]!, random, 'answer');
    await sleep(5);
  }
  assert.ok(counts[0].streams > before, 'calls go to the first kedge again');
  for (const client of clients) client.close();
  await (random() < 0.5 ? dialer.close() : dialer.destroy());
  await until('no connection is left', () => sockets.size === 0);
  assert.equal(dialer.stats().inFlight, 0);
  return done;
}

describe('gRPC connections, by a random walk', { skip: process.platform !== 'linux' }, () => {
  it('end every call once and in time, hold nothing, and come back', async (t) => {
    trackLeaks(t);
    const addresses = ['127.0.0.2', '127.0.0.3'];
    t.mock.method(dns.promises, 'lookup', async () => addresses.map((address) => ({ address, family: 4 })));
    const warnings: Error[] = [];
    const warn = (warning: Error) => warnings.push(warning);
    process.on('warning', warn);
    t.after(() => process.off('warning', warn));
    const random = seeded(SEED);
    const began = performance.now();
    let steps = 0;
    try {
      while (steps < STEPS) steps += await walk(t, random, Math.min(STEPS_OF_A_WORLD, STEPS - steps));
    } finally {
      t.diagnostic(`seed ${SEED}, ${steps} steps, ${Math.round(performance.now() - began)} ms`);
    }
    assert.deepEqual(
      warnings.filter(({ name }) => name === 'MaxListenersExceededWarning'),
      [],
    );
  });
});
