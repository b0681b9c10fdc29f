import assert from 'node:assert/strict';
import http from 'node:http';
import type { AddressInfo } from 'node:net';
import { describe, it, type TestContext } from 'node:test';
import * as undici from 'undici';
import { type Dialer, single } from '../../src/index.ts';
import { KEDGE_NAME, startKedge, type TestKedge } from '../helpers/kedge.ts';
import { runNode } from '../helpers/process.ts';

const KEYS = [1, 2].map((version) => Symbol.for(`undici.globalDispatcher.${version}`));
const globals = globalThis as unknown as Record<symbol, undici.Dispatcher | undefined>;

/** A plain server that stands for the rest of the world. */
async function startDirect(t: TestContext): Promise<string> {
  const server = http.createServer((_request, response) => response.end('direct'));
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
  t.after(() => {
    server.closeAllConnections();
    server.close();
  });
  return `http://127.0.0.1:${(server.address() as AddressInfo).port}/`;
}

/** A dialer for every name that ends in `.<zone>`. */
function zoneDialer(kedge: TestKedge, zone: string): Dialer {
  const route = single(kedge.route());
  return kedge.dialer({ mapper: (target) => (target.hostname.endsWith(`.${zone}`) ? route(target) : undefined) });
}

const text = async (response: Promise<Response | undici.Response>) => (await response).text();
const served = async (url: string) => ((await (await fetch(url)).json()) as { authority: string }).authority;
/** A name that nobody has: without a dialer it cannot be resolved. */
const nameIn = (zone: string) => `orders.${zone}.invalid`;

/** Puts both global dispatchers back to what they were when the test began, which is when Node's undici is loaded. */
async function keepGlobals(t: TestContext): Promise<(undici.Dispatcher | undefined)[]> {
  await fetch('data:,x');
  const before = KEYS.map((key) => globals[key]);
  t.after(() => {
    for (const [i, key] of KEYS.entries()) globals[key] = before[i];
  });
  return before;
}

/** Runs a module in a process that has fetched nothing yet; it finds `dialer`, `direct` and `undici6` to `undici8`. */
async function run(t: TestContext, code: string): Promise<unknown> {
  const [kedge, direct] = await Promise.all([startKedge(t), startDirect(t)]);
  const url = (name: string) => JSON.stringify(import.meta.resolve(name));
  const program = `
    import { createDialer, pem, single } from ${JSON.stringify(new URL('../../src/index.ts', import.meta.url).href)};
    const { kedge, direct, identity } = JSON.parse(process.env.SETUP);
    const route = single({ kedge, serverName: '${KEDGE_NAME}' });
    const mapper = (target) => (target.hostname.endsWith('.a.invalid') ? route(target) : undefined);
    const dialer = createDialer({ mapper, identity: pem(identity) });
    const load = { 6: () => import(${url('undici-6')}), 7: () => import(${url('undici-7')}), 8: () => import(${url('undici')}) };
    const text = async (response) => (await response).text();
    const told = [];
    const tell = async (attempt) => told.push(await attempt().catch((error) => String(error.cause ?? error)));
    ${code}
    console.log(JSON.stringify(told));
    process.exit(0);
  `;
  const identity = { cert: kedge.client.cert, key: kedge.client.key, ca: kedge.ca.cert };
  const { status, out } = await runNode(['--input-type=module', '-e', program], {
    env: { SETUP: JSON.stringify({ kedge: kedge.url, direct, identity }), NODE_NO_WARNINGS: '1' },
  });
  assert.equal(status, 0, out);
  return JSON.parse(out);
}

describe("install() before the process's first fetch", () => {
  for (const end of [
    'const undo = install(); undo();',
    'install(); await dialer.close();',
    'install(); await dialer.destroy();',
  ]) {
    it(`leaves fetch working after ${end}`, async (t) => {
      const code = (between: string) => `
        const install = () => { const undo = dialer.install(); globalThis.undo = undo; return undo; };
        ${end.replace('install();', `install(); ${between}`)}
        for (let i = 0; i < 3; i += 1) await tell(async () => text(fetch(direct)));
      `;
      assert.deepEqual(await run(t, code('')), ['direct', 'direct', 'direct']);
      const fetching =
        "await tell(async () => (await fetch('http://orders.a.invalid/')).status + (await text(fetch(direct))));";
      assert.deepEqual(await run(t, code(fetching)), ['200direct', 'direct', 'direct', 'direct']);
    });
  }

  it('leaves every undici working that was first imported meanwhile', async (t) => {
    for (const versions of [[6, 7, 8], [8], [7], [6]]) {
      const code = `
        const undo = dialer.install();
        const loaded = [];
        for (const version of ${JSON.stringify(versions)}) loaded.push(await load[version]());
        const all = async () => {
          for (const undici of loaded) {
            await tell(async () => text(undici.fetch(direct)));
            await tell(async () => (await undici.request(direct)).body.text());
          }
          await tell(async () => text(fetch(direct)));
        };
        await all();
        undo();
        await all();
        await dialer.close();
        await all();
      `;
      assert.deepEqual(await run(t, code), Array(3 * (2 * versions.length + 1)).fill('direct'), String(versions));
    }
  });
});

describe('several installed dialers', () => {
  const ORDERS = [
    [0, 1, 2],
    [0, 2, 1],
    [1, 0, 2],
    [1, 2, 0],
    [2, 0, 1],
    [2, 1, 0],
  ];

  for (const end of ['undone', 'closed', 'destroyed'] as const) {
    it(`serve their own names, and may be ${end} in any order`, async (t) => {
      const [kedge, direct] = await Promise.all([startKedge(t), startDirect(t)]);
      const before = await keepGlobals(t);
      const zones = ['a', 'b', 'c'];
      for (const order of ORDERS) {
        const dialers = zones.map((zone) => zoneDialer(kedge, `${zone}.invalid`));
        const undos = dialers.map((dialer) => dialer.install());
        const live = new Set([0, 1, 2]);
        for (const next of [...order, undefined]) {
          for (const [i, zone] of zones.entries()) {
            const call = served(`http://${nameIn(zone)}/`);
            if (live.has(i)) assert.equal(await call, nameIn(zone));
            else await assert.rejects(call, { message: 'fetch failed' });
          }
          assert.equal(await text(fetch(direct)), 'direct');
          assert.equal(await text(undici.fetch(direct)), 'direct');
          if (next === undefined) break;
          if (end === 'undone') undos[next]!();
          else if (end === 'closed') await dialers[next]!.close();
          else await dialers[next]!.destroy();
          live.delete(next);
        }
        assert.deepEqual(
          KEYS.map((key) => globals[key]),
          before,
          `after the order ${order}`,
        );
        for (const dialer of dialers) await dialer.close();
      }
    });
  }

  it('never send a request round in a circle', async (t) => {
    const [kedge, direct] = await Promise.all([startKedge(t), startDirect(t)]);
    await keepGlobals(t);
    const [a, b, c] = ['a', 'b', 'c'].map((zone) => zoneDialer(kedge, `${zone}.invalid`)) as [Dialer, Dialer, Dialer];
    undici.setGlobalDispatcher(a.dispatcher);
    const undo = b.install();
    undici.setGlobalDispatcher(
      undici.getGlobalDispatcher().compose(undici.interceptors.retry({ maxRetries: 1, minTimeout: 1 })),
    );
    c.install();
    for (const dispatcher of [undefined, a.dispatcher, b.dispatcher, c.dispatcher]) {
      assert.equal(await text(fetch(direct, { dispatcher } as RequestInit)), 'direct');
      assert.equal(await text(undici.fetch(direct, { dispatcher: dispatcher as undici.Dispatcher })), 'direct');
    }
    for (const zone of ['a', 'b', 'c']) assert.equal(await served(`http://${nameIn(zone)}/`), nameIn(zone));
    undo();
    await c.close();
    assert.equal(await text(fetch(direct)), 'direct');
    assert.equal(await served(`http://${nameIn('a')}/`), nameIn('a'));
    await assert.rejects(fetch(`http://${nameIn('b')}/`), { message: 'fetch failed' });
  });
});

describe('the undo of an install()', () => {
  it('holds where others have wrapped or kept what was global', async (t) => {
    const [kedge, direct] = await Promise.all([startKedge(t), startDirect(t)]);
    await keepGlobals(t);
    for (const end of ['undone', 'closed'] as const) {
      const dialer = zoneDialer(kedge, 'a.invalid');
      const undo = dialer.install();
      const kept = undici.getGlobalDispatcher();
      undici.setGlobalDispatcher(kept.compose(undici.interceptors.retry({ maxRetries: 1, minTimeout: 1 })));
      assert.equal(await served(`http://${nameIn('a')}/`), nameIn('a'));
      if (end === 'undone') undo();
      else await dialer.close();
      for (const global of [undici.getGlobalDispatcher(), kept]) {
        undici.setGlobalDispatcher(global);
        assert.equal(await text(fetch(direct)), 'direct');
        assert.equal(await text(undici.fetch(direct)), 'direct');
        await assert.rejects(fetch(`http://${nameIn('a')}/`), { message: 'fetch failed' });
      }
      if (end === 'undone') assert.equal((await dialer.fetch(`http://${nameIn('a')}/`)).status, 200);
    }
  });

  it('undoes its own install only', async (t) => {
    const kedge = await startKedge(t);
    const before = await keepGlobals(t);
    const dialer = zoneDialer(kedge, 'a.invalid');
    const first = dialer.install();
    first();
    const second = dialer.install();
    first();
    assert.equal(await served(`http://${nameIn('a')}/`), nameIn('a'), 'an old undo says nothing about a new install');
    const again = dialer.install();
    again();
    second();
    assert.deepEqual(
      KEYS.map((key) => globals[key]),
      before,
    );
  });

  it('comes by itself when the dispatcher is closed', async (t) => {
    const [kedge, direct] = await Promise.all([startKedge(t), startDirect(t)]);
    const before = await keepGlobals(t);
    for (const close of [
      (dialer: Dialer) => dialer.dispatcher.close(),
      (dialer: Dialer) => dialer.dispatcher.destroy(),
      () => undici.getGlobalDispatcher().close(),
    ]) {
      const dialer = zoneDialer(kedge, 'a.invalid');
      dialer.install();
      await close(dialer);
      assert.equal(await text(fetch(direct)), 'direct');
      await assert.rejects(dialer.fetch(`http://${nameIn('a')}/`), (error: Error) => {
        assert.equal((error.cause as { code: string }).code, 'ERR_KEDGE_CLOSED');
        return true;
      });
      await dialer.close();
      assert.deepEqual(
        KEYS.map((key) => globals[key]),
        before,
      );
      assert.throws(() => dialer.install(), { code: 'ERR_KEDGE_CLOSED' });
    }
  });
});
