import assert from 'node:assert/strict';
import { createSocket } from 'node:dgram';
import dns from 'node:dns';
import { once } from 'node:events';
import { join } from 'node:path';
import { describe, it } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { Addresses } from '../../src/dial/dns-cache.ts';
import { coreOf } from '../../src/engine/core.ts';
import { single } from '../../src/index.ts';
import { KEDGE_NAME, startKedge } from '../helpers/kedge.ts';
import { runNode } from '../helpers/process.ts';
import { tempDir } from '../helpers/temp.ts';

const SEED = Number(process.env['KEDGE_TEST_SEED'] ?? Date.now() % 1_000_000);
const STEPS = Number(process.env['KEDGE_TEST_MODEL_STEPS'] ?? 100_000);

/** What the machine's resolver says of the kedge's name; everything behind it is real. */
function resolver(t: { mock: { method: typeof import('node:test').mock.method } }) {
  const says = { addresses: ['127.0.0.1'], fails: false, hangs: false, asked: 0 };
  t.mock.method(dns.promises, 'lookup', (async () => {
    says.asked += 1;
    if (says.hangs) return new Promise(() => {});
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
    const dialer = kedge.dialer({ mapper, connect: { dnsTtlMs: 2000 }, http: { protocol: 'h1', connections: 10 } });
    const burst = () =>
      Promise.all(Array.from({ length: 10 }, () => dialer.fetch('http://a.us1/').then((r) => r.text())));
    await burst();
    assert.equal(says.asked, 1);
    says.fails = true;
    await sleep(2100);
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
    for (let i = 0; i < 100 && dialer.stats().kedges[0]!.generation === 1; i += 1) await sleep(50);
    assert.equal(dialer.stats().kedges[0]!.generation, 2);
    says.addresses = ['127.0.0.3', '127.0.0.2'];
    await sleep(300);
    assert.equal(dialer.stats().kedges[0]!.generation, 2, 'the connected one is still among them');
    running = false;
    await Promise.all(load);
  });
});

describe('a name that answers with one of its addresses in turn', () => {
  it('makes no new generation, and a kedge that moved is still followed', async (t) => {
    const says = resolver(t);
    const kedge = await startKedge(t);
    for (const host of ['127.0.0.2', '127.0.0.3', '127.0.0.4']) await startKedge(t, { at: { host, port: kedge.port } });
    const mapper = single(`https://${KEDGE_NAME}:${kedge.port}`);
    const dialer = kedge.dialer({ mapper, connect: { dnsTtlMs: 40 } });
    await (await dialer.fetch('http://a.us1/')).text();
    for (let i = 0; i < 15; i += 1) {
      says.addresses = [`127.0.0.${1 + (i % 3)}`];
      const { asked } = says;
      while (says.asked === asked) await sleep(2);
    }
    assert.equal(dialer.stats().kedges[0]!.generation, 1);
    says.addresses = ['127.0.0.4'];
    const { asked } = says;
    while (says.asked < asked + 5) await sleep(2);
    assert.equal(dialer.stats().kedges[0]!.generation, 2);
  });
});

describe('a resolver that hangs', () => {
  it('keeps no call from the answer of a later look-up', async (t) => {
    const says = resolver(t);
    const kedge = await startKedge(t);
    const mapper = single(`https://${KEDGE_NAME}:${kedge.port}`);
    const dialer = kedge.dialer({ mapper, connect: { timeoutMs: 10_000 } });
    says.hangs = true;
    const first = dialer.fetch('http://a.us1/').then((response) => response.text());
    await sleep(1100);
    says.hangs = false;
    const begin = performance.now();
    const second = dialer.warm('http://a.us1/').then(() => dialer.fetch('http://a.us1/'));
    // HTTP dials once for all that wait, so another wire asks.
    coreOf(dialer)
      .kedges.get(coreOf(dialer).resolve('http', 'http://a.us1/').plan!.endpoints[0]!)
      .generation.connector.connect(['h2'], (_error, socket) => void socket?.destroy());
    assert.equal((await second).status, 200);
    await first;
    assert.ok(performance.now() - begin < 500, `${performance.now() - begin} ms`);
  });

  it('leaves the last good answer in use', async (t) => {
    const says = resolver(t);
    const kedge = await startKedge(t);
    const mapper = single(`https://${KEDGE_NAME}:${kedge.port}`);
    const dialer = kedge.dialer({ mapper, connect: { dnsTtlMs: 50, timeoutMs: 3000 }, http: { protocol: 'h1' } });
    await (await dialer.fetch('http://a.us1/')).text();
    says.hangs = true;
    for (let i = 0; i < 3; i += 1) {
      await sleep(200);
      kedge.reset();
      await sleep(20);
      const begin = performance.now();
      await (await dialer.fetch('http://a.us1/')).text();
      assert.ok(performance.now() - begin < 1500, `${performance.now() - begin} ms`);
    }
    assert.ok(says.asked < 8, `${says.asked} look-ups are stuck`);
  });
});

describe('name servers that are silent', () => {
  it('do not hold the process after close()', async (t) => {
    const kedge = await startKedge(t, { names: ['localhost'] });
    const silent = createSocket('udp4');
    await new Promise<void>((resolve) => silent.bind(0, '127.0.0.1', resolve));
    t.after(() => silent.close());
    const asked = once(silent, 'message');
    const code = `
      import dns from 'node:dns';
      import { createDialer, pem, single } from ${JSON.stringify(new URL('../../src/index.ts', import.meta.url).href)};
      dns.setServers(['127.0.0.1:${silent.address().port}']);
      const { cert, key, ca } = JSON.parse(process.argv[1]);
      const mapper = single({ kedge: 'https://localhost:${kedge.port}', serverName: '${KEDGE_NAME}' });
      const dialer = createDialer({ mapper, identity: pem({ cert, key, ca }) });
      await (await dialer.fetch('http://a.us1/')).text();
      await dialer.close();
      const closed = performance.now();
      process.on('exit', () => console.log(Math.round(performance.now() - closed)));
    `;
    const { cert, key } = kedge.client;
    const { status, out } = await runNode([
      '--input-type=module',
      '-e',
      code,
      JSON.stringify({ cert, key, ca: kedge.ca.cert }),
    ]);
    assert.equal(status, 0, out);
    await asked;
    assert.ok(Number(out.trim()) < 500, `${out} ms after close()`);
  });
});

describe('a look-up that is under way', () => {
  it('holds neither close() nor destroy() once its calls are over, on any wire, and no process afterwards', async (t) => {
    const fifo = join(await tempDir(t), 'fifo');
    const here = (path: string) => JSON.stringify(new URL(path, import.meta.url).href);
    // The one thread for look-ups waits for somebody to write to the FIFO.
    const code = `
      import { execFileSync } from 'node:child_process';
      import fs from 'node:fs';
      import { createDialer, single } from ${here('../../src/index.ts')};
      import { grpcDialer } from ${here('../../src/grpc/index.ts')};
      import { echoClient, unary } from ${here('../helpers/grpc-kedge.ts')};
      const fifo = process.argv[1];
      execFileSync('mkfifo', [fifo]);
      const read = fs.promises.readFile(fifo);
      const took = {};
      for (const end of ['close', 'destroy']) {
        for (const wire of ['h1', 'h2', 'upgrade', 'warm', 'grpc']) {
          const dialer = createDialer({ mapper: single('https://localhost:1'), http: { protocol: wire === 'h1' ? 'h1' : 'h2' } });
          const { dispatcher } = dialer;
          const to = { origin: 'http://a.us1', path: '/', method: 'GET' };
          const client = new (grpcDialer(dialer).wrap(echoClient()))('a.us1:1');
          const given = new AbortController();
          const { signal } = given;
          let call;
          if (wire === 'grpc') call = unary(client, 'x', undefined, { deadline: Date.now() + 50 });
          else if (wire === 'upgrade') call = dispatcher.upgrade({ ...to, protocol: 'websocket', signal });
          else if (wire === 'warm') call = dialer.warm('http://a.us1/');
          else call = dialer.fetch('http://a.us1/', { signal });
          const over = call.then(() => 'made', (error) => error.cause?.code ?? error.code ?? error.name);
          setTimeout(() => given.abort(), 50);
          const first = wire === 'warm' ? undefined : await over;
          const begin = performance.now();
          await dialer[end]();
          took[end + ' ' + wire] = [Math.round(performance.now() - begin), first ?? (await over)];
          client.close();
        }
      }
      fs.writeFileSync(fifo, 'x');
      await read;
      const free = performance.now();
      process.on('exit', () => console.log(JSON.stringify({ took, exit: performance.now() - free })));
    `;
    const env = { UV_THREADPOOL_SIZE: '1' };
    const { status, out } = await runNode(['--input-type=module', '-e', code, fifo], { env });
    assert.equal(status, 0, out);
    const { took, exit } = JSON.parse(out) as { took: Record<string, [number, string]>; exit: number };
    assert.equal(Object.keys(took).length, 10, out);
    for (const [what, [ms]] of Object.entries(took)) assert.ok(ms < 500, `${what}: ${ms} ms`);
    assert.deepEqual(
      ['close warm', 'destroy warm'].map((what) => took[what]![1]),
      ['ERR_KEDGE_CLOSED', 'ERR_KEDGE_CLOSED'],
    );
    assert.ok(exit < 500, `the process ended ${exit} ms later`);
  });
});

describe('addresses, by a seeded random walk', () => {
  it(`serve whoever asks once there is an answer, and count as gone after three (seed ${SEED})`, async (t) => {
    let now = 0;
    let state = SEED;
    const pick = (n: number) => {
      state = (Math.imul(state, 1103515245) + 12345) & 0x7fffffff;
      return (state >>> 8) % n;
    };
    t.mock.timers.enable({ apis: ['setTimeout', 'Date'] });
    t.mock.method(performance, 'now', () => now);
    type Pending = { resolve(addresses: readonly string[]): void; reject(error: Error): void };
    let pending: Pending[] = [];
    t.mock.method(dns.promises, 'lookup', (() => {
      const { promise, resolve, reject } = Promise.withResolvers<unknown>();
      pending.push({ resolve: (all) => resolve(all.map((address) => ({ address, family: 4 }))), reject });
      return promise;
    }) as never);
    const turn = async () => {
      for (let i = 0; i < 8; i += 1) await Promise.resolve();
    };
    let steps = 0;
    while (steps < STEPS) {
      const ttlMs = 100 + pick(5000);
      const addresses = new Addresses('k.test', ttlMs, () => {});
      pending = [];
      // The model: the answers there were, newest first, and who waits.
      const answers: (readonly string[])[] = [];
      let waiting = 0;
      const ask = () => {
        waiting += 1;
        addresses.lookup!('k.test', { all: true }, (error, found) => {
          waiting -= 1;
          if (error !== null) assert.equal(answers.length, 0, 'a good answer is never forgotten');
          else assert.ok((found as object[]).length > 0);
        });
      };
      for (let i = 0; i < 200; i += 1, steps += 1) {
        const kind = pick(6);
        const at = () => `seed ${SEED}, step ${steps}`;
        if (kind < 2) ask();
        else if (kind === 2) {
          const ms = 1 + pick(3000);
          now += ms;
          // The wall clock is set back and forth.
          t.mock.timers.setTime(Math.max(0, pick(10_000_000)));
          t.mock.timers.tick(ms);
        } else if (pending.length > 0 && kind === 3) pending.shift()!.reject(new Error('EAI_AGAIN'));
        else if (pending.length > 0 && kind === 4) {
          // The newest, so that no answer comes out of order.
          const said = [`10.0.0.${pick(5)}`];
          pending.pop()!.resolve(said);
          pending = [];
          answers.unshift(said);
        }
        await turn();
        assert.ok(pending.length <= 12, `${pending.length} look-ups: ${at()}`);
        for (let a = 0; a < 5 && answers.length > 0; a += 1) {
          const isKnown = answers.slice(0, 3).some(([address]) => address === `10.0.0.${a}`);
          assert.equal(addresses.has(`10.0.0.${a}`), isKnown, at());
        }
      }
      // The resolver is well: whoever asks after a minute is served, and so are all who wait.
      now += 61_000;
      t.mock.timers.tick(61_000);
      await turn();
      ask();
      await turn();
      pending.at(-1)?.resolve(['10.0.0.9']);
      answers.unshift(['10.0.0.9']);
      await turn();
      assert.equal(waiting, 0, `seed ${SEED}, step ${steps}`);
      addresses.close();
    }
    t.diagnostic(`seed ${SEED}, ${steps} steps`);
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
