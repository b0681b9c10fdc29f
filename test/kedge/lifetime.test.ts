import assert from 'node:assert/strict';
import { AsyncLocalStorage } from 'node:async_hooks';
import { describe, it } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { connectDialer } from '../../src/connect/index.ts';
import { coreOf } from '../../src/engine/core.ts';
import { grpcDialer } from '../../src/grpc/index.ts';
import {
  createDialer,
  type Identity,
  isKedgeError,
  type KedgeError,
  pem,
  single,
  type TokenSource,
} from '../../src/index.ts';
import { startBlackHole } from '../helpers/black-hole.ts';
import { echoClient, type GrpcServerOptions, startGrpcKedge, unary } from '../helpers/grpc-kedge.ts';
import { type KedgeHandler, startKedge } from '../helpers/kedge.ts';
import { startRelay } from '../helpers/relay.ts';

const silent: KedgeHandler = (request) => void request.resume();
const causeOf = (error: unknown) => (isKedgeError(error) ? error : ((error as Error).cause as KedgeError));

describe('a call on a draining connection', () => {
  for (const protocol of ['h1', 'h2'] as const) {
    it(`is never sent again when the certificate of that connection ends, ${protocol}`, async (t) => {
      const kedge = await startKedge(t, { handler: silent });
      const issue = async (until: number) => {
        const notAfter = new Date(Math.ceil((Date.now() + until) / 1000) * 1000);
        const { cert, key } = await kedge.ca.issue({ cn: 'pod', notAfter });
        return pem({ cert, key, ca: kedge.ca.cert }).current();
      };
      let current = await issue(1000);
      let rotate = () => {};
      const identity: Identity = {
        current: () => current,
        subscribe: (listener) => {
          rotate = listener;
          return () => {};
        },
      };
      const dialer = kedge.dialer({ identity, http: { protocol }, onWarning: () => {} });
      const calls = [1, 2].map((i) => dialer.fetch('http://a.us1/', { method: 'POST', body: `pay ${i}` }));
      const outcomes = Promise.allSettled(calls);
      while (kedge.seen.length < 2) await sleep(5);
      current = await issue(3600_000);
      rotate();
      for (const outcome of await outcomes) {
        assert.equal(outcome.status, 'rejected');
        const { code, stage } = causeOf((outcome as PromiseRejectedResult).reason);
        assert.deepEqual([code, stage], ['ERR_KEDGE_IDENTITY_EXPIRED', 'kedge']);
      }
      await sleep(50);
      assert.equal(kedge.seen.length, 2, 'each was executed once');
    });
  }
});

describe('destroy(error)', () => {
  it('with the error of a failed dial sends nothing again and opens nothing', async (t) => {
    const [kedge, other] = await Promise.all([startKedge(t, { handler: silent }), startKedge(t, { handler: silent })]);
    const down = kedge.dialer({ mapper: single('https://127.0.0.1:1') });
    const failed = await down.warm('http://a.us1').then(
      () => assert.fail('nobody listens there'),
      (error: KedgeError) => error,
    );
    assert.equal(failed.stage, 'connect');
    for (const route of [kedge.route(), kedge.route({ kedge: [kedge.url, other.url] })]) {
      const before = kedge.seen.length;
      const dialer = kedge.dialer({ mapper: single(route) });
      const call = dialer.fetch('http://a.us1/', { method: 'POST', body: 'pay' });
      const outcome = assert.rejects(call);
      while (kedge.seen.length === before) await sleep(5);
      await dialer.destroy(failed);
      await outcome;
      await sleep(50);
      assert.equal(kedge.seen.length, before + 1);
      assert.equal(other.seen.length, 0);
      assert.deepEqual(dialer.stats().kedges, []);
    }
    for (let i = 0; i < 50 && kedge.sockets.size > 0; i += 1) await sleep(10);
    assert.equal(kedge.sockets.size, 0);
  });

  it('within the mapper, and close(), leave no kedge open', async (t) => {
    const kedge = await startKedge(t);
    const mapper = single(kedge.route());
    for (const end of ['destroy', 'close'] as const) {
      const dialer = kedge.dialer({
        mapper: (target) => {
          void dialer[end]();
          return mapper(target);
        },
      });
      await assert.rejects(dialer.fetch('http://a.us1/'), (error) => causeOf(error).code === 'ERR_KEDGE_CLOSED');
      assert.deepEqual(dialer.stats().kedges, []);
    }
    assert.equal(kedge.handshakes, 0);
  });

  it('ends every call that waits, whatever the listener of one of them throws', async (t) => {
    const warnings: Error[] = [];
    const never: TokenSource = { name: 'never', peek: () => undefined, token: () => new Promise(() => {}) };
    const mapper = single({ kedge: 'https://kedge.example.com', proxyAuth: never });
    const dialer = createDialer({ mapper, onWarning: (warning) => warnings.push(warning) });
    t.after(() => dialer.destroy());
    const ended: number[] = [];
    for (let i = 0; i < 3; i += 1) {
      dialer.dispatcher.dispatch(
        { origin: 'http://a.us1', path: '/', method: 'GET' },
        {
          onRequestStart: () => {},
          onResponseError: () => {
            ended.push(i);
            if (i === 0) throw new Error('of the listener');
          },
        },
      );
    }
    await dialer.destroy();
    assert.deepEqual(ended, [0, 1, 2]);
    assert.equal((warnings[0]!.cause as Error).message, 'of the listener');
  });
});

describe('routes with equal peer policies', () => {
  it('share their connections', async (t) => {
    const kedge = await startKedge(t);
    const dialer = kedge.dialer({
      mapper: (target) =>
        single(kedge.route({ peer: target.hostname.startsWith('n') ? {} : { minVersion: 'TLSv1.3' } }))(target),
    });
    for (let i = 0; i < 10; i += 1) await (await dialer.fetch(`http://a${i}.us1/`)).text();
    assert.equal(kedge.handshakes, 1);
    await (await dialer.fetch('http://n.us1/')).text();
    assert.equal(kedge.handshakes, 2, 'another policy is another connection');
  });
});

describe('the breaker', () => {
  it('does not open for a kedge that lacks only the protocol of one call', async (t) => {
    const [one, two] = await Promise.all([startKedge(t, { alpn: ['h2'] }), startKedge(t)]);
    const dialer = one.dialer({ mapper: single(one.route({ kedge: [one.url, two.url] })) });
    await (await dialer.fetch('http://a.us1/')).text();
    const socket = new WebSocket('ws://a.us1/', { dispatcher: dialer.dispatcher } as never);
    await new Promise((resolve) => socket.addEventListener('error', resolve));
    const stats = dialer.stats().kedges.find(({ kedge }) => one.url.endsWith(kedge))!;
    assert.deepEqual([stats.breaker, stats.failures], ['closed', 0]);
    for (let i = 0; i < 3; i += 1) await (await dialer.fetch('http://a.us1/')).text();
    assert.equal(one.seen.length, 4);
  });

  it('takes a dial that a rotation or the end gave up for no failure', async (t) => {
    const hole = await startBlackHole(t);
    const kedge = await startKedge(t);
    const dialer = kedge.dialer({ mapper: single(hole.url) });
    const call = assert.rejects(
      dialer.fetch('http://a.us1/'),
      (error) => !/connect|dns|tls/.test(causeOf(error).stage),
    );
    await sleep(50);
    const live = coreOf(dialer).kedges;
    const hop = coreOf(dialer).resolve('http', 'http://a.us1').plan!.hops[0]!;
    const watched = live.get(hop);
    await dialer.destroy();
    await call;
    await sleep(50);
    assert.deepEqual([watched.stats().failures, watched.breaker.name], [0, 'closed']);
  });
});

describe('a kedge whose connection is good, but to which one further dial fails', () => {
  for (const wire of ['gRPC', 'connect'] as const) {
    it(`takes all calls again once it is well, ${wire}`, async (t) => {
      const hold = { until: Promise.resolve() };
      const unaryHandler: NonNullable<GrpcServerOptions['unary']> = async (call, callback) => {
        await hold.until;
        callback(null, { text: call.request.text, authority: '' });
      };
      const [one, two] = await Promise.all([startGrpcKedge(t, { unary: unaryHandler }), startGrpcKedge(t)]);
      const relay = await startRelay(t, one.port);
      const dialer = one.dialer({
        mapper: single(one.route({ kedge: [relay.url, two.url] })),
        grpc: { maxStreamsPerConnection: 1 },
        failover: { breaker: { backoffMs: 50, maxBackoffMs: 100 } },
      });
      const client = new (grpcDialer(dialer).wrap(echoClient()))('a.us1:90');
      const manager = connectDialer(dialer).sessionManager('http://a.us1:80');
      const call = async () => {
        if (wire === 'gRPC') return void (await unary(client, 'x'));
        const headers = { 'content-type': 'application/grpc+json', te: 'trailers' };
        const stream = await manager.request('POST', '/test.Echo/Unary', headers, {});
        stream.end(Buffer.concat([Buffer.from([0, 0, 0, 0, 12]), Buffer.from('{"text":"x"}')]));
        stream.resume();
        await new Promise((resolve) => stream.once('close', resolve));
      };
      const state = () => dialer.stats().kedges.find(({ kedge }) => relay.url.endsWith(kedge))!.breaker;
      await call();
      const release = Promise.withResolvers<void>();
      hold.until = release.promise;
      const held = call();
      for (let i = 0; i < 100 && one.calls.length < 2; i += 1) await sleep(5);
      relay.is = 'down';
      await call();
      assert.equal(state(), 'open');
      relay.is = 'up';
      release.resolve();
      await held;
      // Calls one after the other: they need no second connection, so nobody dials.
      const begin = performance.now();
      while (state() !== 'closed' && performance.now() - begin < 2000) {
        await call();
        await sleep(5);
      }
      assert.equal(state(), 'closed');
      const before = two.calls.length;
      for (let i = 0; i < 5; i += 1) await call();
      assert.equal(two.calls.length, before);
    });
  }
});

describe('the async context of a call', () => {
  it('is not kept by what lives on', async (t) => {
    const kedge = await startKedge(t);
    const url = `https://localhost:${kedge.port}`;
    const storage = new AsyncLocalStorage<string>();
    const seen: (string | undefined)[] = [];
    const dns = await import('node:dns');
    t.mock.method(dns.default.promises, 'lookup', (async () => {
      seen.push(storage.getStore());
      return [{ address: '127.0.0.1', family: 4 }];
    }) as never);
    const real = pem({ cert: kedge.client.cert, key: kedge.client.key, ca: kedge.ca.cert });
    const identity: Identity = {
      current: () => {
        seen.push(storage.getStore());
        return real.current();
      },
      subscribe: () => () => {},
    };
    const mapper = single(kedge.route({ kedge: url }));
    const dialer = storage.run('maker', () => kedge.dialer({ mapper, identity, connect: { dnsTtlMs: 50 } }));
    await storage.run('caller', async () => (await dialer.fetch('http://a.us1/')).text());
    await sleep(200);
    assert.ok(seen.length > 3, `${seen.length}`);
    assert.deepEqual(new Set(seen), new Set(['maker']));
  });
});
