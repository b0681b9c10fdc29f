/** Time, bandwidth and memory that run short: nothing is broken, so nothing may be lost. */
import * as undici from 'undici';
import { spawnNode } from '../../helpers/process.ts';
import { startFaulty, startPair } from '../kedges.ts';
import type { Paused, PausedResult } from '../paused.ts';
import type { Scenario } from '../run.ts';
import type { Uploaded, Uploading } from '../uploading.ts';
import type { World } from '../world.ts';

const MIB = 1024 * 1024;
const TARGET = 'http://orders.us1:8080/';

function files(world: World): { cert: string; key: string; ca: string; token: string } {
  const { cert, key, ca } = world.identity.current();
  return { cert: String(cert), key: String(key), ca: String(ca), token: world.token };
}

/** Calls over every wire in a process of its own, to which `meanwhile` happens. */
async function paused(
  world: World,
  options: Partial<Paused>,
  meanwhile: (pid: number) => Promise<void>,
): Promise<void> {
  const { urls, relays } = await startPair(world);
  // Some calls are always under way.
  for (const relay of relays) relay.latencyMs = 50;
  const given: Paused = { ...files(world), urls, rounds: 120, everyMs: 50, stalls: 0, stallMs: 0, ...options };
  const child = await spawnNode<object>(world.asTest, new URL('../paused.ts', import.meta.url), [], {
    env: { CHAOS: JSON.stringify(given), DEBUG: '' },
  });
  await meanwhile(child.pid);
  await child.exited;
  world.secrets.scan('the output of a paused process', child.output);
  const line = child.output.split('\n').findLast((text) => text.startsWith('{'));
  if (line === undefined) return world.check(false, `a paused process told nothing: ${child.output}`);
  for (const [wire, { calls, failed }] of Object.entries(JSON.parse(line) as PausedResult)) {
    world.uncounted += calls;
    world.check(failed.length === 0, `${failed.length} of ${calls} calls were lost over ${wire}: ${failed[0]}`);
    world.note(`${wire}: ${calls - failed.length} of ${calls}`);
  }
}

const stopped: Scenario = {
  name: 'process stopped for 20 s, twice (SIGSTOP)',
  run: (world) =>
    paused(world, {}, async (pid) => {
      for (let i = 0; i < 2; i += 1) {
        await world.pass(1, 1);
        process.kill(pid, 'SIGSTOP');
        await world.pass(20, 6);
        process.kill(pid, 'SIGCONT');
      }
    }),
};

const stalled: Scenario = {
  name: 'event loop stalled for 4.5 s as a PING leaves',
  run: (world) => paused(world, { stalls: world.times(3), stallMs: 4500 }, async () => {}),
};

const slow: Scenario = {
  name: 'slow link (100 KiB/s)',
  run: async (world) => {
    const { urls, relays } = await startPair(world);
    for (const relay of relays) relay.slice = { bytes: 1024, everyMs: 10 };
    const size = Math.max(0.625 * MIB, Math.round(6 * MIB * world.scale));
    await Promise.all(
      (['h1', 'h2'] as const).map(async (protocol) => {
        const { dispatcher } = world.dialer([urls[protocol === 'h1' ? 0 : 1]!], { http: { protocol } });
        const began = performance.now();
        const down = undici.request(TARGET, { dispatcher, headers: { 'x-pad': String(size) } });
        const length = (await (await down).body.text()).length;
        world.check(length > size, `${length} of ${size} bytes came down over ${protocol}`);
        const seconds = (performance.now() - began) / 1000;
        const up = undici.request(TARGET, { dispatcher, method: 'POST', body: 'u'.repeat(size) });
        const sent = (await (await up).body.text()).length;
        world.check(sent > size, `${sent} of ${size} bytes came back of an upload over ${protocol}`);
        world.uncounted += 2;
        world.note(`${protocol}: ${(size / MIB).toFixed(1)} MiB at ${Math.round(size / 1024 / seconds)} KiB/s`);
      }),
    );
    const { accepted } = relays[1]!;
    world.check(accepted === 1, `${accepted} connections were made over h2`);
  },
};

const HEAP_MIB = 64;
const MOST_RSS = 400 * MIB;

const uploads: Scenario = {
  name: '500 uploads of 1 MiB at once in a heap of 64 MB',
  run: async (world) => {
    const kedge = await startFaulty(world, (request, response) => {
      let bytes = 0;
      request.on('error', () => {});
      request.on('data', (chunk: Buffer) => {
        bytes += chunk.length;
      });
      request.on('end', () => response.end(String(bytes)));
    });
    for (const form of ['Buffer', 'fetch', 'stream'] as const) {
      const given: Uploading = { ...files(world), url: kedge.url, form, uploads: 500, bytes: MIB };
      const child = await spawnNode<Uploaded>(world.asTest, new URL('../uploading.ts', import.meta.url), [], {
        env: { CHAOS: JSON.stringify(given), DEBUG: '', NODE_OPTIONS: `--max-old-space-size=${HEAP_MIB}` },
      });
      const { ok, failed, rssBytes } = child.ready;
      await child.exited;
      const rss = Math.round(rssBytes / MIB);
      world.uncounted += ok + failed.length;
      world.check(failed.length === 0, `${failed.length} of 500 uploads failed (${form}): ${failed[0]}`);
      // fetch has a copy of each body the moment it is called, whoever sends it.
      world.check(form === 'fetch' || rssBytes < MOST_RSS, `${rss} MiB for uploads (${form})`);
      world.note(`${form}: ${ok} of 500, ${rss} MiB`);
    }
  },
};

export const scarcity: readonly Scenario[] = [stopped, stalled, slow, uploads];
