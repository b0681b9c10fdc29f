import assert from 'node:assert/strict';
import { Readable, Writable } from 'node:stream';
import { describe, it } from 'node:test';
import { setImmediate as turn } from 'node:timers/promises';
import * as undici from 'undici';
import { single, staticToken } from '../../src/index.ts';
import { type Seen, sha256, startKedge } from '../helpers/kedge.ts';
import { trackLeaks } from '../helpers/leaks.ts';

type Echo = Seen & { bytes: number; sha256: string };

const TARGET = 'http://Orders.Shop.svc.us1:8080/v1/orders?q=a%20b&r=/../x';
const PATH = '/v1/orders?q=a%20b&r=/../x';

for (const alpn of ['h2', 'http/1.1']) {
  describe(`a mapped request over ${alpn}`, () => {
    it('keeps authority and path, proves itself to the kedge by its name, and brings the tokens', async (t) => {
      const kedge = await startKedge(t, { alpn: [alpn] });
      const mapper = single(
        kedge.route({ proxyAuth: staticToken('for-the-kedge'), backendAuth: staticToken('for-the-backend') }),
      );
      const { dispatcher } = kedge.dialer({ mapper });
      const callers: Record<string, () => Promise<unknown>> = {
        'built-in fetch': async () => (await fetch(TARGET, { dispatcher })).json(),
        'undici fetch': async () => (await undici.fetch(TARGET, { dispatcher })).json(),
        'undici request': async () => (await undici.request(TARGET, { dispatcher })).body.json(),
        'undici stream': async () => {
          const chunks: Buffer[] = [];
          const sink = new Writable({ write: (chunk, _encoding, done) => done(void chunks.push(chunk)) });
          await undici.stream(TARGET, { dispatcher, method: 'GET' }, () => sink);
          return JSON.parse(Buffer.concat(chunks).toString());
        },
      };
      for (const [caller, call] of Object.entries(callers)) {
        const { alpn: negotiated, authority, path, sni, clientSubject, headers } = (await call()) as Echo;
        assert.deepEqual(
          { negotiated, authority, path, sni, clientSubject },
          {
            negotiated: alpn,
            authority: 'orders.shop.svc.us1:8080',
            path: PATH,
            sni: 'us1.kedge.test',
            clientSubject: 'pod',
          },
          caller,
        );
        assert.equal(headers['proxy-authorization'], 'Bearer for-the-kedge', caller);
        assert.equal(headers.authorization, 'Bearer for-the-backend', caller);
        assert.match(String(headers['x-kedge-request-id']), /^kd-[0-9a-f]{16}-\d+$/, caller);
      }
      if (alpn === 'h2') assert.equal(kedge.handshakes, 1);
    });

    it('opens few connections for 1,000 cold requests to 20 hosts', async (t) => {
      const kedge = await startKedge(t, { alpn: [alpn] });
      const { dispatcher } = kedge.dialer(alpn === 'h2' ? {} : { http: { connections: 4 } });
      const calls = Array.from({ length: 1000 }, async (_, i) => {
        const response = await fetch(`http://svc${i % 20}.shop.us1:8080/${i}`, { dispatcher });
        const seen = (await response.json()) as Echo;
        assert.equal(seen.authority, `svc${i % 20}.shop.us1:8080`);
        assert.equal(seen.path, `/${i}`);
      });
      await Promise.all(calls);
      assert.equal(kedge.seen.length, 1000);
      assert.ok(kedge.handshakes <= 4, `${kedge.handshakes} handshakes`);
    });

    it('carries bodies of every form', async (t) => {
      const kedge = await startKedge(t, { alpn: [alpn] });
      const { dispatcher } = kedge.dialer();
      const big = Buffer.alloc(1_000_000, 'x');
      const bodies: [string, RequestInit['body'], Buffer | string][] = [
        ['string', 'hello', 'hello'],
        ['buffer', big, big],
        ['blob', new Blob(['hello']), 'hello'],
        ['stream', Readable.toWeb(Readable.from([big, big])) as ReadableStream, Buffer.concat([big, big])],
        ['URLSearchParams', new URLSearchParams({ a: 'b' }), 'a=b'],
      ];
      for (const [form, body, expected] of bodies) {
        const response = await fetch(TARGET, { dispatcher, method: 'POST', body, duplex: 'half' });
        const seen = (await response.json()) as Echo;
        assert.equal(seen.sha256, sha256(expected), form);
      }
      const form = new FormData();
      form.set('field', 'value');
      form.set('file', new Blob(['content']), 'name.txt');
      const response = await fetch(TARGET, { dispatcher, method: 'POST', body: form });
      const seen = (await response.json()) as Echo;
      assert.match(String(seen.headers['content-type']), /^multipart\/form-data; boundary=/);
      assert.ok(seen.bytes > 200);
      // Node 22 joins this with its own: "5, 5".
      const same = await fetch(TARGET, {
        dispatcher,
        method: 'POST',
        body: 'hello',
        headers: { 'content-length': '5' },
      });
      assert.equal(((await same.json()) as Echo).headers['content-length'], '5');
    });

    it('streams 20 MB down no faster than they are read', async (t) => {
      const chunk = Buffer.alloc(64 * 1024, 'y');
      const total = 320;
      let sent = 0;
      const kedge = await startKedge(t, {
        alpn: [alpn],
        handler: (_request, response) => {
          const source = new Readable({
            highWaterMark: chunk.length,
            read() {
              if (sent === total) this.push(null);
              else {
                sent += 1;
                this.push(chunk);
              }
            },
          });
          source.pipe(response as never);
        },
      });
      const { dispatcher } = kedge.dialer({ http: { windowBytes: 256 * 1024 } });
      const response = await fetch(TARGET, { dispatcher });
      const reader = response.body!.getReader();
      await reader.read();
      // Nobody reads: what was sent must stop growing, far from the end.
      let before = -1;
      for (let i = 0; i < 200 && before !== sent; i += 1) {
        before = sent;
        await new Promise((resolve) => setTimeout(resolve, 50));
      }
      assert.ok(sent < total, `${sent} of ${total} chunks were sent to nobody`);
      let bytes = chunk.length;
      for (;;) {
        const { done, value } = await reader.read();
        if (done) break;
        bytes += value.length;
      }
      assert.ok(bytes >= total * chunk.length - chunk.length && sent === total);
    });

    it('keeps several set-cookie headers apart', async (t) => {
      const kedge = await startKedge(t, {
        alpn: [alpn],
        handler: (_request, response) => {
          response.setHeader('set-cookie', ['a=1', 'b=2']);
          response.end();
        },
      });
      const { dispatcher } = kedge.dialer();
      const response = await fetch(TARGET, { dispatcher });
      assert.deepEqual(response.headers.getSetCookie(), ['a=1', 'b=2']);
      const { headers } = await undici.request(TARGET, { dispatcher });
      assert.deepEqual(headers['set-cookie'], ['a=1', 'b=2']);
    });

    it('aborts before and after the headers', async (t) => {
      const closed: Promise<void>[] = [];
      const kedge = await startKedge(t, {
        alpn: [alpn],
        handler: (request, response) => {
          closed.push(new Promise((resolve) => response.on('close', resolve)));
          if (request.url === '/after') (response as Writable).write('first');
        },
      });
      const { dispatcher } = kedge.dialer();
      const early = new AbortController();
      const before = fetch('http://a.us1/before', { dispatcher, signal: early.signal });
      while (kedge.seen.length === 0) await turn();
      early.abort();
      await assert.rejects(before, { name: 'AbortError' });

      const late = new AbortController();
      const response = await fetch('http://a.us1/after', { dispatcher, signal: late.signal });
      const reader = response.body!.getReader();
      await reader.read();
      late.abort();
      await assert.rejects(reader.read(), { name: 'AbortError' });
      await Promise.all(closed);
      assert.equal(closed.length, 2);

      const already = AbortSignal.abort();
      await assert.rejects(fetch('http://a.us1/', { dispatcher, signal: already }), { name: 'AbortError' });
      await assert.rejects(undici.request('http://a.us1/', { dispatcher, signal: already }), { name: 'AbortError' });
    });

    it('lets calls under way finish on close(), refuses new ones, and leaves nothing open', async (t) => {
      const noLeaks = trackLeaks();
      const release = Promise.withResolvers<void>();
      const kedge = await startKedge(t, {
        alpn: [alpn],
        handler: async (_request, response) => {
          await release.promise;
          response.end('late');
        },
      });
      const dialer = kedge.dialer();
      const call = dialer.fetch(TARGET);
      while (kedge.seen.length === 0) await turn();
      const closed = dialer.close();
      await assert.rejects(dialer.fetch(TARGET), (error: TypeError) => {
        assert.equal((error.cause as { code: string }).code, 'ERR_KEDGE_CLOSED');
        return true;
      });
      assert.equal(dialer.stats().inFlight, 1);
      release.resolve();
      assert.equal(await (await call).text(), 'late');
      await closed;
      await dialer[Symbol.asyncDispose]();
      await kedge.close();
      await noLeaks();
    });
  });
}
