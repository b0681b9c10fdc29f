import assert from 'node:assert/strict';
import { cp } from 'node:fs/promises';
import http from 'node:http';
import { createRequire } from 'node:module';
import type { AddressInfo } from 'node:net';
import { dirname, join } from 'node:path';
import { Writable } from 'node:stream';
import { describe, it, type TestContext } from 'node:test';
import * as undici from 'undici';
import undici6 from 'undici-6';
import undici7 from 'undici-7';
import { type Mapper, single, staticToken } from '../../src/index.ts';
import { startKedge, type TestKedge } from '../helpers/kedge.ts';
import { tempDir } from '../helpers/temp.ts';

interface Direct {
  url: string;
  seen: { headers: http.IncomingHttpHeaders; url: string }[];
}

/** A plain server that stands for the rest of the world. */
async function startDirect(t: TestContext, answer?: http.RequestListener): Promise<Direct> {
  const seen: Direct['seen'] = [];
  const server = http.createServer((request, response) => {
    seen.push({ headers: request.headers, url: request.url! });
    if (answer !== undefined) answer(request, response);
    else response.end('direct');
  });
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
  t.after(() => {
    server.closeAllConnections();
    server.close();
  });
  return { url: `http://localhost:${(server.address() as AddressInfo).port}`, seen };
}

function clusterOnly(kedge: TestKedge): Mapper {
  const route = single(
    kedge.route({ proxyAuth: staticToken('proxy-secret'), backendAuth: staticToken('backend-secret') }),
  );
  return (target) => (target.hostname.endsWith('.us1') ? route(target) : undefined);
}

const text = async (response: Promise<Response | undici.Response>) => (await response).text();
const GLOBALS = [1, 2].map((version) => Symbol.for(`undici.globalDispatcher.${version}`));

describe('an unmapped request', () => {
  it('goes direct without certificate or token, through every API', async (t) => {
    const [kedge, direct] = await Promise.all([startKedge(t), startDirect(t)]);
    const { dispatcher } = kedge.dialer({ mapper: clusterOnly(kedge) });
    for (const url of [direct.url, direct.url.replace('localhost', '127.0.0.1')]) {
      assert.equal(await text(fetch(url, { dispatcher })), 'direct');
      assert.equal(await text(undici.fetch(url, { dispatcher })), 'direct');
      const { body } = await undici.request(url, { dispatcher, headers: { 'x-own': '1' } });
      assert.equal(await body.text(), 'direct');
    }
    assert.equal(direct.seen.length, 6);
    assert.doesNotMatch(JSON.stringify(direct.seen), /secret|kedge/);
    assert.equal(kedge.handshakes, 0);
  });

  it('can be refused', async (t) => {
    const [kedge, direct] = await Promise.all([startKedge(t), startDirect(t)]);
    const { dispatcher } = kedge.dialer({ mapper: clusterOnly(kedge), unmapped: 'reject' });
    await assert.rejects(undici.request(direct.url, { dispatcher }), { code: 'ERR_KEDGE_UNMAPPED', stage: 'map' });
    await assert.rejects(fetch(direct.url, { dispatcher }), (error: Error) => {
      assert.equal((error.cause as { code: string }).code, 'ERR_KEDGE_UNMAPPED');
      return true;
    });
    assert.equal(direct.seen.length, 0);
  });

  it('goes to the fallback of the options, of any undici', async (t) => {
    const [kedge, direct] = await Promise.all([startKedge(t), startDirect(t)]);
    await fetch('data:,x'); // Node's own undici is loaded by its first fetch.
    const builtIn = GLOBALS.map((key) => (globalThis as unknown as Record<symbol, undici.Dispatcher>)[key]).find(
      Boolean,
    )!;
    const agent = new undici.Agent();
    t.after(() => agent.close());
    for (const fallback of [agent, builtIn]) {
      const { dispatcher } = kedge.dialer({ mapper: clusterOnly(kedge), fallback });
      assert.equal(await text(fetch(direct.url, { dispatcher })), 'direct');
      assert.equal(await text(undici.fetch(direct.url, { dispatcher, method: 'POST', body: 'x' })), 'direct');
      const { body, statusCode, headers } = await undici.request(direct.url, { dispatcher });
      assert.equal(await body.text(), 'direct');
      assert.equal(statusCode, 200);
      assert.equal(headers['content-length'], '6');
      await assert.rejects(undici.request('http://127.0.0.1:1', { dispatcher }), { code: 'ECONNREFUSED' });
    }
  });
});

describe('an unmapped request of any undici, to a fallback of any undici', () => {
  type Undici = typeof undici;
  const COPIES: Record<string, Undici> = { 6: undici6 as never, 7: undici7 as never, 8: undici };

  /** undici 8 a second time, as another dependency of the process may bring it. */
  async function anotherUndici8(t: TestContext): Promise<Undici> {
    const root = dirname(createRequire(import.meta.url).resolve('undici/package.json'));
    const copy = join(await tempDir(t), 'undici');
    await cp(root, copy, { recursive: true });
    return createRequire(import.meta.url)(copy);
  }

  async function callsOf(dispatcher: undici.Dispatcher, url: string): Promise<Record<string, () => Promise<string>>> {
    const calls: Record<string, () => Promise<string>> = {
      'built-in fetch': () => text(fetch(url, { dispatcher } as RequestInit)),
      'built-in fetch, POST': () => text(fetch(url, { dispatcher, method: 'POST', body: 'x' } as RequestInit)),
    };
    for (const [version, copy] of Object.entries(COPIES)) {
      calls[`undici ${version} fetch`] = () => text(copy.fetch(url, { dispatcher }));
      calls[`undici ${version} request`] = async () => (await copy.request(url, { dispatcher })).body.text();
      calls[`undici ${version} stream`] = async () => {
        const chunks: Buffer[] = [];
        const sink = () => new Writable({ write: (chunk, _encoding, done) => done(void chunks.push(chunk)) });
        await copy.stream(url, { dispatcher, method: 'GET' }, sink);
        return Buffer.concat(chunks).toString();
      };
    }
    return calls;
  }

  it('is answered', async (t) => {
    const [kedge, direct] = await Promise.all([startKedge(t), startDirect(t)]);
    const agents: Record<string, undici.Dispatcher | undefined> = { 'what is global': undefined };
    for (const [version, { Agent }] of [
      ...Object.entries(COPIES),
      ['8, another copy', await anotherUndici8(t)] as const,
    ]) {
      const agent = new Agent();
      t.after(() => agent.close());
      agents[`an Agent of undici ${version}`] = agent;
    }
    const told: Record<string, string> = {};
    const expected: Record<string, string> = {};
    for (const [name, fallback] of Object.entries(agents)) {
      const { dispatcher } = kedge.dialer({ mapper: clusterOnly(kedge), fallback });
      for (const [call, run] of Object.entries(await callsOf(dispatcher as undici.Dispatcher, direct.url))) {
        told[`${call}, to ${name}`] = await run().catch((error: Error) => String(error.cause ?? error));
        expected[`${call}, to ${name}`] = 'direct';
      }
    }
    assert.deepEqual(told, expected);
    assert.equal(kedge.handshakes, 0);
  });

  it('is paused, resumed and aborted as by its own undici', async (t) => {
    const size = 4_000_000;
    const [kedge, direct] = await Promise.all([
      startKedge(t),
      startDirect(t, (request, response) => {
        if (request.url === '/slow') response.write('begun');
        else response.end(Buffer.alloc(size, 'b'));
      }),
    ]);
    for (const [name, { Agent }] of [
      ...Object.entries(COPIES),
      ['8, another copy', await anotherUndici8(t)] as const,
    ]) {
      const agent = new Agent();
      t.after(() => agent.destroy());
      const dispatcher = kedge.dialer({ mapper: clusterOnly(kedge), fallback: agent }).dispatcher as undici.Dispatcher;
      for (const [version, copy] of Object.entries(COPIES)) {
        let bytes = 0;
        // Reading in small steps, with a turn of the loop between them, fills every buffer on the way.
        const { body } = await copy.request(direct.url, { dispatcher });
        for await (const chunk of body) {
          bytes += (chunk as Buffer).length;
          await new Promise(setImmediate);
        }
        assert.equal(bytes, size, `undici ${version} to ${name}`);
        const controller = new AbortController();
        const slow = await copy.request(`${direct.url}/slow`, { dispatcher, signal: controller.signal });
        const rest = slow.body.text();
        setImmediate(() => controller.abort());
        await assert.rejects(rest, { name: 'AbortError' }, `undici ${version} to ${name}`);
      }
    }
  });

  it('does not ask its caller to wait for a "drain" that never comes', async (t) => {
    const [kedge, direct] = await Promise.all([startKedge(t), startDirect(t)]);
    const agent = new undici.Agent({ connections: 1, pipelining: 1 });
    t.after(() => agent.close());
    for (const fallback of [agent, undefined]) {
      const { dispatcher } = kedge.dialer({ mapper: clusterOnly(kedge), fallback });
      const answers = Array.from({ length: 5 }, () => Promise.withResolvers<number>());
      const taken = answers.map(({ resolve, reject }) =>
        dispatcher.dispatch({ origin: direct.url, path: '/', method: 'GET' }, {
          onRequestStart() {},
          onResponseStart: (_controller, status) => resolve(status),
          onResponseData() {},
          onResponseEnd() {},
          onResponseError: (_controller, error) => reject(error),
        } satisfies undici.Dispatcher.DispatchHandler as never),
      );
      assert.deepEqual(await Promise.all(answers.map(({ promise }) => promise)), Array(5).fill(200));
      assert.deepEqual(taken, Array(5).fill(true));
    }
  });
});

describe('a redirect', () => {
  it('is mapped again, and carries credentials to its own kedge only', async (t) => {
    const direct = await startDirect(t, (request, response) => {
      if (request.url === '/home') response.writeHead(302, { location: 'http://orders.us1:8080/landed' });
      response.end('direct');
    });
    const kedge = await startKedge(t, {
      handler: (request, response) => {
        response.statusCode = 200;
        if (request.url === '/away') {
          response.statusCode = 302;
          response.setHeader('location', `${direct.url}/landed`);
        }
        response.end('kedge');
      },
    });
    const { dispatcher } = kedge.dialer({ mapper: clusterOnly(kedge) });
    assert.equal(await text(fetch('http://orders.us1:8080/away', { dispatcher })), 'direct');
    assert.doesNotMatch(JSON.stringify(direct.seen), /secret/);
    assert.equal(await text(fetch(`${direct.url}/home`, { dispatcher })), 'kedge');
    const { headers, authority } = kedge.seen.at(-1)!;
    assert.equal(authority, 'orders.us1:8080');
    assert.equal(headers.authorization, 'Bearer backend-secret');
  });
});

describe('install()', () => {
  it('serves every fetch in the process, and its undo restores what was there', async (t) => {
    const [kedge, direct] = await Promise.all([startKedge(t), startDirect(t)]);
    await fetch('data:,x');
    const globals = () => GLOBALS.map((key) => (globalThis as unknown as Record<symbol, unknown>)[key]);
    const before = globals();
    const dialer = kedge.dialer({ mapper: clusterOnly(kedge) });
    const restore = dialer.install();
    assert.equal(((await (await fetch('http://orders.us1:8080/')).json()) as { alpn: string }).alpn, 'h2');
    assert.equal(((await (await undici.fetch('http://orders.us1:8080/')).json()) as { alpn: string }).alpn, 'h2');
    assert.equal(await text(fetch(direct.url)), 'direct');
    assert.equal(await text(undici.fetch(direct.url)), 'direct');
    restore();
    restore();
    assert.deepEqual(globals(), before);
    await assert.rejects(fetch('http://orders.us1:8080/'));

    const again = dialer.install();
    const other = new undici.Agent();
    t.after(() => other.close());
    const saved = undici.getGlobalDispatcher();
    assert.equal((await undici.request('http://orders.us1:8080/', { dispatcher: saved })).statusCode, 200);
    undici.setGlobalDispatcher(other);
    again();
    assert.equal(undici.getGlobalDispatcher(), other, 'what others installed since is theirs');
    for (const [i, key] of GLOBALS.entries()) (globalThis as unknown as Record<symbol, unknown>)[key] = before[i];
    await dialer.close();
  });

  it('never loops when it was set as the global dispatcher by hand', async (t) => {
    const [kedge, direct] = await Promise.all([startKedge(t), startDirect(t)]);
    const dialer = kedge.dialer({ mapper: clusterOnly(kedge) });
    await fetch('data:,x');
    const before = GLOBALS.map((key) => (globalThis as unknown as Record<symbol, unknown>)[key]);
    t.after(() => {
      for (const [i, key] of GLOBALS.entries()) (globalThis as unknown as Record<symbol, unknown>)[key] = before[i];
    });
    for (const global of [dialer.dispatcher, dialer.dispatcher.compose(undici.interceptors.retry())]) {
      undici.setGlobalDispatcher(global);
      assert.equal(await text(fetch(direct.url)), 'direct');
      assert.equal(await text(undici.fetch(direct.url)), 'direct');
      assert.equal((await fetch('http://orders.us1:8080/')).status, 200);
    }
  });
});
