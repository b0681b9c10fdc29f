import assert from 'node:assert/strict';
import { describe, it } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { createDialer, single } from '../../src/index.ts';
import { KEDGE_NAME, startKedge } from '../helpers/kedge.ts';

const LONGEST = 2 ** 31 - 1;
const TIMES = [
  'drainTimeoutMs',
  'http.keepAliveTimeoutMs',
  'http.pingIntervalMs',
  'grpc.keepaliveTimeMs',
  'grpc.keepaliveTimeoutMs',
  'connect.timeoutMs',
  'connect.handshakeTimeoutMs',
  'connect.maxConnectionAgeMs',
  'connect.dnsTtlMs',
  'failover.breaker.backoffMs',
  'failover.breaker.maxBackoffMs',
];

function options(path: string, value: unknown): object {
  return path.split('.').reduceRight<unknown>((inner, name) => ({ [name]: inner }), value) as object;
}

describe('options', () => {
  it('that are times are refused by name where no timer can keep them', () => {
    for (const path of TIMES) {
      for (const wrong of [Number.POSITIVE_INFINITY, Number.NaN, LONGEST + 1, 0, -1, 1.5, '5', 5n, null, {}]) {
        assert.throws(
          () => createDialer({ mapper: () => undefined, ...options(path, wrong) }),
          (error: { code?: string; message: string }) =>
            error.code === 'ERR_KEDGE_OPTIONS' && error.message.includes(`\`${path}\``),
          `${path}: ${String(wrong)}`,
        );
      }
    }
  });

  it('that are times of 24 days do not fire at once', async (t) => {
    const overflows: Error[] = [];
    const listener = (warning: Error) => {
      if (warning.name === 'TimeoutOverflowWarning') overflows.push(warning);
    };
    process.on('warning', listener);
    t.after(() => process.off('warning', listener));
    const kedge = await startKedge(t);
    const url = `https://${KEDGE_NAME}:${kedge.port}`;
    const dns = await import('node:dns');
    t.mock.method(dns.default.promises, 'lookup', (async () => [{ address: '127.0.0.1', family: 4 }]) as never);
    const dialers = Array.from({ length: 6 }, () =>
      kedge.dialer({
        mapper: single(url),
        connect: { maxConnectionAgeMs: LONGEST, dnsTtlMs: LONGEST, timeoutMs: LONGEST, handshakeTimeoutMs: LONGEST },
        drainTimeoutMs: LONGEST,
        http: { keepAliveTimeoutMs: LONGEST, pingIntervalMs: LONGEST },
      }),
    );
    await Promise.all(dialers.map(async (dialer) => (await dialer.fetch('http://a.us1/')).text()));
    await sleep(100);
    for (const dialer of dialers) assert.equal(dialer.stats().kedges[0]!.generation, 1);
    assert.deepEqual(overflows, []);
  });

  it('of the breaker do not contradict each other', () => {
    const dialer = (breaker: object) => createDialer({ mapper: () => undefined, failover: { breaker } });
    dialer({ backoffMs: 60_000 });
    assert.throws(() => dialer({ backoffMs: 2000, maxBackoffMs: 1000 }), /`failover\.breaker\.maxBackoffMs`/);
  });

  it('with a % in a proxy password that is no escape are refused, without the password', () => {
    const make = () =>
      createDialer({ mapper: () => undefined, connect: { proxy: 'http://user:50%secret@proxy.test:3128' } });
    assert.throws(make, (error: { code?: string; message: string }) => {
      assert.equal(error.code, 'ERR_KEDGE_OPTIONS');
      assert.match(error.message, /`connect\.proxy`.*%25/);
      assert.doesNotMatch(error.message, /secret/);
      return true;
    });
  });
});
