import assert from 'node:assert/strict';
import { createHash } from 'node:crypto';
import { Readable, type Writable } from 'node:stream';
import { describe, it } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import * as undici from 'undici';
import { startKedge } from '../helpers/kedge.ts';

const TARGET = 'http://orders.us1:8080/';

describe('large bodies', () => {
  for (const protocol of ['h2', 'h1'] as const) {
    it(`1 GiB down and up over ${protocol} in flat memory`, async (t) => {
      const chunk = Buffer.alloc(1024 * 1024, 'g');
      const count = 512;
      function* chunks() {
        for (let i = 0; i < count; i += 1) yield chunk;
      }
      const kedge = await startKedge(t, {
        handler: (request, response) => {
          if (request.method === 'GET') {
            Readable.from(chunks()).pipe(response as unknown as Writable);
            return;
          }
          const hash = createHash('sha1');
          let bytes = 0;
          request.on('data', (data: Buffer) => {
            bytes += data.length;
          });
          request.on('end', () => response.end(`${bytes} ${hash.digest('hex').length}`));
        },
      });
      const { dispatcher } = kedge.dialer({ http: { protocol } });
      const before = process.memoryUsage().rss;
      const { body } = await undici.request(TARGET, { dispatcher });
      let down = 0;
      for await (const data of body) down += (data as Buffer).length;
      const reply = await undici.request(TARGET, { dispatcher, method: 'POST', body: Readable.from(chunks()) });
      assert.equal(down, count * chunk.length);
      assert.match(await reply.body.text(), new RegExp(`^${count * chunk.length} `));
      // Far below the 1 GiB that passed; the windows and the garbage of both ends are in it.
      const grown = process.memoryUsage().rss - before;
      assert.ok(grown < 300 * 1024 * 1024, `${Math.round(grown / 1024 / 1024)} MiB more`);
    });
  }
});

describe('many aborts', () => {
  it('leave no socket, listener or timer behind', async (t) => {
    const total = Number(process.env.KEDGE_TEST_ABORTS ?? 100_000);
    const kedge = await startKedge(t, {
      settings: { maxConcurrentStreams: 1000 },
      handler: (request, response) => {
        request.on('error', () => {});
        request.resume();
        setTimeout(() => response.end('late'), 2);
      },
    });
    const dialer = kedge.dialer();
    const dispatcher: undici.Dispatcher = dialer.dispatcher;
    await (await undici.request(TARGET, { dispatcher })).body.dump();
    const baseline = process.getActiveResourcesInfo().length;
    for (let done = 0; done < total; done += 100) {
      await Promise.all(
        Array.from({ length: 100 }, async (_, i) => {
          const abort = new AbortController();
          if (i % 3 === 0) setImmediate(() => abort.abort());
          if (i % 3 === 1) setTimeout(() => abort.abort(), i % 5);
          if (i % 3 === 2) queueMicrotask(() => abort.abort());
          await undici.request(TARGET, { dispatcher, signal: abort.signal }).then(
            ({ body }) => body.dump(),
            () => {},
          );
        }),
      );
    }
    // The last aborts reach their connections a turn later, and answers to what was aborted are still on their way.
    const busy = () => {
      const [kedge] = dialer.stats().kedges;
      return process.getActiveResourcesInfo().length > baseline + 8 || kedge!.connections > 4 || kedge!.inFlight > 0;
    };
    for (let i = 0; i < 200 && busy(); i += 1) await sleep(50);
    assert.ok(!busy(), `${JSON.stringify(dialer.stats())} ${process.getActiveResourcesInfo().join()}`);
    assert.equal(dialer.stats().inFlight, 0);
    for (const event of dispatcher.eventNames()) assert.ok(dispatcher.listenerCount(event) <= 1);
  });
});
