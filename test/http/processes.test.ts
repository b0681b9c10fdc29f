import assert from 'node:assert/strict';
import { writeFileSync } from 'node:fs';
import http from 'node:http';
import type { AddressInfo } from 'node:net';
import { join } from 'node:path';
import { describe, it, type TestContext } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';
import * as undici from 'undici';
import { createDialer, type KedgeError, single } from '../../src/index.ts';
import type { Fault, HostileFiles } from '../helpers/hostile-kedge.ts';
import { authority, KEDGE_NAME } from '../helpers/kedge.ts';
import { spawnNode } from '../helpers/process.ts';
import { kedgeProcesses } from '../helpers/reference-kedge.ts';

const TARGET = 'http://orders.us1:8080/';
const HOSTILE = fileURLToPath(new URL('../helpers/hostile-kedge.ts', import.meta.url));

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
  const host = { dns_name: '127.0.0.1', port: (backend.address() as AddressInfo).port };
  const { start, folder, identity, server } = await kedgeProcesses(t, {
    director: { http: { routes: [{ backend_name: 'orders' }] } },
    backendPool: { http: { backends: [{ name: 'orders', host }] } },
  });
  const kedges = await Promise.all([start('any'), start('any')]);
  const kedge = kedges.map(({ ready }) => `https://127.0.0.1:${ready.port}`);
  /** A kedge that fails, to stand before the first good one. */
  const startHostile = async (fault: Fault) => {
    const other = await (await authority()).issue({ cn: 'other', dns: ['other.kedge.test'] });
    const name = fault === 'wrong-certificate' ? 'other' : 'server';
    const files: HostileFiles = {
      cert: join(folder, `${name}.crt`),
      key: join(folder, `${name}.key`),
      ca: join(folder, 'server_tls_client_ca_files'),
      backend: host.port,
    };
    writeFileSync(files.cert, (name === 'other' ? other : server).cert);
    writeFileSync(files.key, (name === 'other' ? other : server).key);
    const { ready } = await spawnNode<{ port: number }>(t, HOSTILE, [fault, JSON.stringify(files)]);
    return `https://127.0.0.1:${ready.port}`;
  };
  const dial = (protocol: 'h1' | 'h2', first: string[] = []) => {
    const dialer = createDialer({
      identity,
      mapper: single({ kedge: [...first, ...kedge], serverName: KEDGE_NAME }),
      connect: { handshakeTimeoutMs: 300 },
      http: { protocol },
      failover: { breaker: { backoffMs: 200 } },
    });
    t.after(() => dialer.destroy());
    return dialer;
  };
  return { ledger, kedges, start, startHostile, dial };
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

describe('a kedge that fails, in a process of its own, before one that works', () => {
  /** Whether a POST, which must never run twice, may be sent to the next kedge; an idempotent PUT may unless an answer has begun. */
  const faults: { fault: Fault; post: boolean; put: boolean; protocols: ('h1' | 'h2')[]; code?: RegExp }[] = [
    { fault: 'tls-stall', post: true, put: true, protocols: ['h2', 'h1'] },
    { fault: 'wrong-certificate', post: true, put: true, protocols: ['h2', 'h1'] },
    { fault: 'refused-stream', post: true, put: true, protocols: ['h2'] },
    { fault: 'goaway', post: true, put: true, protocols: ['h2'] },
    { fault: 'reset-before-headers', post: false, put: true, protocols: ['h2', 'h1'] },
    { fault: 'reset-mid-body', post: false, put: false, protocols: ['h2', 'h1'] },
  ];
  for (const { fault, post, put, protocols } of faults) {
    it(fault, async (t) => {
      const { ledger, startHostile, dial } = await twoKedges(t);
      const hostile = await startHostile(fault);
      for (const protocol of protocols) {
        for (const [method, survives] of [
          ['POST', post],
          ['PUT', put],
        ] as const) {
          // Sequential and at once: a queue fails together, and each of its calls once.
          const { dispatcher } = dial(protocol, [hostile]);
          const outcomes = await Promise.all(
            Array.from({ length: 10 }, async (_, i) => {
              const id = `${fault}-${protocol}-${method}-${i}`;
              try {
                const { body } = await undici.request(TARGET, {
                  dispatcher,
                  method,
                  body: 'x',
                  headers: { 'x-id': id },
                });
                return (await body.text()) === id ? 'ok' : 'spliced';
              } catch (error) {
                return (error as KedgeError).code;
              }
            }),
          );
          // What was queued behind the fault may never have met it.
          const allowed = survives ? ['ok'] : ['ok', 'ERR_KEDGE_CONNECTION', 'ERR_KEDGE_RESPONSE'];
          assert.ok(
            outcomes.every((outcome) => allowed.includes(outcome)),
            `${protocol} ${method}: ${outcomes}`,
          );
          if (!survives)
            assert.ok(!outcomes.every((outcome) => outcome === 'ok'), `${protocol} ${method}: ${outcomes}`);
        }
      }
      for (const [id, times] of ledger)
        assert.ok(times <= (id.includes('-POST-') ? 1 : 2), `${id} was executed ${times} times`);
    });
  }
});
