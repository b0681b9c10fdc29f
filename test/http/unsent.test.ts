import assert from 'node:assert/strict';
import { Readable } from 'node:stream';
import { describe, it, type TestContext } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import * as undici from 'undici';
import type { Dialer } from '../../src/index.ts';
import { startKedge } from '../helpers/kedge.ts';

const TARGET = 'http://orders.us1:8080';
const BODY = 'precious data';

type Call = (dialer: Dialer, path: string, signal: AbortSignal) => Promise<unknown>;

const using =
  (method: string, body: () => string | Buffer | Readable | undefined): Call =>
  (dialer, path, signal) =>
    undici.request(TARGET + path, {
      dispatcher: dialer.dispatcher,
      method: method as 'PUT',
      body: body() ?? null,
      signal,
    });

const calls: Record<string, Call> = {
  GET: using('GET', () => undefined),
  'PUT of a Buffer': using('PUT', () => Buffer.from(BODY)),
  'PUT of a stream': using('PUT', () => Readable.from([Buffer.from(BODY)])),
  'POST of a string': using('POST', () => BODY),
  'fetch of a string': (dialer, path, signal) =>
    dialer.fetch(TARGET + path, { method: 'PUT', body: BODY, signal }).then((reply) => reply.text()),
  'undici fetch of a string': (dialer, path, signal) =>
    undici.fetch(TARGET + path, { dispatcher: dialer.dispatcher, method: 'PUT', body: BODY, signal }),
};

/** A kedge that writes down what was executed: method, path and the body as it arrived whole. */
async function ledger(t: TestContext, delayMs = 0) {
  const executed: string[] = [];
  const kedge = await startKedge(t, {
    handler: (request, response) => {
      let body = '';
      request.on('error', () => {});
      request.on('data', (chunk) => {
        body += chunk;
      });
      request.on('end', () => {
        executed.push(`${request.method} ${request.url} ${JSON.stringify(body)}`);
        setTimeout(() => response.end('ok'), request.url === '/slow' ? 100 : delayMs);
      });
    },
  });
  return { kedge, executed };
}

async function settled(call: Promise<unknown>): Promise<void> {
  await assert.rejects(call, (error: Error) => error.name === 'AbortError' || error.name === 'TimeoutError');
}

for (const protocol of ['h1', 'h2'] as const) {
  describe(`a call that is aborted before its connection takes it is never sent (${protocol})`, () => {
    for (const [name, call] of Object.entries(calls)) {
      it(`while the kedge is dialled: ${name}`, async (t) => {
        const { kedge, executed } = await ledger(t);
        const dialer = kedge.dialer({ http: { protocol } });
        const abort = new AbortController();
        const aborted = [call(dialer, '/one', abort.signal), call(dialer, '/two', abort.signal)];
        setImmediate(() => abort.abort());
        await Promise.all(aborted.map(settled));
        assert.equal(await (await dialer.fetch(`${TARGET}/after`)).text(), 'ok');
        await sleep(50);
        assert.deepEqual(executed, ['GET /after ""']);
        assert.deepEqual([dialer.stats().inFlight, dialer.stats().kedges[0]!.inFlight], [0, 0]);
      });

      it(`with a signal that was aborted beforehand: ${name}`, async (t) => {
        const { kedge, executed } = await ledger(t);
        const dialer = kedge.dialer({ http: { protocol } });
        for (const round of ['cold', 'connected']) {
          await settled(call(dialer, `/${round}`, AbortSignal.abort()));
          assert.equal(await (await dialer.fetch(`${TARGET}/after`)).text(), 'ok');
        }
        assert.deepEqual(executed, Array(2).fill('GET /after ""'));
        assert.equal(kedge.sockets.size, kedge.handshakes, 'no connection was closed for it');
      });

      it(`in the queue of a busy pool: ${name}`, async (t) => {
        const { kedge, executed } = await ledger(t);
        const dialer = kedge.dialer({
          http: { protocol, connections: 1, maxConcurrentStreams: 1 },
        });
        const first = dialer.fetch(`${TARGET}/slow`);
        while (executed.length === 0) await sleep(2);
        const abort = new AbortController();
        const aborted = [call(dialer, '/one', abort.signal), call(dialer, '/two', abort.signal)];
        const after = dialer.fetch(`${TARGET}/after`, { method: 'PUT', body: BODY });
        await sleep(10);
        abort.abort();
        await Promise.all(aborted.map(settled));
        assert.deepEqual(
          [await (await first).text(), await (await after).text(), executed],
          ['ok', 'ok', ['GET /slow ""', `PUT /after "${BODY}"`]],
        );
        assert.equal(kedge.handshakes, 1);
      });
    }

    it('in its own onRequestStart', async (t) => {
      const { kedge, executed } = await ledger(t);
      const dialer = kedge.dialer({ http: { protocol } });
      for (const body of [BODY, Readable.from([BODY]), null]) {
        const ends: unknown[] = [];
        await new Promise<void>((resolve) => {
          const options = { origin: TARGET, path: '/one', method: 'POST' as const, body };
          dialer.dispatcher.dispatch(options, {
            onRequestStart: (controller) => controller.abort(new Error('never mind')),
            onResponseStart: () => ends.push('answer'),
            onResponseError: (_controller, error) => {
              ends.push(error.message);
              resolve();
            },
          });
        });
        assert.equal(await (await dialer.fetch(`${TARGET}/after`)).text(), 'ok');
        assert.deepEqual(ends, ['never mind']);
      }
      assert.deepEqual(executed, Array(3).fill('GET /after ""'));
      assert.equal(kedge.sockets.size, kedge.handshakes, 'no connection was closed for it');
    });

    it('when forty PUTs time out in the queue of a kedge that is slow', async (t) => {
      const { kedge, executed } = await ledger(t, 400);
      const dialer = kedge.dialer({
        http: { protocol, connections: protocol === 'h1' ? 8 : 1, maxConcurrentStreams: 8 },
      });
      await dialer.warm(TARGET);
      const signal = AbortSignal.timeout(200);
      const puts = Array.from({ length: 40 }, (_, i) =>
        dialer.fetch(`${TARGET}/${i}`, { method: 'PUT', body: BODY, signal }).then((reply) => reply.text()),
      );
      await Promise.all(puts.map(settled));
      await sleep(600);
      assert.ok(executed.length <= 8, `${executed.length} were executed`);
      assert.deepEqual(
        executed.filter((each) => !each.endsWith(JSON.stringify(BODY))),
        [],
      );
    });
  });
}
