/**
 * One HTTP call against a simple model: seeded random rounds of calls that abort, pause, throw and fail in every callback, while
 * kedges refuse, answer early, reset, cut and say GOAWAY, tokens and certificates change, and the dialer is closed.
 * KEDGE_TEST_MODEL_STEPS walks further, KEDGE_TEST_SEED walks the same way again.
 */
import assert from 'node:assert/strict';
import { createHash } from 'node:crypto';
import { subscribe } from 'node:diagnostics_channel';
import http from 'node:http';
import http2 from 'node:http2';
import type { Socket } from 'node:net';
import { describe, it, type TestContext } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import type * as undici from 'undici';
import { createDialer, type Dialer, single, type TokenSource } from '../../src/index.ts';
import { random as seeded } from '../chaos/random.ts';
import { exitAtOnce } from '../helpers/exit.ts';
import { type KedgeHandler, startKedge, type TestKedge } from '../helpers/kedge.ts';
import { rotating } from '../helpers/rotating.ts';

exitAtOnce();

const STEPS = Number(process.env.KEDGE_TEST_MODEL_STEPS ?? 100_000);
const SEED = Number(process.env.KEDGE_TEST_SEED ?? Math.floor(Math.random() * 2 ** 31));
const ORIGIN = 'http://orders.us1:8080';
/** In one round. */
const CALLS = 60;
/** After this long a call that has not ended is held for ever. */
const PATIENCE_MS = 8_000;

/** Our ends of connections: a kedge in this process may miss the end of one. */
const sockets = new Set<Socket>();
subscribe('net.client.socket', (message) => {
  const { socket } = message as { socket: Socket };
  sockets.add(socket);
  socket.once('close', () => sockets.delete(socket));
});

type Random = (below: number) => number;

function randomOf(seed: number): Random {
  const next = seeded(seed);
  return (below) => Math.floor(next() * below);
}

const hash = (data: string | Buffer) => createHash('sha256').update(data).digest('base64url');

/** What the backend executed, by the id of the call: the hash of each body that arrived whole. */
type Ledger = Map<string, string[]>;

/** Ways in which a kedge may treat a request; those before the ledger have not executed it. */
const FAULTS = ['refuse', 'goaway-now', '407', '401', 'early', 'none', 'none', 'none', 'slow', '503'] as const;
const AFTER = ['reset-stream', 'cut', 'fin', 'half', 'goaway', 'goaway-code'] as const;

function hostile(ledger: Ledger, count: () => void): KedgeHandler {
  return (request, response) => {
    const reply = response as http.ServerResponse;
    const h2 = request instanceof http.IncomingMessage ? undefined : (request as http2.Http2ServerRequest).stream;
    count();
    const id = String(request.headers['x-id']);
    const attempt = Number(request.headers['x-fault'] ?? 0);
    const fault = request.headers['x-before'] as string;
    const after = request.headers['x-after'] as string;
    const answer = `answer to ${id} `.repeat(50);
    request.on('error', () => {});
    reply.on('error', () => {});
    const short = (status: number) => {
      reply.statusCode = status;
      reply.end('short');
    };
    const first = !tried.has(id);
    tried.add(id);
    const session = h2?.session;
    const served = (session && servedBy.get(session)) ?? { last: 0, closed: false };
    if (served.closed) return;
    if (attempt > 0 && (first || attempt > 1)) {
      if (fault === 'refuse' && h2) return h2.close(http2.constants.NGHTTP2_REFUSED_STREAM);
      if (fault === 'goaway-now' && session && !session.destroyed && served.last > 0) {
        served.closed = true;
        return session.goaway(0, served.last);
      }
    }
    if (session) {
      served.last = h2.id!;
      servedBy.set(session, served);
    }
    if (attempt > 0 && (first || attempt > 1)) {
      if (fault === '407' || fault === '401' || fault === '503' || fault === 'early') {
        return short({ '407': 407, '401': 401, '503': 503, early: 413 }[fault]);
      }
    }
    const body = createHash('sha256');
    request.on('data', (chunk) => body.update(chunk));
    request.on('end', () => {
      count();
      // Node ends the reading side of a stream that was reset, too.
      if (h2 ? h2.aborted || h2.destroyed : !reply.req.complete) return;
      ledger.set(id, [...(ledger.get(id) ?? []), body.digest('base64url')]);
      const bad = attempt > 0 && (first || attempt > 1);
      if (bad && after === 'reset-stream' && h2) return h2.close(http2.constants.NGHTTP2_INTERNAL_ERROR);
      if (bad && (after === 'cut' || after === 'fin')) return cut(request, after);
      if (bad && after.startsWith('goaway') && h2?.session && !h2.session.destroyed) {
        // Node counts no stream of the same read: one that it serves could be among those that its GOAWAY leaves out.
        h2.session.goaway(after === 'goaway' ? 0 : http2.constants.NGHTTP2_ENHANCE_YOUR_CALM, 2 ** 31 - 1);
      }
      if (bad && after === 'half') {
        reply.setHeader('content-length', Buffer.byteLength(answer));
        reply.write(answer.slice(0, 40));
        return void setTimeout(() => cut(request), 2);
      }
      setTimeout(() => reply.end(answer), fault === 'slow' ? 4 : 0);
    });
  };
}
type Request = Parameters<KedgeHandler>[0];

/** Not while its stream is being announced: Node's server corrupts its memory (22: "onread->IsFunction()", 26: malloc()). */
function cut(request: Request, how?: string): void {
  const session = request instanceof http.IncomingMessage ? undefined : request.stream.session;
  const socket = session?.socket ?? request.socket;
  setImmediate(() => {
    if (session?.destroyed) return;
    if (how === 'fin') socket.destroySoon();
    else (session ?? socket).destroy();
  });
}

const tried = new Set<string>();
/** The last stream of a connection that was served, and whether its GOAWAY has left out those that follow. */
const servedBy = new WeakMap<http2.Http2Session, { last: number; closed: boolean }>();

interface Outcome {
  id: string;
  /** What may happen to it, for a failure's text. */
  plan: string;
  idempotent: boolean;
  sent: string | undefined;
  /** Aborted before its handler was told of a start, or in it. */
  unstarted: boolean;
  starts: number;
  ends: string[];
  afterEnd: string[];
  answer: string;
  status: number;
}

/** One call with its own seeded troubles; resolves when it has ended, or fails when it never does. */
function call(dispatcher: undici.Dispatcher, id: string, random: Random, count: () => void): Promise<Outcome> {
  const method = (['GET', 'POST', 'PUT', 'POST'] as const)[random(4)]!;
  const kind = method === 'GET' ? 0 : random(5);
  const text = `${id} `.repeat(1 + random(300));
  const broken = kind === 4;
  const outcome: Outcome = {
    id,
    plan: '',
    idempotent: method !== 'POST',
    sent: broken ? undefined : hash(kind === 0 ? '' : text),
    unstarted: false,
    starts: 0,
    ends: [],
    afterEnd: [],
    answer: '',
    status: 0,
  };
  async function* parts() {
    for (let at = 0; at < text.length; at += 200) {
      if (random(8) === 0) await sleep(random(3));
      if (broken && at > 0) throw new Error('own body error');
      yield Buffer.from(text.slice(at, at + 200));
    }
    if (broken) throw new Error('own body error');
  }
  const body = kind === 0 ? null : kind === 1 ? text : kind === 2 ? Buffer.from(text) : parts();
  const abortAt = random(3) === 0 ? ['sync', 'start', 'tick', 'immediate', 'timer', 'answer', 'data'][random(7)] : '';
  const throwAt = random(20) === 0 ? ['start', 'answer', 'data'][random(3)] : '';
  const pauses = random(4) === 0;
  return new Promise((resolve, reject) => {
    const stuck = setTimeout(
      () =>
        reject(
          new Error(`the call ${id} never ended: ${outcome.plan}, starts ${outcome.starts}, status ${outcome.status}`),
        ),
      PATIENCE_MS,
    );
    let control: undici.Dispatcher.DispatchController | undefined;
    const abort = () => {
      if (outcome.ends.length > 0) return;
      if (control === undefined) {
        wantsAbort = true;
        return;
      }
      count();
      control.abort(new Error('own abort'));
    };
    let wantsAbort = false;
    const end = (how: string) => {
      outcome.ends.push(how);
      clearTimeout(stuck);
      // What comes after an end comes within this time.
      if (outcome.ends.length === 1) setTimeout(() => resolve(outcome), 20);
    };
    const note = (what: string) => {
      count();
      if (outcome.ends.length > 0) outcome.afterEnd.push(what);
      if (throwAt === what) throw new Error('own throw');
    };
    const handler: undici.Dispatcher.DispatchHandler = {
      onRequestStart(controller) {
        control = controller;
        outcome.starts += 1;
        if (abortAt === 'start' || wantsAbort) {
          outcome.unstarted = true;
          abort();
          return;
        }
        note('start');
      },
      onResponseStart(controller, status) {
        note('answer');
        if (status < 200) return;
        outcome.status = status;
        if (abortAt === 'answer') abort();
        if (pauses) {
          controller.pause();
          setTimeout(() => controller.resume(), random(4));
        }
      },
      onResponseData(_controller, chunk) {
        note('data');
        outcome.answer += chunk;
        if (abortAt === 'data') abort();
      },
      onResponseEnd: () => end('end'),
      onResponseError: (_controller, error) => end(`error ${error?.message}`),
    };
    const trouble = random(2) === 0 ? 0 : 1 + random(2);
    const headers = {
      'x-id': id,
      'x-fault': String(trouble),
      'x-before': FAULTS[random(FAULTS.length)]!,
      'x-after': [...AFTER, 'none', 'none', 'none'][random(AFTER.length + 3)]!,
    };
    outcome.plan = `${method} body ${kind} abort ${abortAt} throw ${throwAt} ${JSON.stringify(headers)}`;
    dispatcher.dispatch({ origin: ORIGIN, path: `/${id}`, method, body: body as never, headers }, handler);
    if (abortAt === 'sync') abort();
    if (abortAt === 'tick') process.nextTick(abort);
    if (abortAt === 'immediate') setImmediate(abort);
    if (abortAt === 'timer') setTimeout(abort, random(12));
  });
}

function check(outcome: Outcome, ledger: Ledger): void {
  const { id, ends } = outcome;
  const executed = ledger.get(id) ?? [];
  assert.equal(ends.length, 1, `${outcome.plan} ended so: ${ends.join(', ')}`);
  assert.deepEqual(outcome.afterEnd, [], `${id} heard of something after its end`);
  assert.ok(outcome.starts <= 1, `${id} was started ${outcome.starts} times`);
  if (outcome.unstarted)
    assert.deepEqual(executed, [], `${id} was aborted before its start, and executed: ${outcome.plan}`);
  if (!outcome.idempotent)
    assert.ok(executed.length <= 1, `${id} was executed ${executed.length} times: ${outcome.plan}: ${ends}`);
  for (const body of executed) assert.equal(body, outcome.sent, `${id} arrived with another body: ${outcome.plan}`);
  if (ends[0] === 'end' && outcome.status === 200) {
    assert.equal(outcome.answer, `answer to ${id} `.repeat(50), `${id} has another answer`);
    assert.ok(executed.length > 0, `${id} has an answer that nobody gave`);
  }
}

function tokens(random: Random): TokenSource {
  let version = 0;
  let cached: string | undefined;
  return {
    name: 'model',
    peek: () => cached,
    token: async () => {
      await sleep(random(5));
      if (random(15) === 0) throw new Error('no token today');
      version += 1;
      cached = `token-${version}`;
      return cached;
    },
    invalidate: () => {
      cached = undefined;
    },
  };
}

/** One dialer over two hostile kedges and its life to the end. */
async function round(
  t: TestContext,
  kedges: TestKedge[],
  ledger: Ledger,
  seed: number,
  name: string,
  count: () => void,
): Promise<void> {
  const random = randomOf(seed);
  const protocol = (['h1', 'h2', 'auto'] as const)[random(3)]!;
  const identity = rotating(kedges[0]!);
  const urls = kedges.map(({ url }) => url);
  const hops = [urls, [urls[0]!], ['https://127.0.0.1:1', ...urls]][random(3)]!;
  const dialer: Dialer = createDialer({
    mapper: single(kedges[0]!.route({ kedge: hops, ...(random(2) ? { proxyAuth: tokens(random) } : {}) })),
    identity,
    http: { protocol, connections: 1 + random(4), maxConcurrentStreams: 1 + random(30) },
    failover: { statuses: random(2) ? [503] : [], replayBytes: [0, 1000, 65_536][random(3)]! },
    drainTimeoutMs: 3000,
    onWarning: () => {},
  });
  t.after(() => dialer.destroy());
  const dispatcher = dialer.dispatcher as undici.Dispatcher;
  const calls: Promise<Outcome>[] = [];
  for (let i = 0; i < CALLS; i += 1) {
    count();
    calls.push(call(dispatcher, `${name}-${i}`, random, count));
    const next = random(12);
    if (next === 0) await sleep(random(6));
    else if (next === 1) await new Promise(setImmediate);
    else if (next === 2 && random(4) === 0) await identity.rotate();
    else if (next === 3 && random(6) === 0) kedges[random(kedges.length)]!.reset();
  }
  for (const each of calls) each.catch(() => {});
  const how = random(3);
  if (how === 0) await dialer.destroy();
  else if (how === 1) await dialer.close();
  const outcomes = await Promise.all(calls);
  for (const outcome of outcomes) check(outcome, ledger);
  assert.equal(dialer.stats().inFlight, 0, 'the dialer holds calls that have ended');
  await dialer.close();
  assert.equal(identity.subscribers, 0);
}

describe('one HTTP call, whatever happens to it', () => {
  it(`ends once, and is executed no more often than it may (seed ${SEED}, ${STEPS} steps)`, async (t) => {
    const failures: unknown[] = [];
    const note = (error: unknown) => failures.push(error);
    process.on('uncaughtException', note);
    process.on('unhandledRejection', note);
    t.after(() => {
      process.off('uncaughtException', note);
      process.off('unhandledRejection', note);
    });
    const ledger: Ledger = new Map();
    let steps = 0;
    const count = () => {
      steps += 1;
    };
    const handler = hostile(ledger, count);
    const kedges = await Promise.all([startKedge(t, { handler }), startKedge(t, { handler })]);
    let calls = 0;
    for (let number = 0; steps < STEPS; number += 1) {
      try {
        await round(t, kedges, ledger, SEED + number, `r${number}`, count);
      } catch (error) {
        throw new Error(`round ${number}: run it alone with KEDGE_TEST_SEED=${SEED + number}`, { cause: error });
      }
      assert.deepEqual(failures, [], `round ${number}, KEDGE_TEST_SEED=${SEED + number}`);
      calls += CALLS;
      ledger.clear();
      tried.clear();
      for (const kedge of kedges) kedge.seen.length = 0;
    }
    await sleep(100);
    assert.equal(sockets.size, 0, 'connections are left');
    t.diagnostic(`seed ${SEED}: ${steps} steps, ${calls} calls`);
  });
});
