import assert from 'node:assert/strict';
import http from 'node:http';
import type { AddressInfo } from 'node:net';
import { Readable, Writable } from 'node:stream';
import { pipeline } from 'node:stream/promises';
import { describe, it } from 'node:test';
import * as undici from 'undici';
import { single } from '../../src/index.ts';
import { type Seen, sha256, startKedge } from '../helpers/kedge.ts';

type Echo = Seen & { bytes: number; sha256: string };

interface Call {
  url: string;
  method?: string;
  body?: unknown;
  signal?: AbortSignal;
}

type Api = (dispatcher: undici.Dispatcher, call: Call) => Promise<string>;

const target = ({ url }: Call) => ({ origin: new URL(url).origin, path: new URL(url).pathname });
const init = (dispatcher: undici.Dispatcher, { method, body, signal }: Call) =>
  ({ dispatcher, method: method ?? (body === undefined ? 'GET' : 'POST'), body, signal, duplex: 'half' }) as never;

const APIS: Record<string, Api> = {
  'built-in fetch': async (dispatcher, call) => (await fetch(call.url, init(dispatcher, call))).text(),
  'undici fetch': async (dispatcher, call) => (await undici.fetch(call.url, init(dispatcher, call))).text(),
  'undici request': async (dispatcher, call) => (await undici.request(call.url, init(dispatcher, call))).body.text(),
  'undici stream': async (dispatcher, call) => {
    const { sink, text } = collect();
    await undici.stream(call.url, init(dispatcher, call), () => sink);
    return text();
  },
  'undici pipeline': async (dispatcher, call) => {
    const { sink, text } = collect();
    const { method, signal } = call;
    const options = {
      ...target(call),
      method: (method ?? (call.body === undefined ? 'GET' : 'POST')) as 'GET',
      signal,
    };
    const duplex = dispatcher.pipeline(options, ({ body }) => body);
    await pipeline(call.body === undefined ? Readable.from([]) : (call.body as Readable), duplex, sink);
    return text();
  },
};

function collect() {
  const chunks: Buffer[] = [];
  const sink = new Writable({ write: (chunk, _encoding, done) => done(void chunks.push(chunk)) });
  return { sink, text: () => Buffer.concat(chunks).toString() };
}

const DATA = Buffer.alloc(300_000, 'm');
const halves = [DATA.subarray(0, 100_000), DATA.subarray(100_000)];

/** Bodies, and which APIs take them: fetch and request differ, and pipeline takes streams. */
const BODIES: Record<string, { make: (api: string) => unknown; not?: RegExp }> = {
  string: { make: () => DATA.toString(), not: /pipeline/ },
  Buffer: { make: () => DATA, not: /pipeline/ },
  stream: { make: (api) => (api.includes('fetch') ? Readable.toWeb(Readable.from(halves)) : Readable.from(halves)) },
  iterator: {
    make: () =>
      (async function* () {
        yield* halves;
      })(),
    not: /pipeline/,
  },
  Blob: { make: () => new Blob([DATA]), not: /pipeline/ },
  FormData: {
    make: (api) => {
      const form = new (api === 'built-in fetch' ? globalThis.FormData : undici.FormData)();
      form.set('file', new Blob([DATA]), 'name');
      return form;
    },
    not: /pipeline/,
  },
};

for (const protocol of ['h2', 'h1'] as const) {
  for (const [name, api] of Object.entries(APIS)) {
    describe(`${name} over ${protocol}`, () => {
      it('GET, and bodies of every form', async (t) => {
        const kedge = await startKedge(t);
        const { dispatcher } = kedge.dialer({ http: { protocol } });
        const got = JSON.parse(await api(dispatcher, { url: 'http://a.us1/get' })) as Echo;
        assert.deepEqual(
          [got.method, got.authority, got.alpn],
          ['GET', 'a.us1', protocol === 'h2' ? 'h2' : 'http/1.1'],
        );
        for (const [form, { make, not }] of Object.entries(BODIES)) {
          if (not?.test(name)) continue;
          const seen = JSON.parse(await api(dispatcher, { url: 'http://a.us1/post', body: make(name) })) as Echo;
          assert.equal(seen.method, 'POST', form);
          if (form === 'FormData') assert.ok(seen.bytes > DATA.length, form);
          else assert.equal(seen.sha256, sha256(DATA), form);
        }
      });

      it('ends when it is aborted, in every phase', async (t) => {
        const kedge = await startKedge(t, {
          handler: (request, response) => {
            request.on('error', () => {});
            request.resume();
            if (request.url === '/headers') return;
            (response as unknown as Writable).write('part');
          },
        });
        const dialer = kedge.dialer({ http: { protocol } });
        const aborted = async (url: string, when: (abort: () => void) => void) => {
          const abort = new AbortController();
          const call = api(dialer.dispatcher, { url, signal: abort.signal });
          call.catch(() => {});
          when(() => abort.abort());
          await assert.rejects(call, /abort/i);
        };
        await aborted('http://a.us1/headers', (abort) => abort());
        await aborted('http://a.us1/headers', (abort) => queueMicrotask(abort));
        await aborted('http://a.us1/headers', (abort) => setTimeout(abort, 30));
        await aborted('http://a.us1/body', (abort) => setTimeout(abort, 60));
        await new Promise((resolve) => setTimeout(resolve, 30));
        assert.equal(dialer.stats().inFlight, 0);
      });

      it('hears of an error in its own body stream', async (t) => {
        const kedge = await startKedge(t);
        const { dispatcher } = kedge.dialer({ http: { protocol } });
        const body = new Readable({ read() {} });
        body.push(DATA);
        const call = api(dispatcher, {
          url: 'http://a.us1/',
          body: name.includes('fetch') ? Readable.toWeb(body) : body,
        });
        call.catch(() => {});
        setTimeout(() => body.destroy(new Error('the disk is gone')), 30);
        await assert.rejects(call, (error: Error) => /the disk is gone/.test(`${error} ${error.cause}`));
        assert.match(await APIS['undici request']!(dispatcher, { url: 'http://a.us1/' }), /"authority":"a\.us1"/);
      });
    });
  }

  describe(`redirects over ${protocol}`, () => {
    it("undici's interceptor follows them without the Host header that the caller gave the first", async (t) => {
      const kedge = await startKedge(t, {
        handler: (request, response) => {
          const next: Record<string, string> = { '/away': 'http://b.us1:8080/there', '/near': '/there' };
          request.resume();
          const location = next[request.url!];
          if (location !== undefined) {
            response.statusCode = 303;
            response.setHeader('location', location);
          }
          response.end();
        },
      });
      const { dispatcher } = kedge.dialer({ http: { protocol } });
      const following = dispatcher.compose(undici.interceptors.redirect({ maxRedirections: 3 }));
      for (const [path, authority] of Object.entries({ '/away': 'b.us1:8080', '/near': 'a.us1' })) {
        for (const name of ['host', 'Host']) {
          for (const headers of [{ [name]: 'a.us1' }, [name, 'a.us1'], new Map([[name, 'a.us1']])]) {
            const options = { origin: 'http://a.us1', path, method: 'POST', body: 'x', headers } as const;
            const { statusCode, body } = await following.request(options);
            await body.dump();
            const { method, authority: found, path: at } = kedge.seen.at(-1)!;
            assert.deepEqual([statusCode, method, found + at], [200, 'GET', `${authority}/there`]);
          }
        }
      }
    });

    for (const name of ['built-in fetch', 'undici fetch']) {
      it(`${name} follows them between mapped and unmapped targets`, async (t) => {
        const kedge = await startKedge(t, {
          handler: (request, response) => {
            const port = (direct.address() as AddressInfo).port;
            const next: Record<string, string> = { '/1': 'http://b.us1:8080/2', '/2': `http://127.0.0.1:${port}/3` };
            const location = next[request.url!];
            if (location !== undefined) {
              response.statusCode = 307;
              response.setHeader('location', location);
            }
            request.resume();
            response.end('kedge');
          },
        });
        const direct = http
          .createServer((request, response) => {
            response.writeHead(302, { location: 'http://c.us1/4' });
            request.resume();
            response.end();
          })
          .listen(0, '127.0.0.1');
        t.after(() => {
          direct.closeAllConnections();
          direct.close();
        });
        await new Promise((resolve) => direct.once('listening', resolve));
        const route = single(kedge.route());
        const dialer = kedge.dialer({
          http: { protocol },
          mapper: (found) => (found.hostname.endsWith('.us1') ? route(found) : undefined),
        });
        assert.equal(await APIS[name]!(dialer.dispatcher, { url: 'http://a.us1/1', body: 'again' }), 'kedge');
        assert.deepEqual(
          kedge.seen.map(({ authority, path }) => authority + path),
          ['a.us1/1', 'b.us1:8080/2', 'c.us1/4'],
        );
      });
    }
  });
}
