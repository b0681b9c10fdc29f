import assert from 'node:assert/strict';
import dns from 'node:dns';
import { describe, it } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { single } from '../../src/index.ts';
import { KEDGE_NAME, startKedge } from '../helpers/kedge.ts';

/** What the machine's resolver says of the kedge's name; everything behind it is real. */
function resolver(t: { mock: { method: typeof import('node:test').mock.method } }) {
  const says = { addresses: ['127.0.0.1'], fails: false, asked: 0 };
  t.mock.method(dns.promises, 'lookup', (async () => {
    says.asked += 1;
    if (says.fails)
      throw Object.assign(new Error('getaddrinfo EAI_AGAIN'), { syscall: 'getaddrinfo', code: 'EAI_AGAIN' });
    return says.addresses.map((address) => ({ address, family: 4 }));
  }) as never);
  return says;
}

describe("a kedge's addresses", () => {
  it('are remembered for their time, and the last good ones serve while there is no answer', async (t) => {
    const says = resolver(t);
    const kedge = await startKedge(t);
    const mapper = single(`https://${KEDGE_NAME}:${kedge.port}`);
    const dialer = kedge.dialer({ mapper, connect: { dnsTtlMs: 300 }, http: { protocol: 'h1', connections: 10 } });
    const burst = () =>
      Promise.all(Array.from({ length: 10 }, () => dialer.fetch('http://a.us1/').then((r) => r.text())));
    await burst();
    assert.equal(says.asked, 1);
    says.fails = true;
    await sleep(350);
    kedge.reset();
    await sleep(20);
    await burst();
    assert.ok(says.asked > 1);
    assert.equal(dialer.stats().kedges[0]!.generation, 1);
  });

  it('that no longer hold a connected one make a new generation, and no call fails', async (t) => {
    const says = resolver(t);
    const kedge = await startKedge(t);
    // The same kedge at another of this machine's own addresses.
    await startKedge(t, { at: { host: '127.0.0.2', port: kedge.port } });
    const mapper = single(`https://${KEDGE_NAME}:${kedge.port}`);
    const dialer = kedge.dialer({ mapper, connect: { dnsTtlMs: 100 } });
    let running = true;
    const load = Array.from({ length: 5 }, async () => {
      while (running) await (await dialer.fetch('http://a.us1/')).text();
    });
    await sleep(150);
    says.addresses = ['127.0.0.2'];
    await sleep(300);
    assert.equal(dialer.stats().kedges[0]!.generation, 2);
    says.addresses = ['127.0.0.3', '127.0.0.2'];
    await sleep(300);
    assert.equal(dialer.stats().kedges[0]!.generation, 2, 'the connected one is still among them');
    running = false;
    await Promise.all(load);
  });
});

describe('maxConnectionAgeMs', () => {
  it('replaces connections without losing a call', async (t) => {
    const kedge = await startKedge(t);
    const dialer = kedge.dialer({ connect: { maxConnectionAgeMs: 100 } });
    for (const begin = performance.now(); performance.now() - begin < 500; ) {
      await (await dialer.fetch('http://a.us1/', { method: 'POST', body: 'x' })).text();
    }
    const [stats] = dialer.stats().kedges;
    assert.ok(stats!.generation >= 3, `generation ${stats!.generation}`);
    assert.equal(stats!.resumed, 0);
  });
});

describe('warm()', () => {
  it('connects ahead, and fails as a request would', async (t) => {
    const kedge = await startKedge(t);
    const dialer = kedge.dialer();
    await dialer.warm('http://a.us1:8080');
    assert.equal(dialer.stats().handshakes, 1);
    await Promise.all(Array.from({ length: 20 }, () => dialer.fetch('http://b.us1/').then((r) => r.text())));
    assert.equal(kedge.handshakes, 1);
    const down = kedge.dialer({ mapper: single('https://127.0.0.1:1') });
    await assert.rejects(down.warm('http://a.us1'), { code: 'ERR_KEDGE_CONNECT', target: 'a.us1' });
    await down.warm('http://127.0.0.1:1');
    await assert.rejects(down.warm('http://a..us1'), { code: 'ERR_KEDGE_TARGET' });
  });
});
