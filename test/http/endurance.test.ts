import assert from 'node:assert/strict';
import { createHash } from 'node:crypto';
import { writeFileSync } from 'node:fs';
import http from 'node:http';
import type { AddressInfo } from 'node:net';
import { join } from 'node:path';
import { Readable, type Writable } from 'node:stream';
import { describe, it, type TestContext } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import * as undici from 'undici';
import { createDialer, pem, single } from '../../src/index.ts';
import { authority, KEDGE_NAME, startKedge } from '../helpers/kedge.ts';
import { type NodeProcess, spawnNode } from '../helpers/process.ts';
import { tempDir } from '../helpers/temp.ts';

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
    const total = Number(process.env.KEDGE_TEST_ABORTS ?? 10_000);
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
    for (let i = 0; i < 100 && process.getActiveResourcesInfo().length > baseline + 8; i += 1) await sleep(50);
    assert.ok(process.getActiveResourcesInfo().length <= baseline + 8, process.getActiveResourcesInfo().join());
    const [stats] = dialer.stats().kedges;
    assert.ok(stats!.connections <= 4 && stats!.inFlight === 0, JSON.stringify(stats));
    assert.equal(dialer.stats().inFlight, 0);
    for (const event of dispatcher.eventNames()) assert.ok(dispatcher.listenerCount(event) <= 1);
  });
});

/** Two kedges in processes of their own, before one backend that keeps a ledger of what it executed. */
async function twoKedges(t: TestContext) {
  const ledger = new Map<string, number>();
  const backend = http
    .createServer((request, response) => {
      const id = String(request.headers['x-id']);
      ledger.set(id, (ledger.get(id) ?? 0) + 1);
      request.resume().on('end', () => setTimeout(() => response.end(id), 5));
    })
    .listen(0, '127.0.0.1');
  await new Promise((resolve) => backend.once('listening', resolve));
  t.after(() => {
    backend.closeAllConnections();
    backend.close();
  });
  const ca = await authority();
  const [server, client] = await Promise.all([
    ca.issue({ cn: KEDGE_NAME, dns: [KEDGE_NAME] }),
    ca.issue({ cn: 'pod' }),
  ]);
  const folder = await tempDir(t);
  const host = { dns_name: '127.0.0.1', port: (backend.address() as AddressInfo).port };
  const flags = Object.entries({
    server_tls_cert_file: server.cert,
    server_tls_key_file: server.key,
    server_tls_client_ca_files: ca.cert,
    kedge_config_director_config_path: JSON.stringify({ http: { routes: [{ backend_name: 'orders' }] } }),
    kedge_config_backendpool_config_path: JSON.stringify({ http: { backends: [{ name: 'orders', host }] } }),
  }).map(([name, content]) => {
    writeFileSync(join(folder, name), content);
    return `--${name}=${join(folder, name)}`;
  });
  const start = (port: number | 'any'): Promise<NodeProcess<{ port: number }>> =>
    spawnNode(t, 'examples/kedge/main.ts', [`--server_http_tls_port=${port}`, ...flags]);
  const kedges = await Promise.all([start('any'), start('any')]);
  const identity = pem({ cert: client.cert, key: client.key, ca: ca.cert });
  const kedge = kedges.map(({ ready }) => `https://127.0.0.1:${ready.port}`);
  const dial = (protocol: 'h1' | 'h2') => {
    const dialer = createDialer({
      identity,
      mapper: single({ kedge, serverName: KEDGE_NAME }),
      http: { protocol },
      failover: { breaker: { backoffMs: 200 } },
    });
    t.after(() => dialer.destroy());
    return dialer;
  };
  return { ledger, kedges, start, dial };
}

describe('two kedges in processes of their own', () => {
  for (const protocol of ['h2', 'h1'] as const) {
    it(`kill -9 of either fails no idempotent request over ${protocol}, and executes none of the others twice`, async (t) => {
      const { ledger, kedges, start, dial } = await twoKedges(t);
      const { dispatcher } = dial(protocol);
      let running = true;
      let next = 0;
      const outcomes = { ok: 0, failed: [] as string[], unsafeFailed: 0 };
      const load = Array.from({ length: 10 }, async (_, worker) => {
        while (running) {
          next += 1;
          const id = `${worker}-${next}`;
          const method = next % 3 === 0 ? 'POST' : next % 3 === 1 ? 'GET' : 'PUT';
          const body = method === 'GET' ? undefined : 'x';
          try {
            const reply = await undici.request(TARGET, { dispatcher, method, body, headers: { 'x-id': id } });
            const text = await reply.body.text();
            // A kedge that dies while its answer is under way says so, or says nothing.
            if (reply.statusCode !== 200) throw Object.assign(new Error(text), { code: String(reply.statusCode) });
            assert.equal(text, id);
            outcomes.ok += 1;
          } catch (error) {
            if (method === 'POST') outcomes.unsafeFailed += 1;
            else outcomes.failed.push(`${method} ${(error as { code?: string }).code}: ${error}`);
          }
          await sleep(1);
        }
      });
      await sleep(300);
      await kedges[0]!.kill();
      await sleep(500);
      kedges[0] = await start(kedges[0]!.ready.port);
      await sleep(700);
      await kedges[1]!.kill();
      await sleep(300);
      running = false;
      await Promise.all(load);
      assert.ok(outcomes.ok > 300, JSON.stringify(outcomes));
      assert.deepEqual(outcomes.failed, []);
      // Only what was under way on the dead connection, and never twice.
      assert.ok(outcomes.unsafeFailed <= 10, JSON.stringify(outcomes));
      for (const [id, times] of ledger)
        assert.ok(times <= (Number(id.split('-')[1]) % 3 === 0 ? 1 : 2), `${id}: ${times}`);
    });

    it(`a rolling SIGTERM loses nothing over ${protocol}`, async (t) => {
      const { kedges, start, dial } = await twoKedges(t);
      const { dispatcher } = dial(protocol);
      let running = true;
      const failed: string[] = [];
      let ok = 0;
      const load = Array.from({ length: 10 }, async (_, worker) => {
        for (let i = 0; running; i += 1) {
          try {
            const headers = { 'x-id': `${worker}-${i}` };
            const { body, statusCode } = await undici.request(TARGET, {
              dispatcher,
              method: 'POST',
              body: 'x',
              headers,
            });
            if (statusCode !== 200) failed.push(`${statusCode} ${await body.text()}`);
            else if ((await body.text()) === headers['x-id']) ok += 1;
          } catch (error) {
            failed.push(String(error));
          }
        }
      });
      for (const i of [0, 1]) {
        await sleep(300);
        await kedges[i]!.stop();
        kedges[i] = await start(kedges[i]!.ready.port);
      }
      await sleep(300);
      running = false;
      await Promise.all(load);
      assert.ok(ok > 300, `${ok} calls`);
      assert.deepEqual(failed, []);
    });
  }
});
