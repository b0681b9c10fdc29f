import assert from 'node:assert/strict';
import { constants, type Http2ServerRequest } from 'node:http2';
import { Readable } from 'node:stream';
import { describe, it } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import * as undici from 'undici';
import { startKedge } from '../helpers/kedge.ts';
import { runNode } from '../helpers/process.ts';
import { rotating } from '../helpers/rotating.ts';

const TARGET = 'http://orders.us1:8080/';

/** Aborts a call in one of many ticks and phases, by number. */
function abortedCall(i: number, dispatcher: undici.Dispatcher): Promise<unknown> {
  const abort = new AbortController();
  const options = {
    dispatcher,
    signal: abort.signal,
    ...(i % 3 === 0 ? { method: 'POST' as const, body: 'x'.repeat(i * 100) } : {}),
  };
  const call = i % 2 === 0 ? undici.request(TARGET, options) : fetch(TARGET, options as RequestInit);
  const settled = call
    .then(async (response) => {
      abort.abort();
      const { body } = response as { body: AsyncIterable<unknown> };
      for await (const _ of body);
    })
    .catch(() => {});
  switch (i % 8) {
    case 0:
      abort.abort();
      break;
    case 1:
      queueMicrotask(() => abort.abort());
      break;
    case 2:
      process.nextTick(() => abort.abort());
      break;
    case 3:
      setImmediate(() => abort.abort());
      break;
    case 4:
      setTimeout(() => abort.abort(), 1);
      break;
    case 5:
      setTimeout(() => abort.abort(), i % 20);
      break;
    case 6:
      Promise.resolve()
        .then(() => Promise.resolve())
        .then(() => abort.abort());
      break;
    default:
    // Aborted when the headers are there.
  }
  return settled;
}

describe('mixed aborts', () => {
  for (const protocol of ['h2', 'h1'] as const) {
    for (const end of ['close', 'destroy', 'reset'] as const) {
      it(`200 over ${protocol}, then ${end}, never crash the process`, async (t) => {
        const failures: unknown[] = [];
        const note = (error: unknown) => failures.push(error);
        process.on('uncaughtException', note);
        process.on('unhandledRejection', note);
        t.after(() => {
          process.off('uncaughtException', note);
          process.off('unhandledRejection', note);
        });
        const kedge = await startKedge(t, {
          handler: (request, response) => {
            request.on('error', () => {});
            request.resume();
            setTimeout(() => response.end('late'), 5);
          },
        });
        const dialer = kedge.dialer({ http: { protocol } });
        const dispatcher: undici.Dispatcher = dialer.dispatcher;
        const calls: Promise<unknown>[] = [];
        for (let i = 0; i < 200; i += 1) {
          calls.push(abortedCall(i, dispatcher));
          if (i % 50 === 49) await sleep(3);
        }
        if (end === 'reset') kedge.reset();
        if (end === 'destroy') await dialer.destroy();
        if (end === 'close') await dialer.close();
        await Promise.all(calls);
        await dialer.close();
        await sleep(20);
        assert.deepEqual(failures, []);
        assert.equal(dialer.stats().inFlight, 0);
      });
    }
  }
});

describe('an aborted upload', () => {
  it('that the window of the kedge holds back is reset at once, and cannot hang the process', async (t) => {
    const codes: number[] = [];
    const kedge = await startKedge(t, {
      alpn: ['h2'],
      handler: (request, response) => {
        const { stream } = request as Http2ServerRequest;
        request.on('error', () => {});
        if (request.url === '/slow') stream.on('close', () => codes.push(stream.rstCode));
        else request.resume().on('end', () => response.end('ok'));
      },
    });
    const dispatcher: undici.Dispatcher = kedge.dialer().dispatcher;
    const abort = new AbortController();
    // Nobody reads these: more than the stream's and the connection's windows stay with us, the end included.
    const uploads = Array.from({ length: 10 }, () =>
      undici.request(`${TARGET}slow`, { dispatcher, method: 'POST', body: Buffer.alloc(50_000), signal: abort.signal }),
    );
    for (const upload of uploads) upload.catch(() => {});
    while (kedge.seen.length < 10) await sleep(5);
    await sleep(50);
    abort.abort();
    for (const upload of uploads) await assert.rejects(upload, { name: 'AbortError' });
    const { body } = await undici.request(TARGET, { dispatcher, method: 'POST', body: Buffer.alloc(500_000) });
    assert.equal(await body.text(), 'ok');
    assert.deepEqual(codes, Array(10).fill(constants.NGHTTP2_CANCEL));
    assert.equal(kedge.handshakes, 1);
  });
});

describe('a call that is aborted while its kedge is dialled', () => {
  it('is over at once, by every API', async (t) => {
    const kedge = await startKedge(t, { onTcp: () => true });
    for (const protocol of ['h1', 'h2'] as const) {
      const dialer = kedge.dialer({ http: { protocol } });
      const { dispatcher } = dialer;
      const calls: Record<string, (signal: AbortSignal, body: Readable) => Promise<unknown>> = {
        fetch: (signal, body) => fetch(TARGET, { dispatcher, signal, method: 'POST', body, duplex: 'half' } as never),
        'undici fetch': (signal, body) =>
          undici.fetch(TARGET, { dispatcher, signal, method: 'POST', body, duplex: 'half' }),
        request: (signal, body) => undici.request(TARGET, { dispatcher, signal, method: 'POST', body }),
      };
      for (const [name, call] of Object.entries(calls)) {
        const given = new AbortController();
        const body = Readable.from(['x', 'y']);
        const over = assert.rejects(call(given.signal, body), { name: 'AbortError' });
        await sleep(20);
        assert.equal(dialer.stats().inFlight, 1, name);
        given.abort();
        await over;
        await sleep(1);
        assert.equal(dialer.stats().inFlight, 0, name);
        // A fetch has wrapped its body in streams that nobody has begun to read.
        if (name === 'request') assert.ok(body.destroyed);
      }
    }
  });
});

describe('an upload that ends half-way', () => {
  for (const protocol of ['h2', 'h1'] as const) {
    it(`never looks whole to the kedge (${protocol})`, async (t) => {
      const whole: string[] = [];
      const cut: string[] = [];
      const kedge = await startKedge(t, {
        handler: (request, response) => {
          let body = '';
          request.on('error', () => {});
          request.on('data', (chunk) => {
            body += chunk;
          });
          request.on('aborted', () => cut.push(body));
          request.on('end', () => {
            // Node ends the reading side of a stream that was reset, too, but says first that it was aborted.
            if (!request.aborted) whole.push(body);
          });
          if (request.url === '/early') {
            response.statusCode = 413;
            (response as NodeJS.WritableStream).write('too large');
          }
        },
      });
      const dispatcher: undici.Dispatcher = kedge.dialer({ http: { protocol } }).dispatcher;
      const failing = async function* () {
        yield 'part';
        await sleep(30);
        throw new Error('the disk is gone');
      };
      const endless = async function* () {
        yield 'part';
        await new Promise(() => {});
      };
      const put = (path: string, body: AsyncIterable<string>, signal: AbortSignal | null = null) =>
        undici.request(TARGET + path, { dispatcher, method: 'PUT', body: Readable.from(body), signal });
      await assert.rejects(put('broken', failing()), /the disk is gone/);
      await assert.rejects(put('timeout', endless(), AbortSignal.timeout(300)), { name: 'TimeoutError' });
      const init = { dispatcher, method: 'PUT', duplex: 'half' as const, signal: AbortSignal.timeout(300) };
      await assert.rejects(undici.fetch(`${TARGET}fetch`, { ...init, body: endless() as never }));
      const { statusCode, body } = await put('early', endless());
      assert.equal(statusCode, 413);
      body.destroy();
      for (let i = 0; i < 100 && cut.length < 4; i += 1) await sleep(20);
      await sleep(50);
      assert.deepEqual([whole, cut], [[], ['part', 'part', 'part', 'part']]);
    });
  }
});

describe('destroy()', () => {
  for (const protocol of ['h2', 'h1'] as const) {
    it(`ends where calls wait in the queue of a connection that drains (${protocol})`, {
      timeout: 10_000,
    }, async (t) => {
      const kedge = await startKedge(t, { handler: (request) => request.resume() });
      const identity = rotating(kedge);
      const dialer = kedge.dialer({ identity, http: { protocol, connections: 1, maxConcurrentStreams: 1 } });
      const { dispatcher } = dialer;
      const calls = Array.from({ length: 5 }, () => undici.request(TARGET, { dispatcher, method: 'POST', body: 'x' }));
      for (const call of calls) call.catch(() => {});
      while (kedge.seen.length === 0) await sleep(2);
      await identity.rotate();
      await dialer.destroy();
      const { host } = new URL(kedge.url);
      for (const call of calls) await assert.rejects(call, { code: 'ERR_KEDGE_CLOSED', kedge: host });
      assert.deepEqual([dialer.stats().inFlight, dialer.stats().kedges], [0, []]);
    });
  }
});

describe('close()', () => {
  it('lets the process exit by itself', async (t) => {
    const kedge = await startKedge(t);
    const code = `
      import { createDialer, pem, single } from ${JSON.stringify(new URL('../../src/index.ts', import.meta.url).href)};
      const { cert, key, ca, kedge } = JSON.parse(process.argv[1]);
      const dialer = createDialer({ mapper: single(kedge), identity: pem({ cert, key, ca }) });
      const response = await dialer.fetch('http://a.us1/');
      await response.text();
      await dialer.close();
      console.log(process.getActiveResourcesInfo().filter((kind) => /TCP|TLS|Timeout/.test(kind)).length);
    `;
    const init = { cert: kedge.client.cert, key: kedge.client.key, ca: kedge.ca.cert, kedge: kedge.route() };
    const { status, out } = await runNode(['--input-type=module', '-e', code, JSON.stringify(init)]);
    assert.equal(status, 0, out);
    assert.equal(out.trim(), '0');
  });
});
