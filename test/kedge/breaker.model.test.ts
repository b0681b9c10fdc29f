import assert from 'node:assert/strict';
import { describe, it } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { connectDialer } from '../../src/connectrpc/index.ts';
import { grpcDialer } from '../../src/grpc/index.ts';
import { single } from '../../src/index.ts';
import { Breaker } from '../../src/kedge/breaker.ts';
import { echoClient, startGrpcKedge, unary } from '../helpers/grpc-kedge.ts';
import { startKedge } from '../helpers/kedge.ts';
import { startRelay } from '../helpers/relay.ts';
import { rotating } from '../helpers/rotating.ts';

const SEED = Number(process.env['KEDGE_TEST_SEED'] ?? Date.now() % 1_000_000);
const STEPS = Number(process.env['KEDGE_TEST_MODEL_STEPS'] ?? 200_000);
/** Of real calls; one takes some ms. */
const CALLS = Number(process.env['KEDGE_TEST_MODEL_CALLS'] ?? 150);

/** mulberry32 */
function random(seed: number): () => number {
  let state = seed;
  return () => {
    state = (state + 0x6d2b79f5) | 0;
    let t = Math.imul(state ^ (state >>> 15), 1 | state);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  };
}

describe('the breaker, by a seeded random walk', () => {
  it(`with its own clock: always asks again within maxBackoffMs, one at a time (seed ${SEED})`, (t) => {
    const next = random(SEED);
    const pick = (n: number) => Math.floor(next() * n);
    let steps = 0;
    while (steps < STEPS) {
      const failures = 1 + pick(3);
      const backoffMs = 1 + pick(1000);
      const maxBackoffMs = backoffMs + pick(5000);
      const breaker = new Breaker({ failures, backoffMs, maxBackoffMs });
      let now = pick(1000);
      // The model: failed dials in a row, and when somebody was last let through.
      let inRow = 0;
      let lastProbe = Number.NEGATIVE_INFINITY;
      let quietSince = now;
      const at = () => `seed ${SEED}, step ${steps}, ${breaker.name}`;
      for (let i = 0; i < 500; i += 1, steps += 1) {
        now += pick(3) === 0 ? pick(maxBackoffMs * 2) : pick(20);
        const kind = pick(10);
        if (kind < 3) {
          breaker.failed(now);
          inRow += 1;
          quietSince = now;
        } else if (kind === 3) {
          breaker.succeeded();
          inRow = 0;
          assert.ok(breaker.isClosed, at());
        } else {
          const wasClosed = breaker.isClosed;
          const mayTry = breaker.admit(now);
          assert.equal(wasClosed, inRow < failures, at());
          if (wasClosed) assert.ok(mayTry, at());
          else if (mayTry) {
            assert.equal(breaker.name, 'half-open', at());
            assert.equal(breaker.admit(now), false, `two probes at once: ${at()}`);
            assert.ok(now - lastProbe >= backoffMs / 2, `probes without a pause: ${at()}`);
            lastProbe = now;
            quietSince = now;
          } else assert.ok(now - quietSince < maxBackoffMs, `nobody is let through: ${at()}`);
        }
      }
      // However it was left, a caller comes through within the maximum, and one answer closes it.
      assert.ok(breaker.admit(now + maxBackoffMs), at());
      breaker.succeeded();
      assert.ok(breaker.isClosed && breaker.admit(now), at());
    }
    t.diagnostic(`seed ${SEED}, ${steps} steps`);
  });

  for (const wire of ['h1', 'h2', 'gRPC', 'connect'] as const) {
    it(`through calls over ${wire}: the first kedge is used again once it is well (seed ${SEED})`, async (t) => {
      const next = random(SEED);
      const pick = (n: number) => Math.floor(next() * n);
      const [one, two] = await Promise.all([startGrpcKedge(t), startGrpcKedge(t)]);
      const [http1, http2] = await Promise.all([startKedge(t), startKedge(t)]);
      const isHttp = wire === 'h1' || wire === 'h2';
      const [first, second] = isHttp ? [http1, http2] : [one, two];
      const relay = await startRelay(t, first.port);
      const identity = rotating(first);
      const maxBackoffMs = 120;
      const dialer = first.dialer({
        identity,
        mapper: single(first.route({ kedge: [relay.url, second.url] })),
        connect: { timeoutMs: 150, handshakeTimeoutMs: 150 },
        failover: { breaker: { backoffMs: 30, maxBackoffMs } },
        drainTimeoutMs: 500,
        http: isHttp ? { protocol: wire } : {},
        onWarning: () => {},
      });
      const client = new (grpcDialer(dialer).wrap(echoClient()))('a.us1:90');
      const manager = connectDialer(dialer).sessionManager('http://a.us1:80');
      const call = async (signal?: AbortSignal) => {
        if (isHttp) await (await dialer.fetch('http://a.us1/', signal === undefined ? {} : { signal })).text();
        else if (wire === 'gRPC') await unary(client, 'x', undefined, { deadline: Date.now() + 1000 });
        else {
          const headers = { 'content-type': 'application/grpc+json', te: 'trailers' };
          const stream = await manager.request('POST', '/test.Echo/Unary', headers, {});
          stream.on('error', () => {});
          stream.end(Buffer.concat([Buffer.from([0, 0, 0, 0, 12]), Buffer.from('{"text":"x"}')]));
          stream.resume();
          await new Promise((resolve) => stream.once('close', resolve));
        }
      };
      const reached = () => (isHttp ? http1.seen.length : one.calls.length);
      for (let step = 0; step < CALLS; step += 1) {
        const kind = pick(12);
        if (kind === 0) relay.is = 'down';
        else if (kind === 1) relay.is = 'stalled';
        else if (kind === 2) relay.is = 'up';
        else if (kind === 3) relay.cut();
        else if (kind === 4) await identity.rotate();
        else if (kind === 5) await dialer.warm('http://a.us1').catch(() => {});
        else if (kind === 6) void call(AbortSignal.timeout(1 + pick(10))).catch(() => {});
        else if (kind === 7) await sleep(pick(60));
        else await Promise.allSettled(Array.from({ length: 1 + pick(3) }, () => call()));
        if (step % 30 !== 29) continue;
        relay.is = 'up';
        relay.cut();
        // What was being dialled has failed by then.
        await sleep(160 + maxBackoffMs);
        const before = reached();
        const begin = performance.now();
        while (reached() === before && performance.now() - begin < maxBackoffMs + 500) {
          await call().catch(() => {});
          await sleep(5);
        }
        assert.ok(reached() > before, `seed ${SEED}, step ${step}: ${JSON.stringify(dialer.stats().kedges)}`);
        await call().catch(() => {});
        await call();
        const state = dialer.stats().kedges.find(({ kedge }) => relay.url.endsWith(kedge))!.breaker;
        assert.equal(state, 'closed', `seed ${SEED}, step ${step}`);
        assert.equal(dialer.stats().inFlight, 0);
      }
      t.diagnostic(`seed ${SEED}, ${CALLS} steps, reached the first ${reached()} times`);
    });
  }
});
