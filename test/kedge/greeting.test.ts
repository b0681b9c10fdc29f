import assert from 'node:assert/strict';
import dns from 'node:dns';
import type { Socket } from 'node:net';
import { after, before, describe, it, mock, type TestContext } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import type { TLSSocket } from 'node:tls';
import { connectDialer } from '../../src/connect/index.ts';
import { grpcDialer } from '../../src/grpc/index.ts';
import { type Dialer, single } from '../../src/index.ts';
import { echoClient, startGrpcKedge, unary } from '../helpers/grpc-kedge.ts';
import { startKedge, type TestKedge, type TestKedgeOptions } from '../helpers/kedge.ts';

const WIRES = ['h1', 'h2', 'gRPC', 'connect-es'] as const;
type Wire = (typeof WIRES)[number];
const CONNECT = { timeoutMs: 400, handshakeTimeoutMs: 400 };
const SETTINGS_AND_GOAWAY = Buffer.from('000000040000000000' + '000008070000000000' + '0000000000000000', 'hex');

/** A call that the wire itself never repeats. */
function caller(dialer: Dialer, wire: Wire): () => Promise<unknown> {
  const client = new (grpcDialer(dialer).wrap(echoClient()))('a.us1:90');
  const manager = connectDialer(dialer).sessionManager('http://a.us1:80');
  if (wire === 'gRPC') return () => unary(client, 'x', undefined, { deadline: Date.now() + 3000 });
  if (wire !== 'connect-es') {
    return async () => {
      const signal = AbortSignal.timeout(3000);
      const answer = await dialer.fetch('http://a.us1/', { method: 'POST', body: 'x', signal });
      assert.equal(answer.status, 200);
      await answer.text();
    };
  }
  return async () => {
    const headers = { 'content-type': 'application/grpc+json', te: 'trailers' };
    const stream = await manager.request('POST', '/test.Echo/Unary', headers, {});
    const { promise, resolve, reject } = Promise.withResolvers<void>();
    stream.on('error', reject);
    stream.on('trailers', (trailers) => (trailers['grpc-status'] === '0' ? resolve() : reject(new Error('no answer'))));
    stream.on('close', () => reject(new Error('closed')));
    stream.end(Buffer.concat([Buffer.from([0, 0, 0, 0, 12]), Buffer.from('{"text":"x"}')]));
    stream.resume();
    await promise;
  };
}

const start = (t: TestContext, wire: Wire, options: TestKedgeOptions = {}): Promise<TestKedge> =>
  wire === 'gRPC' || wire === 'connect-es' ? startGrpcKedge(t, options) : startKedge(t, options);

describe('a kedge that does TLS and then speaks no HTTP/2', { concurrency: 3 }, () => {
  const ways: Readonly<Record<string, (socket: TLSSocket) => void>> = {
    'closes the connection': (socket) => socket.destroy(),
    'says something else': (socket) => socket.end('HTTP/1.1 400 Bad Request\r\nconnection: close\r\n\r\n'),
    'is silent': () => {},
    'says goodbye with its SETTINGS': (socket) => {
      socket.resume();
      socket.write(SETTINGS_AND_GOAWAY);
    },
  };
  for (const wire of ['gRPC', 'connect-es', 'h2'] as const) {
    for (const [way, onH2] of Object.entries(ways)) {
      if (wire === 'h2' && way !== 'closes the connection') continue;
      it(`and ${way} opens its breaker after \`failures\` dials, and no call fails (${wire})`, async (t) => {
        const [bad, good] = await Promise.all([startKedge(t, { onH2 }), start(t, wire)]);
        const dialer = good.dialer({
          mapper: single(good.route({ kedge: [bad.url, good.url] })),
          connect: CONNECT,
          failover: { breaker: { failures: 3, backoffMs: 60_000, maxBackoffMs: 60_000 } },
          ...(wire === 'h2' ? { http: { protocol: 'h2' } } : {}),
        });
        const call = caller(dialer, wire);
        const kedge = () => dialer.stats().kedges.find(({ kedge }) => bad.url.endsWith(kedge))!;
        const begin = performance.now();
        while (performance.now() - begin < 6000 && (kedge()?.breaker ?? 'closed') === 'closed') {
          await call();
          await sleep(20);
        }
        assert.equal(kedge().breaker, 'open');
        assert.ok(bad.handshakes >= 3 && bad.handshakes <= 5, `${bad.handshakes} dials`);
        const { handshakes } = bad;
        for (let i = 0; i < 20; i += 1) await call();
        assert.equal(bad.handshakes, handshakes);
      });
    }
  }
});

describe('the breaker of a kedge that is well again', () => {
  for (const wire of WIRES) {
    it(`closes with its greeting, before it answers (${wire})`, async (t) => {
      let isDown = true;
      const first = await start(t, wire, {
        onTcp: (socket) => {
          if (isDown) socket.destroy();
          return isDown;
        },
        ...(wire === 'h2' ? { handler: () => {} } : {}),
      });
      const second = await start(t, wire);
      const dialer = first.dialer({
        mapper: single(first.route({ kedge: [first.url, second.url] })),
        connect: CONNECT,
        failover: { breaker: { failures: 1, backoffMs: 100, maxBackoffMs: 100 } },
        http: { protocol: wire === 'h2' ? 'h2' : 'h1' },
      });
      const call = caller(dialer, wire);
      await call();
      const breaker = () => dialer.stats().kedges.find(({ kedge }) => first.url.endsWith(kedge))!.breaker;
      assert.equal(breaker(), 'open');
      isDown = false;
      for (let i = 0; i < 40 && breaker() !== 'closed'; i += 1) {
        void call().catch(() => {});
        await sleep(25);
      }
      assert.equal(breaker(), 'closed');
    });
  }
});

/** What an address does with a connection that it has taken; true: nothing else. */
const FAULTS = {
  'resets in the handshake': (socket: Socket) => void socket.once('data', () => socket.resetAndDestroy()),
  'ends the handshake': (socket: Socket) => void socket.once('data', () => socket.end()),
  'is silent in the handshake': () => {},
} as const;
const H2_FAULTS: Readonly<Record<string, (socket: TLSSocket) => void>> = {
  'closes after the handshake': (socket) => socket.destroy(),
  'sends no SETTINGS': () => {},
};

const BAD = '127.0.0.2';
const WELL = '127.0.0.3';

/** Makes every name have the addresses. */
function resolveTo(...addresses: string[]) {
  const says = { addresses };
  mock.method(dns.promises, 'lookup', (async () => says.addresses.map((address) => ({ address, family: 4 }))) as never);
  return says;
}

describe('a kedge with two addresses of which the first takes connections and fails them', () => {
  before(() => resolveTo(BAD, WELL));
  after(() => mock.restoreAll());
  for (const wire of WIRES) {
    const faults: [string, TestKedgeOptions][] = Object.entries(FAULTS).map(([name, fault]) => [
      name,
      {
        onTcp: (socket) => {
          socket.on('error', () => {});
          fault(socket);
          return true;
        },
      },
    ]);
    if (wire !== 'h1')
      faults.push(...Object.entries(H2_FAULTS).map(([name, onH2]) => [name, { onH2 }] as [string, TestKedgeOptions]));
    for (const [name, fault] of faults) {
      it(`is dialled at the other after one that ${name} (${wire})`, async (t) => {
        const good = await start(t, wire, { at: { host: WELL, port: 0 } });
        let dials = 0;
        const { onTcp } = fault;
        const counted: TestKedgeOptions = {
          ...fault,
          at: { host: BAD, port: good.port },
          onTcp: (socket) => {
            dials += 1;
            return onTcp?.(socket) ?? false;
          },
        };
        await startKedge(t, counted);
        const dialer = good.dialer({
          mapper: single(good.route({ kedge: `https://two.kedge.test:${good.port}` })),
          connect: { ...CONNECT, dnsTtlMs: 100 },
          http: { protocol: wire === 'h2' ? 'h2' : 'h1', pingIntervalMs: 200 },
        });
        const call = caller(dialer, wire);
        await call().catch(() => {});
        // For a moment calls are told of the last failure.
        await sleep(260);
        for (let i = 0; i < 3; i += 1) await call();
        // Nor is it the first to be dialled later on.
        good.reset();
        await sleep(50);
        for (let i = 0; i < 3; i += 1) await call();
        assert.ok(dials <= 2, `${dials} dials of the first`);
      });
    }
  }
});

describe('the address that failed last', () => {
  it('is dialled first again once the other has failed, or the name has other addresses', async (t) => {
    t.after(() => mock.restoreAll());
    const failing = { [BAD]: true, [WELL]: false };
    const dials: string[] = [];
    const at = (host: keyof typeof failing, port: number) =>
      startKedge(t, {
        at: { host, port },
        onTcp: (socket) => {
          dials.push(host);
          if (!failing[host]) return false;
          socket.on('error', () => {}).once('data', () => socket.destroy());
          return true;
        },
      });
    const good = await at(WELL, 0);
    const first = await at(BAD, good.port);
    const says = resolveTo(BAD, WELL);
    const dialer = good.dialer({
      mapper: single(good.route({ kedge: `https://two.kedge.test:${good.port}` })),
      connect: { ...CONNECT, dnsTtlMs: 100 },
      http: { protocol: 'h1' },
    });
    const call = caller(dialer, 'h1');
    const fails = () => assert.rejects(call(), (error: Error) => (error.cause as { code?: string }).code !== undefined);
    const again = async () => {
      good.reset();
      first.reset();
      await sleep(150);
    };
    await fails();
    await again();
    await call();
    assert.deepEqual(dials.splice(0), [BAD, WELL]);
    Object.assign(failing, { [BAD]: false, [WELL]: true });
    await again();
    await fails();
    await again();
    await call();
    assert.deepEqual(dials.splice(0), [WELL, BAD]);
    await again();
    await call();
    assert.deepEqual(dials.splice(0), [BAD]);
    Object.assign(failing, { [BAD]: true, [WELL]: false });
    await again();
    await fails();
    await again();
    await call();
    assert.deepEqual(dials.splice(0), [BAD, WELL]);
    says.addresses = [BAD, WELL, '127.0.0.4'];
    failing[BAD] = false;
    await sleep(300);
    await again();
    await call();
    assert.deepEqual(dials.splice(0), [BAD]);
  });
});
