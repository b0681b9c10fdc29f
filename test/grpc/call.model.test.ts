/**
 * gRPC calls against a simple model: seeded random walks through all that a caller, a kedge and the dialer's owner can do.
 * KEDGE_TEST_MODEL_STEPS walks further, KEDGE_TEST_SEED walks the same way again.
 */
import assert from 'node:assert/strict';
import http2 from 'node:http2';
import type { Socket } from 'node:net';
import { describe, it, type TestContext } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import * as grpc from '@grpc/grpc-js';
import { grpcDialer } from '../../src/grpc/index.ts';
import { type Dialer, single, type TokenSource } from '../../src/index.ts';
import { exitAtOnce } from '../helpers/exit.ts';
import { startKedge, type TestKedge } from '../helpers/kedge.ts';
import { trackLeaks } from '../helpers/leaks.ts';
import { rotating } from '../helpers/rotating.ts';

exitAtOnce();

const STEPS = Number(process.env.KEDGE_TEST_MODEL_STEPS ?? 100_000);
const SEED = Number(process.env.KEDGE_TEST_SEED ?? Math.floor(Math.random() * 2 ** 31));
const STEPS_OF_A_WORLD = 4_000;
const CALLS_OF_A_ROUND = 40;
const MAX_ATTEMPTS = 3;
const REPLAY_BYTES = 65_536;
/** Longer than anything that a call may wait for where nothing is lost. */
const END_MS = 15_000;
/**
 * Where connections are lost on purpose, some calls wait for their deadlines on a connection whose other end is gone and
 * that grpc-js still holds for ready. Why is not known yet; so in a rough round they have short ones.
 */
const ROUGH_END_MS = 250;

const { status } = grpc;
const { NGHTTP2_CANCEL, NGHTTP2_INTERNAL_ERROR, NGHTTP2_REFUSED_STREAM } = http2.constants;

/** Mulberry32. */
function randomOf(seed: number) {
  let state = seed;
  const next = () => {
    state = (state + 0x6d2b79f5) | 0;
    let x = Math.imul(state ^ (state >>> 15), state | 1);
    x ^= x + Math.imul(x ^ (x >>> 7), x | 61);
    return ((x ^ (x >>> 14)) >>> 0) / 2 ** 32;
  };
  const below = (n: number) => Math.floor(next() * n);
  return { chance: (p: number) => next() < p, below, pick: <T>(of: readonly T[]): T => of[below(of.length)]! };
}
type Random = ReturnType<typeof randomOf>;

/** What a kedge does with a call, after so many of its messages. */
const CALM = ['answer', 'answer', 'answer', 'late', 'refuse', 'early', 'status', 'reset'] as const;
const ROUGH = [...CALM, 'cut', 'goaway', 'silent'] as const;
type Deed = (typeof ROUGH)[number];
interface Plan {
  readonly deed: Deed;
  readonly after: number;
}

/** One stream as a kedge saw it. */
interface Seen {
  readonly kedge: string;
  readonly messages: string[];
  refused: boolean;
  completed: boolean;
}

interface Call {
  readonly id: number;
  readonly method: 'Once' | 'Again' | 'Hedged';
  readonly plans: Readonly<Record<string, Plan>>;
  readonly seen: Seen[];
  readonly sent: string[];
  readonly replies: string[];
  bytes: number;
  metadata: number;
  statuses: grpc.StatusObject[];
  cancelled: boolean;
  bounded: boolean;
  tokenFails: boolean;
  readonly log: string[];
  readonly ended: Promise<void>;
  readonly end: () => void;
}

function framed(text: string): Buffer {
  const bytes = Buffer.from(text);
  const head = Buffer.alloc(5);
  head.writeUInt32BE(bytes.length, 1);
  return Buffer.concat([head, bytes]);
}

/** The HTTP/2 end of a kedge that does to each call what the call's plan says. */
function actor(name: string, calls: Map<number, Call>) {
  const server = http2.createServer();
  const sessions = new Set<http2.ServerHttp2Session>();
  const head = { ':status': 200, 'content-type': 'application/grpc' };
  /** The last stream that a session's GOAWAY spoke of: Node goes on with later ones that came in the same read. */
  const lasts = new WeakMap<object, number>();
  const newest = new WeakMap<object, number>();
  server.on('session', (session) => {
    sessions.add(session);
    session.on('close', () => sessions.delete(session));
    session.on('error', () => {});
  });
  server.on('stream', (stream, headers) => {
    stream.on('error', () => {});
    const { session } = stream;
    if (session === undefined || stream.id! > (lasts.get(session) ?? Number.POSITIVE_INFINITY)) return;
    newest.set(session, stream.id!);
    const call = calls.get(Number(headers['x-id']));
    if (call === undefined) {
      stream.close(NGHTTP2_CANCEL);
      return;
    }
    const { deed, after } = call.plans[name]!;
    const seen: Seen = { kedge: name, messages: [], refused: false, completed: false };
    call.seen.push(seen);
    let done = false;
    const answer = () => {
      if (stream.destroyed || stream.closed) return;
      seen.completed = true;
      stream.respond(head, { waitForTrailers: true });
      stream.on('wantTrailers', () => stream.sendTrailers({ 'grpc-status': '0' }));
      stream.end(framed(JSON.stringify(seen.messages.map((each) => each.split(' ')[0]))));
    };
    const act = (atEnd: boolean) => {
      if (done || stream.destroyed || stream.closed) return;
      if (!atEnd && (deed === 'answer' || deed === 'late' || deed === 'status' || seen.messages.length < after)) return;
      done = true;
      if (deed === 'answer') answer();
      else if (deed === 'late') setTimeout(answer, 1 + after * 3);
      else if (deed === 'status' || deed === 'early') {
        const [code, message] = [
          [14, 'Connection dropped'],
          [16, 'who?'],
          [5, 'nothing'],
        ][after % 3]!;
        stream.respond({ ...head, 'grpc-status': String(code), 'grpc-message': String(message) }, { endStream: true });
        if (!atEnd) stream.close();
      } else if (deed === 'refuse') {
        seen.refused = true;
        stream.close(NGHTTP2_REFUSED_STREAM);
      } else if (deed === 'reset') stream.close(after % 2 === 0 ? NGHTTP2_CANCEL : NGHTTP2_INTERNAL_ERROR);
      else if (deed === 'cut') stream.session?.socket.destroy();
      else if (deed === 'goaway' && !lasts.has(session)) {
        lasts.set(session, newest.get(session)!);
        session.goaway([0, 2, 11][after % 3], newest.get(session));
      }
    };
    let buffered = Buffer.alloc(0);
    stream.on('data', (chunk: Buffer) => {
      buffered = Buffer.concat([buffered, chunk]);
      while (buffered.length >= 5 && buffered.length >= 5 + buffered.readUInt32BE(1)) {
        const length = buffered.readUInt32BE(1);
        seen.messages.push(buffered.toString('latin1', 5, 5 + length));
        buffered = buffered.subarray(5 + length);
        act(false);
      }
    });
    stream.on('end', () => act(true));
    act(false);
  });
  return {
    accept: (socket: Socket) => server.emit('connection', socket),
    cut: () => {
      for (const session of sessions) session.destroy();
    },
  };
}

/** Kedges that outlive the dialers which are tried on them. */
async function startKedges(t: TestContext, calls: Map<number, Call>) {
  const [first, second] = [actor('first', calls), actor('second', calls)];
  const weather = { is: 'up' as 'up' | 'down' | 'slow' };
  const onTcp = (socket: Socket) => {
    if (weather.is === 'up') return false;
    socket.on('error', () => {});
    if (weather.is === 'down') socket.resetAndDestroy();
    else setTimeout(() => socket.destroy(), 300);
    return true;
  };
  const kedges = {
    first: await startKedge(t, { onTcp, onH2: first.accept }),
    second: await startKedge(t, { onH2: second.accept }),
  };
  return { ...kedges, weather, cut: { first: first.cut, second: second.cut } };
}

interface World {
  readonly dialer: Dialer;
  readonly channel: grpc.ChannelInterface;
  readonly rotate: () => Promise<unknown>;
  readonly tokens: { mode: 'there' | 'late' | 'failing' };
}

function makeWorld(first: TestKedge, second: TestKedge): World {
  const tokens: World['tokens'] = { mode: 'there' };
  const proxyAuth: TokenSource = {
    name: 'model',
    peek: () => (tokens.mode === 'there' ? 'token' : undefined),
    token: async () => {
      if (tokens.mode === 'failing') throw new Error('no token');
      await sleep(2);
      return 'token';
    },
    invalidate: () => {
      throw new Error('cannot');
    },
  };
  const identity = rotating(first);
  const mapper = single(first.route({ kedge: [first.url, second.url], proxyAuth }));
  const connect = { timeoutMs: 1000, handshakeTimeoutMs: 1000 };
  const failover = { replayBytes: REPLAY_BYTES, breaker: { backoffMs: 20, maxBackoffMs: 50 } };
  const dialer = first.dialer({ mapper, identity, connect, failover, drainTimeoutMs: 5_000, onWarning: () => {} });
  const retryPolicy = {
    maxAttempts: MAX_ATTEMPTS,
    initialBackoff: '0.002s',
    maxBackoff: '0.004s',
    backoffMultiplier: 1,
    retryableStatusCodes: ['UNAVAILABLE'],
  };
  const hedgingPolicy = { maxAttempts: MAX_ATTEMPTS, hedgingDelay: '0.003s', nonFatalStatusCodes: ['UNAVAILABLE'] };
  const config = {
    methodConfig: [
      { name: [{ service: 'm.S', method: 'Again' }], retryPolicy },
      { name: [{ service: 'm.S', method: 'Hedged' }], hedgingPolicy },
    ],
  };
  const options = { 'grpc.service_config': JSON.stringify(config) };
  const channel = grpcDialer(dialer).channel('model.us1:1', undefined, options);
  return { dialer, channel, rotate: () => identity.rotate(), tokens };
}

let lastId = 0;

function newCall(random: Random, deeds: readonly Deed[]): Call {
  const { promise, resolve } = Promise.withResolvers<void>();
  const plan = () => ({ deed: random.pick(deeds), after: random.below(4) });
  lastId += 1;
  return {
    id: lastId,
    method: random.pick(['Once', 'Again', 'Hedged']),
    plans: { first: plan(), second: plan() },
    seen: [],
    sent: [],
    replies: [],
    bytes: 0,
    metadata: 0,
    statuses: [],
    cancelled: false,
    bounded: false,
    tokenFails: false,
    log: [],
    ended: promise,
    end: resolve,
  };
}

/** One caller; returns how many steps it made. */
async function walk(world: World, call: Call, random: Random, endMs: number): Promise<number> {
  let steps = 0;
  const step = (what: string) => {
    steps += 1;
    call.log.push(what);
  };
  const silent = Object.values(call.plans).some(({ deed }) => deed === 'silent');
  call.bounded = silent || random.chance(0.1);
  const deadline = Date.now() + (call.bounded ? random.below(silent ? 150 : 30) : endMs);
  const live = world.channel.createCall(`/m.S/${call.method}`, deadline, null, null, null);
  step(`create ${JSON.stringify(call.plans)}`);
  if (random.chance(0.15)) {
    const wait = random.below(4);
    live.setCredentials(
      grpc.credentials.createFromMetadataGenerator((_options, callback) => {
        const added = new grpc.Metadata();
        added.set('x-own', 'own');
        if (wait === 0) callback(null, added);
        else setTimeout(callback, wait, null, added);
      }),
    );
    step('setCredentials');
  }
  const metadata = new grpc.Metadata({ waitForReady: random.chance(0.2) });
  metadata.set('x-id', String(call.id));
  live.start(metadata, {
    onReceiveMetadata: () => {
      assert.equal(call.replies.length, 0, 'metadata after a message');
      assert.equal(call.statuses.length, 0, 'metadata after the status');
      call.metadata += 1;
    },
    onReceiveMessage: (message: Buffer) => {
      assert.equal(call.statuses.length, 0, 'a message after the status');
      assert.equal(call.metadata, 1, 'a message before metadata');
      call.replies.push(message.toString('latin1'));
      live.startRead();
    },
    onReceiveStatus: (received: grpc.StatusObject) => {
      call.statuses.push(received);
      call.log.push(`status ${received.code} ${received.details}`);
      call.end();
    },
  });
  step('start');
  const pause = async () => {
    const kind = random.below(5);
    if (kind === 1) await null;
    else if (kind === 2) await new Promise(setImmediate);
    else if (kind === 3) await sleep(random.below(4));
  };
  const actions = ['read', ...Array.from({ length: random.below(8) }, () => 'send' as const)];
  if (random.chance(0.07)) actions.splice(random.below(actions.length + 1), 0, 'cancel');
  const size = random.chance(0.02) ? 30_000 : random.below(300);
  for (const action of actions) {
    step(action);
    if (action === 'read') live.startRead();
    else if (action === 'cancel') {
      call.cancelled = true;
      live.cancelWithStatus(status.CANCELLED, 'enough');
    } else {
      const text = `${call.sent.length} ${'x'.repeat(size)}`;
      call.sent.push(text);
      const bytes = Buffer.from(text);
      call.bytes += bytes.length;
      const { promise, resolve } = Promise.withResolvers<void>();
      let heard = 0;
      const callback = () => {
        heard += 1;
        assert.equal(heard, 1, 'a write was done twice');
        resolve();
      };
      live.sendMessageWithContext({ callback }, bytes);
      // Some wait for their writes, as grpc-js's own clients do.
      if (random.chance(0.3)) await Promise.race([promise, call.ended]);
    }
    await pause();
  }
  step('halfClose');
  live.halfClose();
  await Promise.race([call.ended, sleep(END_MS + 5_000, undefined, { ref: false })]);
  return steps;
}

function checkCall(call: Call, calm: boolean): void {
  assert.equal(call.statuses.length, 1, 'exactly one status');
  assert.ok(call.metadata <= 1, 'metadata at most once');
  const executed = call.seen.filter(({ refused }) => !refused);
  assert.ok(executed.length <= (call.method === 'Once' ? 1 : MAX_ATTEMPTS), `executed ${executed.length} times`);
  for (const { messages, kedge } of call.seen) {
    assert.deepEqual(messages, call.sent.slice(0, messages.length), `${kedge} got what was sent, in order, once`);
  }
  const [{ code, details }] = call.statuses as [grpc.StatusObject];
  if (code === status.OK) {
    const completed = call.seen.filter((each) => each.completed);
    const all = JSON.stringify(call.sent.map((text) => text.split(' ')[0]));
    assert.ok(
      completed.some(({ messages }) => messages.length === call.sent.length),
      'all was received where it ended well',
    );
    assert.deepEqual(call.replies, [all]);
  }
  // Nothing got in its way: the second kedge would have answered.
  const wellBehaved = (name: string, deeds: readonly Deed[]) => deeds.includes(call.plans[name]!.deed);
  if (!calm || call.cancelled || call.bounded || call.tokenFails || call.bytes > REPLAY_BYTES / 2) return;
  if (wellBehaved('first', ['answer', 'late', 'refuse']) && wellBehaved('second', ['answer', 'late'])) {
    // A stream that is refused while it is written to ends with this, and grpc-js does not say that it was refused.
    if (details.startsWith('Write error')) return;
    // Hedging sends by the clock: all its attempts may be on their way to the first kedge before that has refused one.
    if (call.method === 'Hedged' && call.seen.filter(({ refused }) => refused).length >= MAX_ATTEMPTS) return;
    assert.equal(code, status.OK, 'a call that a kedge would have answered');
  }
}

describe('gRPC calls', () => {
  it(`keep their promises in whatever order things happen (seed ${SEED})`, { timeout: 3_600_000 }, async (t) => {
    trackLeaks(t);
    const random = randomOf(SEED);
    const calls = new Map<number, Call>();
    const { first, second, weather, cut } = await startKedges(t, calls);
    let steps = 0;
    let worlds = 0;
    let made = 0;
    let rotations = 0;
    const codes = new Map<string, number>();
    while (steps < STEPS) {
      const world = makeWorld(first, second);
      worlds += 1;
      const endOfWorld = Math.min(steps + STEPS_OF_A_WORLD, STEPS);
      // Calm rounds first, then two rough ones, and a new dialer.
      let rough = 0;
      while (steps < endOfWorld && rough < 2) {
        if (rough > 0 || random.chance(0.2)) rough += 1;
        const calm = rough === 0;
        const last = rough === 2 || steps + CALLS_OF_A_ROUND * 7 >= endOfWorld;
        weather.is = 'up';
        world.tokens.mode = random.pick(['there', 'there', 'there', 'late']);
        const round = Array.from({ length: CALLS_OF_A_ROUND }, () => newCall(random, calm ? CALM : ROUGH));
        for (const call of round) calls.set(call.id, call);
        const walking = round.map((call) => walk(world, call, random, calm ? END_MS : ROUGH_END_MS));
        if (random.chance(0.05)) {
          await world.rotate();
          rotations += 1;
          steps += 1;
        }
        if (!calm) {
          for (let i = random.below(3); i > 0; i -= 1) {
            steps += 1;
            const event = random.below(5);
            if (event === 0) cut.first();
            else if (event === 1) weather.is = random.pick(['down', 'slow']);
            else if (event === 2) weather.is = 'up';
            else if (event === 3) world.tokens.mode = 'failing';
            else cut.second();
            await sleep(random.below(10));
          }
        }
        const ending = last ? random.pick(['close', 'destroy', 'channel', 'none'] as const) : 'none';
        if (ending === 'close') void world.dialer.close();
        else if (ending === 'destroy') void world.dialer.destroy();
        else if (ending === 'channel') world.channel.close();
        weather.is = 'up';
        for (const made of await Promise.all(walking)) steps += made;
        for (const call of round) {
          try {
            checkCall(call, calm && ending === 'none');
          } catch (error) {
            t.diagnostic(`seed ${SEED}, step ${steps}, ${calm ? 'calm' : 'rough'}, ${ending}, call ${call.id}:`);
            t.diagnostic(`${call.log.join('\n  ')}\nseen ${JSON.stringify(call.seen).slice(0, 2000)}`);
            throw error;
          }
          const name = status[call.statuses[0]!.code]!;
          codes.set(name, (codes.get(name) ?? 0) + 1);
          calls.delete(call.id);
        }
        made += round.length;
        assert.equal(world.dialer.stats().inFlight, 0, 'nothing is counted any more');
      }
      await world.dialer.close();
      assert.deepEqual(world.dialer.stats().kedges, [], 'no kedge and no connection is left');
    }
    t.diagnostic(`seed ${SEED}: ${steps} steps, ${made} calls, ${worlds} dialers, ${rotations} rotations`);
    t.diagnostic(JSON.stringify(Object.fromEntries(codes)));
    assert.ok((codes.get('OK') ?? 0) > made / 10, 'most of the walk is not about failures');
  });
});
