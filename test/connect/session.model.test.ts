/**
 * The connections of connect-es against a simple model: seeded random rounds of calls while kedges answer, refuse, reset, say
 * GOAWAY, go silent, change their limits, cut connections, and certificates rotate. KEDGE_TEST_MODEL_STEPS walks further,
 * KEDGE_TEST_SEED walks the same way again.
 */
import assert from 'node:assert/strict';
import { subscribe } from 'node:diagnostics_channel';
import http2 from 'node:http2';
import type { Socket } from 'node:net';
import { describe, it, type TestContext } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { connectDialer } from '../../src/connectrpc/index.ts';
import { type Dialer, single, type TokenSource } from '../../src/index.ts';
import { pick, random as seeded } from '../chaos/random.ts';
import { exitAtOnce } from '../helpers/exit.ts';
import { startKedge, type TestKedge } from '../helpers/kedge.ts';
import { trackLeaks } from '../helpers/leaks.ts';
import { rotating } from '../helpers/rotating.ts';
import { until } from '../helpers/until.ts';

exitAtOnce();

const STEPS = Number(process.env.KEDGE_TEST_MODEL_STEPS ?? 50_000);
const SEED = Number(process.env.KEDGE_TEST_SEED ?? Math.floor(Math.random() * 2 ** 31));
const STEPS_OF_A_WORLD = 10_000;
const MAX_CONNECTIONS = 3;
const CALLS = 40;
/** Longer than anything that a call may wait for. */
const END_MS = 5_000;
const { NGHTTP2_CANCEL, NGHTTP2_ENHANCE_YOUR_CALM, NGHTTP2_REFUSED_STREAM } = http2.constants;

const DEEDS = ['answer', 'answer', 'answer', 'late', 'refuse', 'reset', 'goaway', 'angry', 'cut', 'silent'] as const;
type Deed = (typeof DEEDS)[number];

type Random = () => number;

/** How a kedge takes connections. */
type Door = 'open' | 'refuses' | 'mute' | 'slow';

interface Actor {
  readonly kedge: TestKedge;
  readonly sessions: Set<http2.ServerHttp2Session>;
  door: Door;
  streams: number;
}

async function startActor(t: TestContext): Promise<Actor> {
  const server = http2.createServer();
  const sessions = new Set<http2.ServerHttp2Session>();
  server.on('session', (session) => {
    sessions.add(session);
    session.on('error', () => {});
    session.once('close', () => sessions.delete(session));
  });
  const deeds: Record<Deed, (stream: http2.ServerHttp2Stream) => void> = {
    answer: (stream) => {
      if (stream.closed) return;
      stream.respond({ ':status': 200 });
      stream.end('ok');
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
    actor.streams += 1;
    deeds[headers['x-deed'] as Deed](stream.resume());
  });
  const kedge = await startKedge(t, {
    onTcp: (socket) => {
      if (actor.door === 'refuses') socket.destroy();
      return actor.door === 'refuses';
    },
    onH2: (socket) => {
      if (actor.door === 'mute') {
        socket.resume();
        return;
      }
      const speak = () => void (socket.destroyed || server.emit('connection', socket));
      if (actor.door === 'slow') setTimeout(speak, 30);
      else speak();
    },
  });
  const actor: Actor = { kedge, sessions, door: 'open', streams: 0 };
  return actor;
}

/** A token that is there now and then. */
function fitful(random: Random): TokenSource {
  const token = async () => {
    await sleep(random() * 3);
    if (random() < 0.1) throw new Error('not now');
    return 'token';
  };
  return { name: 'fitful', peek: () => (random() < 0.8 ? 'token' : undefined), token };
}

/** Our ends of connections: a kedge in this process may miss the end of one. */
const sockets = new Set<Socket>();
subscribe('net.client.socket', (message) => {
  const { socket } = message as { socket: Socket };
  sockets.add(socket);
  socket.once('close', () => sockets.delete(socket));
});

/** One call: it settles once, and within its bound. */
async function call(dialer: Dialer, random: Random, deed: Deed): Promise<string> {
  const manager = connectDialer(dialer).sessionManager('http://greeter.us1:9090');
  const abort = new AbortController();
  const timer = random() < 0.2 || deed === 'silent' ? setTimeout(() => abort.abort(), random() * 20) : undefined;
  const headers = Object.freeze({ 'content-type': 'application/grpc', 'x-deed': deed, 'grpc-timeout': '2S' });
  try {
    const stream = await manager.request('POST', '/', headers, { signal: abort.signal });
    const closed = new Promise<void>((resolve) => stream.once('close', resolve));
    let errors = 0;
    let answers = 0;
    stream.on('error', () => {
      errors += 1;
    });
    stream.on('response', () => {
      answers += 1;
    });
    const cancel = () => stream.close(NGHTTP2_CANCEL);
    if (abort.signal.aborted) cancel();
    else abort.signal.addEventListener('abort', cancel);
    stream.resume().end('x');
    await closed;
    assert.ok(answers <= 1 && errors <= 1, 'it ends once');
    return answers === 1 ? 'answered' : 'broken';
  } catch (error) {
    assert.equal((error as Error).name, 'ConnectError', String(error));
    return 'failed';
  } finally {
    clearTimeout(timer);
  }
}

async function within<T>(ms: number, what: string, promise: Promise<T>): Promise<T> {
  const { promise: late, reject } = Promise.withResolvers<never>();
  const timer = setTimeout(() => reject(new Error(`${what} took more than ${ms} ms`)), ms);
  return Promise.race([promise, late]).finally(() => clearTimeout(timer));
}

/** Rounds of calls in one dialer; returns the steps. */
async function walk(t: TestContext, random: Random, steps: number): Promise<number> {
  const actors = await Promise.all([startActor(t), startActor(t)]);
  const [first, second] = actors as [Actor, Actor];
  const identity = rotating(first.kedge);
  const dialer = first.kedge.dialer({
    identity,
    mapper: single(first.kedge.route({ kedge: [first.kedge.url, second.kedge.url], proxyAuth: fitful(random) })),
    connect: { timeoutMs: 200, handshakeTimeoutMs: 100 },
    drainTimeoutMs: 500,
    grpc: {
      maxConnections: MAX_CONNECTIONS,
      maxStreamsPerConnection: 10,
      keepaliveTimeMs: 100,
      keepaliveTimeoutMs: 1000,
    },
    failover: { breaker: { failures: 2, backoffMs: 20, maxBackoffMs: 40 } },
    onWarning: () => {},
  });
  let done = 0;
  while (done < steps) {
    const calm = random() < 0.3;
    for (const actor of actors) {
      done += 1;
      actor.door = calm ? 'open' : pick(random, ['open', 'open', 'open', 'refuses', 'mute', 'slow'] as const);
      const maxConcurrentStreams = calm ? 100 : pick(random, [1, 5, 100]);
      for (const session of actor.sessions)
        if (!session.closed && !session.destroyed) session.settings({ maxConcurrentStreams });
      if (random() < 0.1) for (const session of actor.sessions) session.destroy();
    }
    if (random() < 0.1) await identity.rotate();
    const calls = Array.from({ length: CALLS }, async () => {
      if (random() < 0.3) await sleep(random() * 10);
      done += 3;
      return call(dialer, random, calm ? pick(random, ['answer', 'late'] as const) : pick(random, DEEDS));
    });
    await within(END_MS, 'a call', Promise.all(calls));
    await until('no call is held', () => dialer.stats().inFlight === 0);
    for (const stats of dialer.stats().kedges) {
      // Those of a generation that is being given up may still be there.
      await until('no more connections than allowed', () => {
        const now = dialer.stats().kedges.find(({ kedge }) => kedge === stats.kedge);
        return (now?.connections ?? 0) <= MAX_CONNECTIONS;
      });
    }
  }
  for (const actor of actors) actor.door = 'open';
  const before = first.streams;
  await until('calls go to the first kedge again', () => {
    void call(dialer, random, 'answer');
    return first.streams > before;
  });
  if (random() < 0.5) await within(END_MS, 'close()', dialer.close());
  else await within(END_MS, 'destroy()', dialer.destroy());
  await until('no connection is left', () => sockets.size === 0);
  assert.equal(dialer.stats().inFlight, 0);
  return done;
}

describe('connections for connect-es, by a random walk', () => {
  it('end every call once, hold nothing, and come back', async (t) => {
    trackLeaks(t);
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
