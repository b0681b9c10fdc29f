/** What grows when calls are many: sockets, listeners, heap, connections. */
import { setFlagsFromString } from 'node:v8';
import { runInNewContext } from 'node:vm';
import * as undici from 'undici';
import { hosts, staticToken } from '../../../src/index.ts';
import { KEDGE_NAME } from '../../helpers/kedge.ts';
import { spawnNode } from '../../helpers/process.ts';
import { failures, noneFailed, tally, typed } from '../asserts.ts';
import { grpcClient, httpClient } from '../clients.ts';
import { startPair, until } from '../kedges.ts';
import type { Scenario } from '../run.ts';
import type { World } from '../world.ts';

const TARGET = 'http://orders.us1:8080/';
const AT_A_TIME = 100;

/** A request that its caller gives up in one of its phases. */
async function abandoned(dispatcher: undici.Dispatcher, phase: number): Promise<void> {
  const abort = new AbortController();
  const give = () => abort.abort();
  if (phase % 5 === 0) give();
  if (phase % 5 === 1) queueMicrotask(give);
  if (phase % 5 === 2) setImmediate(give);
  if (phase % 5 === 3) setTimeout(give, phase % 11);
  const body = phase % 2 === 0 ? { method: 'PUT' as const, body: 'x' } : {};
  try {
    const { body: answer } = await undici.request(TARGET, { dispatcher, signal: abort.signal, ...body });
    if (phase % 5 === 4) give();
    await answer.dump();
  } catch {
    // That is what it wanted.
  }
}

const aborts: Scenario = {
  name: '100 k aborts in all phases',
  run: async (world) => {
    const { urls } = await startPair(world);
    const dialers = (['h1', 'h2'] as const).map((protocol) => world.dialer(urls, { http: { protocol } }));
    const [hasty] = world.clients(urls, { wires: ['grpc'], deadlineMs: 3 });
    const all = [...dialers, world.dialers.at(-1)!];
    await Promise.all(dialers.map((dialer) => abandoned(dialer.dispatcher as undici.Dispatcher, 5)));
    await world.call(hasty!);
    const total = world.times(100_000, 4000);
    let next = 0;
    for (let done = 0; done < total; done += AT_A_TIME) {
      await Promise.all(
        Array.from({ length: AT_A_TIME }, async () => {
          next += 1;
          // A tenth over gRPC, by deadlines that are too short.
          if (next % 10 === 0) await world.call(hasty!);
          else await abandoned(dialers[next % 2]!.dispatcher as undici.Dispatcher, next >> 1);
        }),
      );
    }
    const isQuiet = () =>
      all.every(({ stats }) => stats().inFlight === 0 && stats().kedges.every((k) => k.inFlight === 0));
    world.check(await until(isQuiet, 10_000), `calls are still counted as under way`);
    for (const [i, dialer] of all.entries()) {
      const limit = [64, 4, 8][i]! * urls.length;
      const open = dialer.stats().kedges.reduce((sum, { connections }) => sum + connections, 0);
      world.check(open <= limit, `${open} connections of dialer ${i} are open, the limit is ${limit}`);
      for (const event of dialer.dispatcher.eventNames()) {
        const listeners = dialer.dispatcher.listenerCount(event);
        world.check(listeners <= 1, `${listeners} listeners for ${String(event)}`);
      }
      await dialer.destroy();
    }
    const left = () =>
      all.flatMap(({ stats }) => stats().kedges).reduce((sum, { connections }) => sum + connections, 0);
    world.check(await until(() => left() === 0, 5000), `${left()} sockets are left`);
    // Those that the calls after the faults would need are there.
    const [fresh] = world.clients(urls, { wires: ['h2'] });
    noneFailed(world, [await world.call(fresh!)]);
    world.uncounted += next - Math.floor(next / 10);
    world.note(`${total} aborts`);
  },
};

/** Bytes that each request may leave in the heap, where anything that is kept for it would be hundreds. */
const SLOPE_BYTES = 25;
/** What a short run may leave: code is compiled, pools fill. */
const NOISE_BYTES = 1024 * 1024;
const SAMPLES = 40;
const TOTAL = 1_000_000;

const soak: Scenario = {
  name: '1 M requests',
  run: async (world) => {
    // The logs and their search would be most of the work.
    world.secrets.unwatch();
    world.after(() => world.secrets.watch());
    setFlagsFromString('--expose-gc');
    const gc = runInNewContext('gc') as () => void;
    const { urls } = await startPair(world);
    const dialers = (['h1', 'h2'] as const).map((protocol) => world.dialer(urls, { http: { protocol } }));
    const duration = Math.max(100_000 * world.scale, 6000);
    const samples: { requests: number; heap: number }[] = [];
    let requests = 0;
    let bad = 0;
    const began = performance.now();
    const worker = async (dispatcher: undici.Dispatcher, until: number) => {
      while (performance.now() < until && requests < TOTAL) {
        const { body, statusCode } = await undici.request(TARGET, { dispatcher });
        const text = await body.text();
        if (statusCode !== 200 || !text.includes('orders.us1')) bad += 1;
        requests += 1;
      }
    };
    for (let i = 1; i <= SAMPLES && requests < TOTAL; i += 1) {
      const until = began + (duration * i) / SAMPLES;
      await Promise.all(
        Array.from({ length: 20 }, (_, w) => worker(dialers[w % 2]!.dispatcher as undici.Dispatcher, until)),
      );
      gc();
      samples.push({ requests, heap: process.memoryUsage().heapUsed });
    }
    world.uncounted += requests;
    const rate = (requests / (performance.now() - began)) * 1000;
    const perRequest = slope(samples.slice(SAMPLES / 5));
    world.check(bad === 0, `${bad} requests failed`);
    const isGrowing = perRequest > SLOPE_BYTES && perRequest * requests > NOISE_BYTES;
    world.check(!isGrowing, `the heap grows by ${perRequest.toFixed(1)} bytes for each request`);
    world.note(`${requests} requests, ${rate.toFixed(0)}/s, heap ${perRequest.toFixed(1)} bytes a request`);
  },
};

/** By least squares. */
function slope(samples: readonly { requests: number; heap: number }[]): number {
  const mean = (of: (sample: { requests: number; heap: number }) => number) =>
    samples.reduce((sum, sample) => sum + of(sample), 0) / samples.length;
  const [x, y] = [mean(({ requests }) => requests), mean(({ heap }) => heap)];
  const above = mean(({ requests, heap }) => (requests - x) * (heap - y));
  return above / mean(({ requests }) => (requests - x) ** 2);
}

const targets: Scenario = {
  name: '10 k targets over an LRU of 1 k',
  run: async (world) => {
    const { urls, relays } = await startPair(world);
    const options = { maxTargets: 1000 };
    const clients = (['h1', 'h2'] as const).map((protocol) => {
      const dialer = world.dialer(urls, { ...options, http: { protocol } });
      return { client: httpClient(protocol, dialer.dispatcher), dialer, limit: protocol === 'h1' ? 64 : 4 };
    });
    const grpc = world.dialer(urls, options);
    const all = [...clients, { client: grpcClient(grpc), dialer: grpc, limit: 8 }];
    const rounds = world.times(10_000, 1500);
    for (const { client, dialer, limit } of all) {
      // A client of grpc-js costs more than a name.
      const count = client.wire === 'grpc' ? rounds / 10 : rounds;
      for (let at = 0; at < count; at += AT_A_TIME) {
        await Promise.all(
          Array.from({ length: AT_A_TIME }, () => {
            const host = `t${Math.floor(world.random() * 10_000)}.us1:8080`;
            return world.call(client, undefined, host);
          }),
        );
      }
      const open = Math.max(...dialer.stats().kedges.map(({ connections }) => connections));
      world.check(open <= limit, `${open} connections over ${client.wire}, the limit is ${limit}`);
      world.note(`${client.wire}: ${dialer.stats().handshakes} handshakes`);
    }
    noneFailed(world, world.calls);
    const dials = relays.reduce((sum, { accepted }) => sum + accepted, 0);
    world.check(dials <= urls.length * (64 + 4 + 8), `${dials} connections were made`);
    await evicted(world, urls);
  },
};

/** More kedges than may stay connected: the one that makes room finishes its calls. */
async function evicted(world: World, urls: readonly string[]): Promise<void> {
  const [a, b] = await Promise.all(urls.map(async (url) => (await world.relay(Number(new URL(url).port))).url));
  const proxyAuth = staticToken(world.token);
  for (const wire of ['h1', 'h2', 'grpc'] as const) {
    const route = (kedge: string) => ({ kedge, serverName: KEDGE_NAME, proxyAuth });
    const mapper = hosts({ 'a.us1': route(a!), 'b.us1': route(b!) });
    const dialer = world.dialer(urls, { maxKedges: 1, mapper, http: { protocol: wire === 'grpc' ? 'auto' : wire } });
    const client = wire === 'grpc' ? grpcClient(dialer) : httpClient(wire, dialer.dispatcher);
    const calls = await Promise.all(
      Array.from({ length: 100 }, (_, i) => world.call(client, undefined, i % 2 === 0 ? 'a.us1:8080' : 'b.us1:8080')),
    );
    noneFailed(world, calls);
  }
}

const closing: Scenario = {
  name: '`close()` under load',
  run: async (world) => {
    const { urls } = await startPair(world);
    const clients = world.clients(urls);
    const load = world.load(clients, { rate: 100 });
    await world.pass(3, 1);
    const at = performance.now();
    await Promise.all(world.dialers.map((dialer) => dialer.close()));
    world.recovered(performance.now() - at);
    const closed = performance.now();
    await world.pass(1, 0.5);
    await load.stop();
    const [before, after] = [
      load.calls.filter(({ startedAt }) => startedAt < at),
      load.calls.filter(({ startedAt }) => startedAt > at),
    ];
    noneFailed(world, before);
    world.check(
      before.every(({ endedAt }) => endedAt <= closed),
      'close() did not wait for all calls',
    );
    world.check(failures(after).length === after.length, 'a closed dialer took calls');
    typed(world, after, ['ERR_KEDGE_CLOSED']);
    const ca = world.identity.current();
    const program = new URL('../closing.ts', import.meta.url);
    const files = { cert: String(ca.cert), key: String(ca.key), ca: String(ca.ca), token: world.token, urls };
    const child = await spawnNode<object>(world.asTest, program, [], {
      env: { CHAOS: JSON.stringify(files), DEBUG: '' },
    });
    const late = setTimeout(() => void child.kill(), 10_000);
    const { code } = await child.exited;
    clearTimeout(late);
    world.secrets.scan('the output of a closing process', child.output);
    world.check(code === 0, `a process that closed its dialer ended with ${code}: ${child.output}`);
    world.note(`${before.length} calls finished, then ${tally(after)}; a process exits: ${child.output.trim()}`);
  },
};

export const bounds: readonly Scenario[] = [aborts, soak, targets, closing];
