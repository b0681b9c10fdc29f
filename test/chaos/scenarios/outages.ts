/** Kedges that die, drain, or cannot be dialled. */
import dns from 'node:dns';
import { startBlackHole } from '../../helpers/black-hole.ts';
import { failures, noneFailed, recovery, tally, typed, within } from '../asserts.ts';
import { AMPLE_BUDGET, startPair } from '../kedges.ts';
import { isIdempotent, took } from '../load.ts';
import type { Scenario } from '../run.ts';

const UNREACHABLE = ['ERR_KEDGE_CONNECT', 'ERR_KEDGE_TLS', 'ERR_KEDGE_CONNECTION'] as const;
/** Two cores are shared by callers, kedges and backend. */
const SLACK_MS = 500;

const kill: Scenario = {
  name: 'kill -9 one kedge, alternating',
  // grpc-js retries by the service config as often as that allows.
  executions: 3,
  run: async (world) => {
    const pair = await startPair(world);
    const load = world.load(world.clients(pair.direct, { dialer: AMPLE_BUDGET }));
    for (let i = 0; i < world.times(8, 2); i += 1) {
      await world.pass(1.5, 0.7);
      await pair.processes[i % 2]!.kill();
      await world.pass(1, 0.5);
      await pair.restart(i % 2);
    }
    await load.stop();
    noneFailed(world, load.calls, 'idempotent');
    typed(world, load.calls, ['ERR_KEDGE_CONNECTION']);
    const http = load.calls.filter((call) => call.wire !== 'grpc' && (world.ledger.executions.get(call.id) ?? 0) > 2);
    world.check(http.length === 0, `${http.length} HTTP requests were executed more than twice`);
    if (failures(load.calls).length > 0) world.note(`lost under way: ${tally(failures(load.calls))}`);
  },
};

const drain: Scenario = {
  name: 'SIGTERM drain, rolling',
  run: async (world) => {
    const pair = await startPair(world);
    const load = world.load(world.clients(pair.direct));
    for (let i = 0; i < world.times(6, 2); i += 1) {
      await world.pass(1.5, 0.6);
      await pair.processes[i % 2]!.stop();
      await pair.restart(i % 2);
    }
    await world.pass(1);
    await load.stop();
    noneFailed(world, load.calls);
  },
};

const down: Scenario = {
  name: 'all kedges down (refused)',
  run: async (world) => {
    const { urls, relays } = await startPair(world);
    const load = world.load(world.clients(urls));
    for (let round = 0; round < world.times(4); round += 1) {
      await world.pass(1);
      for (const relay of relays) relay.refuse();
      await world.pass(4, 1.5);
      await relays[round % 2]!.heal();
      const back = performance.now();
      await world.pass(3, 2);
      await relays[1 - (round % 2)]!.heal();
      recovery(world, load.calls, back, 1000);
    }
    await load.stop();
    const failed = failures(load.calls);
    world.check(failed.length > 0, 'nothing failed while all kedges were down');
    within(world, failed, 1000, 'a failure is told');
    typed(world, failed, UNREACHABLE);
    world.note(tally(failed));
  },
};

const refused: Scenario = {
  name: 'connection refused',
  run: async (world) => {
    const pair = await startPair(world);
    pair.relays[0]!.refuse();
    const extra: number[] = [];
    for (let i = 0; i < world.times(20, 5); i += 1) {
      for (const wire of ['h1', 'h2', 'grpc'] as const) {
        // A handshake is part of both, so that the difference is what the refusal costs.
        const [good] = world.clients([pair.urls[1]!], { wires: [wire] });
        const [first] = world.clients(pair.urls, { wires: [wire] });
        const alone = await world.call(good!);
        const over = await world.call(first!, wire === 'grpc' ? 'UNARY' : 'POST');
        extra.push(took(over) - took(alone));
      }
    }
    noneFailed(world, world.calls);
    extra.sort((a, b) => a - b);
    const [median, worst] = [extra[extra.length >> 1]!, extra.at(-1)!];
    world.recovered(worst);
    world.check(median < 50, `failing over took ${median.toFixed(1)} ms at the median`);
    world.note(`failing over cost ${median.toFixed(1)} ms at the median, ${worst.toFixed(1)} at most`);
  },
};

const TIMEOUT_MS = 1000;

const blackHole: Scenario = {
  name: 'SYN black hole',
  run: async (world) => {
    if (process.platform !== 'linux') return world.note('skipped: only Linux has it');
    const pair = await startPair(world);
    const hole = await startBlackHole(world.asTest);
    const clients = world.clients([hole.url, pair.urls[1]!], { dialer: { connect: { timeoutMs: TIMEOUT_MS } } });
    const load = world.load(clients);
    await world.pass(15, 5);
    await load.stop();
    noneFailed(world, load.calls);
    within(world, load.calls, TIMEOUT_MS + 2 * SLACK_MS, 'the connect deadline holds');
    // It is tried again now and then, by one call each.
    const began = load.calls[0]!.startedAt + TIMEOUT_MS + SLACK_MS;
    const later = load.calls.filter(({ startedAt }) => startedAt > began);
    const slow = later.filter((call) => took(call) > TIMEOUT_MS - 100);
    world.check(
      slow.length <= later.length * 0.02 + 3,
      `${slow.length} of ${later.length} later calls met the black hole`,
    );
    world.note(`${slow.length} of ${later.length} later calls tried it again`);
  },
};

const FREEZE = { headersTimeout: 2000, dialer: { grpc: { keepaliveTimeMs: 1000, keepaliveTimeoutMs: 1000 } } } as const;

const frozen: Scenario = {
  name: 'established connection frozen',
  executions: 3,
  run: async (world) => {
    const { urls, relays } = await startPair(world);
    // HTTP/2 has no headers timeout here, so its PINGs have to do it. Seconds of calls are lost at once, which is more than
    // the default budget would send again.
    const h2 = world.clients(urls, { wires: ['h2'], dialer: AMPLE_BUDGET });
    const load = world.load([...world.clients(urls, { ...FREEZE, wires: ['h1', 'grpc'] }), ...h2], { rate: 15 });
    for (let i = 0; i < world.times(4); i += 1) {
      await world.pass(1.5, 1);
      const at = performance.now();
      relays[0]!.freeze();
      await world.pass(7, 6.5);
      recovery(world, load.calls.filter(isIdempotent), at, 5000 + SLACK_MS);
    }
    await load.stop();
    const of = (wire: string) => load.calls.filter((call) => call.wire === wire);
    noneFailed(world, [...of('h2'), ...of('grpc')], 'idempotent');
    typed(world, [...of('h2'), ...of('grpc')], ['ERR_KEDGE_CONNECTION']);
    typed(world, of('h1'), ['ERR_KEDGE_TIMEOUT']);
    within(world, of('h2'), 5000 + SLACK_MS, 'h2 PINGs');
    within(world, of('grpc'), 2000 + 4 * SLACK_MS, 'gRPC keepalive');
    // undici's timers turn once a second.
    within(world, of('h1'), 2000 + 1500 + SLACK_MS, 'h1 headers timeout');
    world.note(`failed: ${tally(failures(load.calls)) || 'none'}`);
  },
};

const poor: Scenario = {
  name: 'latency, dribbled bytes, half closed and cut connections',
  executions: 3,
  run: async (world) => {
    const { urls, relays } = await startPair(world);
    const load = world.load(world.clients(urls), { rate: 20 });
    const seen = () => load.calls.length;
    await world.pass(1, 0.5);
    for (const relay of relays) relay.latencyMs = 25;
    await world.pass(4, 1);
    for (const relay of relays) relay.slice = { bytes: 200, everyMs: 1 };
    await world.pass(4, 1);
    for (const relay of relays) await relay.heal();
    const clean = seen();
    noneFailed(
      world,
      load.calls.slice(0, clean - 1).filter(({ settled }) => settled > 0),
    );
    for (let i = 0; i < world.times(5, 2); i += 1) {
      relays[i % 2]!.halfClose();
      await world.pass(1, 0.4);
      relays[i % 2]!.cutAfter = 20_000;
      await world.pass(1, 0.4);
      await relays[i % 2]!.heal();
    }
    await load.stop();
    noneFailed(world, load.calls, 'idempotent');
    typed(world, load.calls, ['ERR_KEDGE_CONNECTION', 'ERR_KEDGE_TLS']);
    if (failures(load.calls).length > 0) world.note(`lost under way: ${tally(failures(load.calls))}`);
  },
};

const twoAddresses: Scenario = {
  name: 'a kedge with two addresses, 100 ms away',
  run: async (world) => {
    if (process.platform !== 'linux') return world.note('skipped: only Linux has them all on its loopback');
    const { processes } = await startPair(world);
    const upstream = processes[0]!.ready.port;
    const one = await world.relay(upstream, { host: '127.0.0.2' });
    const other = await world.relay(upstream, { host: '127.0.0.3', port: one.port });
    for (const relay of [one, other]) relay.latencyMs = 50;
    const { lookup } = dns.promises;
    world.after(() => Object.assign(dns.promises, { lookup }));
    const addresses = [one, other].map(({ host }) => ({ address: host, family: 4 }));
    Object.assign(dns.promises, { lookup: async () => addresses });
    const clients = world.clients([`https://two.kedge.test:${one.port}`], { wires: ['h1', 'h2', 'grpc', 'connect'] });
    const load = world.load(clients, { rate: 10 });
    await world.pass(60, 5);
    await load.stop();
    noneFailed(world, load.calls);
    const dials = world.dialers.map((dialer) => dialer.stats()).map(({ handshakes }) => handshakes);
    world.check(Math.max(...dials.slice(1)) === 1, `${dials.slice(1)} handshakes over h2, gRPC and connect-es`);
    world.note(`handshakes: ${dials.join(', ')} (h1, h2, grpc, connect)`);
  },
};

export const outages: readonly Scenario[] = [kill, drain, down, refused, blackHole, twoAddresses, frozen, poor];
