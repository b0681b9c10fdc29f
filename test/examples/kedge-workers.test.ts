import assert from 'node:assert/strict';
import { once } from 'node:events';
import { writeFileSync } from 'node:fs';
import http from 'node:http';
import type { AddressInfo } from 'node:net';
import { join } from 'node:path';
import { describe, it, type TestContext } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { createDialer, type Dialer, single } from '../../src/index.ts';
import type { NodeProcess } from '../helpers/process.ts';
import { type KedgeProcesses, type KedgeReady, kedgeProcesses } from '../helpers/reference-kedge.ts';

const WORKERS = 2;

async function backend(t: TestContext, name: string): Promise<number> {
  const server = http.createServer((request, response) => {
    request.resume();
    setTimeout(() => response.end(name), request.url === '/slow' ? 1_500 : 0);
  });
  server.listen(0, '127.0.0.1');
  await once(server, 'listening');
  t.after(() => {
    server.closeAllConnections();
    server.close();
  });
  return (server.address() as AddressInfo).port;
}

const poolOf = (port: number) => ({
  http: { backends: [{ name: 'orders', host: { dns_name: '127.0.0.1', port } }] },
});
const director = { http: { routes: [{ backend_name: 'orders' }] } };

type Kedge = NodeProcess<KedgeReady & { pids: number[] }>;

async function started(t: TestContext) {
  const [one, two] = await Promise.all([backend(t, 'one'), backend(t, 'two')]);
  const processes = await kedgeProcesses(t, { director, backendPool: poolOf(one) });
  const kedge = (await processes.start('any', [`--workers=${WORKERS}`, '--server_http_port=any'])) as Kedge;
  assert.equal(kedge.ready.pids.length, WORKERS);
  const debug = async (path: string) => (await fetch(`http://127.0.0.1:${kedge.ready.debugPort}${path}`)).text();
  return { one, two, processes, kedge, debug };
}

/** A client whose connections come to every worker in turn. */
function client(t: TestContext, { identity }: KedgeProcesses, { ready }: Kedge): Dialer {
  const mapper = single({ kedge: `https://127.0.0.1:${ready.port}` });
  const dialer = createDialer({ mapper, identity, http: { protocol: 'h1' } });
  t.after(() => dialer.destroy());
  return dialer;
}

const ask = async (dialer: Dialer, path = '/'): Promise<string> => {
  const response = await dialer.fetch(`http://orders.us1${path}`, { method: 'POST' });
  return `${response.status} ${await response.text()}`;
};

/** Keeps eight calls under way until it is told to stop; counts the answers. */
function load(dialer: Dialer): { stop(): Promise<Record<string, number>> } {
  const answers: Record<string, number> = {};
  let isRunning = true;
  const all = Array.from({ length: 8 }, async () => {
    while (isRunning) {
      const answer = await ask(dialer).catch((error: Error) => error.message);
      answers[answer] = (answers[answer] ?? 0) + 1;
    }
  });
  return {
    stop: async () => {
      isRunning = false;
      await Promise.all(all);
      return answers;
    },
  };
}

const until = async (what: () => boolean | Promise<boolean>, text: () => string) => {
  for (let i = 0; i < 1_200; i += 1) {
    if (await what()) return;
    await sleep(50);
  }
  assert.fail(text());
};
const sumOf = (metrics: string, line: RegExp) =>
  [...metrics.matchAll(line)].reduce((sum, [, value]) => sum + Number(value), 0);

describe('a reference kedge with several workers', () => {
  it('takes a changed file in all of them, a broken one in none, and loses no call meanwhile', async (t) => {
    const { two, processes, kedge, debug } = await started(t);
    const file = join(processes.folder, 'kedge_config_backendpool_config_path');
    const loads = Array.from({ length: 2 }, () => load(client(t, processes, kedge)));
    await sleep(300);
    writeFileSync(file, '{"http": {"backends": [{"name": "orders"}]}}');
    await until(
      () => /configuration refused, the old one stays/.test(kedge.output),
      () => kedge.output,
    );
    assert.match(kedge.output, /http\.backends\[0\]: expected one of host, srv and k8s/);
    for (let i = 0; i < 8; i += 1) assert.equal(await ask(client(t, processes, kedge)), '200 one');
    writeFileSync(file, JSON.stringify(poolOf(two)));
    await until(
      () => /configuration reloaded/.test(kedge.output),
      () => kedge.output,
    );
    for (let i = 0; i < 8; i += 1) assert.equal(await ask(client(t, processes, kedge)), '200 two', 'every worker');
    const answers: Record<string, number> = {};
    for (const each of loads)
      for (const [answer, count] of Object.entries(await each.stop())) answers[answer] = (answers[answer] ?? 0) + count;
    assert.deepEqual(Object.keys(answers).sort(), ['200 one', '200 two'], JSON.stringify(answers));

    const metrics = await debug('/metrics');
    const served = answers['200 one']! + answers['200 two']! + 16;
    assert.equal(sumOf(metrics, /^kedge_requests_total\{wire="http\/1\.1",status="200"\} (\d+)$/gm), served, metrics);
    assert.match(metrics, /^kedge_configuration_reloads_total\{taken="true"\} 2$/m);
    assert.match(await debug('/debug/routes'), new RegExp(`"port": ${two}`));
  });

  it('replaces one that was killed by one with the files of the others, though those on disk are broken by now', async (t) => {
    const { processes, kedge } = await started(t);
    writeFileSync(join(processes.folder, 'kedge_config_backendpool_config_path'), 'broken');
    await until(
      () => /configuration refused/.test(kedge.output),
      () => kedge.output,
    );
    const [first] = kedge.ready.pids;
    process.kill(first!, 'SIGKILL');
    await until(
      () => new RegExp(`worker ${first} ended with SIGKILL: another one starts`).test(kedge.output),
      () => kedge.output,
    );
    const dialer = client(t, processes, kedge);
    for (let i = 0; i < 20; i += 1) assert.equal(await ask(client(t, processes, kedge)), '200 one');
    assert.equal(await ask(dialer), '200 one');
    await until(
      () => kedge.output.includes(`${WORKERS} workers serve`),
      () => kedge.output,
    );
    process.kill(kedge.ready.pids[1]!, 'SIGKILL');
    await until(
      async () => (await ask(client(t, processes, kedge)).catch(() => '')) === '200 one',
      () => kedge.output,
    );
    assert.doesNotMatch(kedge.output, /cannot start/);
  });

  it('lets every worker finish what is under way when it is asked to end, and ends with all of them', async (t) => {
    const { processes, kedge } = await started(t);
    const dialers = Array.from({ length: 6 }, () => client(t, processes, kedge));
    const slow = dialers.map((dialer) => ask(dialer, '/slow'));
    await sleep(700);
    const ended = kedge.stop();
    assert.deepEqual(new Set(await Promise.all(slow)), new Set(['200 one']));
    assert.deepEqual(await ended, { code: 0, signal: null });
    for (const pid of kedge.ready.pids) assert.throws(() => process.kill(pid, 0), { code: 'ESRCH' });
  });

  it('ends its workers when it is killed itself', async (t) => {
    const { kedge } = await started(t);
    await kedge.kill();
    const isAlive = (pid: number) => {
      try {
        return process.kill(pid, 0);
      } catch {
        return false;
      }
    };
    await until(
      () => !kedge.ready.pids.some(isAlive),
      () => 'they live on',
    );
  });

  it('does not start with files that no worker could use', async (t) => {
    const processes = await kedgeProcesses(t, { director, backendPool: { http: { backends: [{ name: 'orders' }] } } });
    await assert.rejects(processes.start('any', [`--workers=${WORKERS}`]), /expected one of host, srv and k8s/);
  });
});
