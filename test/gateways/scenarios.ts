/** What a user does through a gateway, and what the dialer promises of it. */
import { setTimeout as sleep } from 'node:timers/promises';
import * as undici from 'undici';
import { grpcDialer } from '../../src/grpc/index.ts';
import type { Dialer } from '../../src/index.ts';
import { echoClient, unary } from '../helpers/grpc-kedge.ts';
import { type Gateway, GRPC_HOST, HTTP_HOST } from './gateways.ts';

export interface World {
  gateway: Gateway;
  /** Of a dialer of its own for each scenario. */
  dialer(protocol: 'h1' | 'h2'): Dialer;
  /** How often each call was executed. */
  ledger(): Promise<Record<string, number>>;
}

export interface Row {
  wire: string;
  what: string;
  result: string;
  kept: boolean;
}

const MIB = 1024 * 1024;
const ORIGIN = `http://${HTTP_HOST}`;
const CALLS_AFTER = 1000;
const GIVE_UP = 50;
const EchoClient = echoClient();
let ids = 0;

const reason = (error: unknown): string => {
  const { cause, code, name, message } = error as Error & { cause?: { code?: string }; code?: unknown };
  if (name === 'TimeoutError') return name;
  return String(cause?.code ?? code ?? message);
};

async function call(dialer: Dialer, method: string, path: string, id = `call-${++ids}`): Promise<void> {
  const { statusCode, body } = await undici.request(`${ORIGIN}${path}`, {
    dispatcher: dialer.dispatcher as undici.Dispatcher,
    method: method as 'GET',
    body: method === 'POST' ? 'a body' : undefined,
    headers: { 'x-id': id },
    signal: AbortSignal.timeout(10_000),
  });
  await body.text();
  if (statusCode !== 200) throw new Error(`status ${statusCode}`);
}

/** Makes so many calls, and counts by reason which are lost; gives up after {@link GIVE_UP}. */
async function lost(count: number, width: number, one: (i: number) => Promise<void>): Promise<Map<string, number>> {
  const reasons = new Map<string, number>();
  let next = 0;
  let failed = 0;
  const worker = async () => {
    while (next < count && failed < GIVE_UP) {
      const i = next;
      next += 1;
      await one(i).catch((error) => {
        failed += 1;
        reasons.set(reason(error), (reasons.get(reason(error)) ?? 0) + 1);
      });
    }
  };
  await Promise.all(Array.from({ length: width }, worker));
  return reasons;
}

const sum = (reasons: Map<string, number>) => [...reasons.values()].reduce((a, b) => a + b, 0);
const told = (reasons: Map<string, number>, of: number) => {
  const texts = [...reasons].map(([text, count]) => `${count} x ${text}`).join('; ');
  const lost = sum(reasons);
  return `${lost}${lost >= GIVE_UP ? ' (gave up)' : ''} of ${of} lost ${texts}`.trim();
};

/** A large body that is answered before it is read has that answer; it, and one that is aborted, harm nobody after it. */
export async function* largeBodies(world: World): AsyncGenerator<Row> {
  for (const protocol of ['h1', 'h2'] as const) {
    for (const [mib, api] of [
      [12, 'request'],
      [12, 'fetch'],
      [64, 'request'],
      [64, 'fetch'],
    ] as const) {
      for (const end of ['early', 'aborted'] as const) {
        const dialer = world.dialer(protocol);
        await call(dialer, 'GET', '/');
        const signal = end === 'aborted' ? AbortSignal.timeout(30) : AbortSignal.timeout(20_000);
        const body = Buffer.alloc(mib * MIB, 'x');
        const url = `${ORIGIN}${end === 'early' ? '/early' : '/?ms=2000'}`;
        const upload = async () => {
          if (api === 'fetch') {
            const response = await dialer.fetch(url, { method: 'POST', body, signal });
            await response.text();
            return String(response.status);
          }
          const dispatcher = dialer.dispatcher as undici.Dispatcher;
          const answer = await undici.request(url, { dispatcher, method: 'POST', body, signal });
          await answer.body.text();
          return String(answer.statusCode);
        };
        const answer = await upload().catch(reason);
        const reasons = await lost(CALLS_AFTER, 20, () => call(dialer, 'GET', '/'));
        yield {
          wire: protocol,
          what: `${mib} MiB ${api}, ${end}`,
          result: `${answer}; then ${told(reasons, CALLS_AFTER)}`,
          kept: sum(reasons) === 0 && (end === 'aborted' || answer === '413'),
        };
        await dialer.destroy();
      }
    }
  }
}

/** Streams of 10 s outlive reloads. */
export async function* streams(world: World): AsyncGenerator<Row> {
  const TICKS = 50;
  const dialers = [world.dialer('h1'), world.dialer('h2'), world.dialer('h2')] as const;
  const sse = async (dialer: Dialer) => {
    const { body } = await undici.request(`${ORIGIN}/events?count=${TICKS}`, {
      dispatcher: dialer.dispatcher as undici.Dispatcher,
    });
    return (await body.text()).split('\n\n').length - 1;
  };
  const rpc = async () => {
    const client = new (grpcDialer(dialers[2]).wrap(EchoClient))(`${GRPC_HOST}:80`);
    let count = 0;
    try {
      for await (const _message of client.serverStream({ text: String(TICKS) })) count += 1;
    } finally {
      client.close();
    }
    return count;
  };
  const all = [sse(dialers[0]), sse(dialers[1]), rpc()].map((stream) => stream.then(String, reason));
  for (let i = 0; i < 3; i += 1) {
    await sleep(1500);
    await world.gateway.reload();
  }
  for (const [i, wire] of ['h1', 'h2', 'grpc'].entries()) {
    const result = await all[i]!;
    yield { wire, what: '10 s stream over 3 reloads', result: `${result} of ${TICKS}`, kept: result === String(TICKS) };
  }
  for (const dialer of dialers) await dialer.destroy();
}

/** A call whose backend resets is executed twice at most. */
export async function* resets(world: World): AsyncGenerator<Row> {
  for (const protocol of ['h1', 'h2'] as const) {
    const dialer = world.dialer(protocol);
    const names = Array.from({ length: 10 }, () => `reset-${++ids}`);
    await call(dialer, 'GET', '/');
    const ends = await Promise.all(names.map((id) => call(dialer, 'POST', '/reset', id).catch(reason)));
    const ledger = await world.ledger();
    const counts = names.map((id) => ledger[id] ?? 0);
    const most = Math.max(...counts);
    yield {
      wire: protocol,
      what: '10 POSTs that crash their backend',
      result: `executed ${Math.min(...counts)} to ${most} times: ${ends[0]}`,
      kept: most >= 1 && most <= 2,
    };
    await dialer.destroy();
  }
}

/** A connection that may carry few requests loses none. */
export async function* shortConnections(world: World): AsyncGenerator<Row> {
  for (const protocol of ['h1', 'h2'] as const) {
    const dialer = world.dialer(protocol);
    for (const method of ['GET', 'POST']) {
      const first = ids;
      const reasons = await lost(600, 10, () => call(dialer, method, '/'));
      const ledger = await world.ledger();
      const twice = Array.from({ length: ids - first }, (_, i) => ledger[`call-${first + i + 1}`] ?? 0).filter(
        (n) => n > 1,
      );
      yield {
        wire: protocol,
        what: `${method}, 20 requests a connection`,
        result: `${told(reasons, 600)}, ${twice.length} twice`,
        kept: sum(reasons) === 0 && (method === 'GET' || twice.length === 0),
      };
    }
    await dialer.destroy();
  }
}

/** A reload under load loses nothing over HTTP/2 and gRPC, and nothing idempotent over HTTP/1.1. */
export async function* reloads(world: World): AsyncGenerator<Row> {
  const h1 = world.dialer('h1');
  const h2 = world.dialer('h2');
  const client = new (grpcDialer(h2).wrap(EchoClient))(`${GRPC_HOST}:80`);
  const ms = () => `/?ms=${ids % 7 === 0 ? 150 : 0}`;
  const kinds: [string, string, () => Promise<unknown>, boolean][] = [
    ['h1', 'GET', () => call(h1, 'GET', ms()), true],
    ['h1', 'POST', () => call(h1, 'POST', ms()), false],
    ['h2', 'GET', () => call(h2, 'GET', ms()), true],
    ['h2', 'POST', () => call(h2, 'POST', ms()), true],
    ['grpc', 'unary', () => unary(client, `call-${++ids}`, undefined, { deadline: Date.now() + 10_000 }), true],
  ];
  const reasons = kinds.map(() => new Map<string, number>());
  const running: Promise<unknown>[] = [];
  const SECONDS = 7;
  const PER_SECOND = 60;
  for (let i = 0; i < SECONDS * PER_SECOND; i += 1) {
    for (const [k, [, , run]] of kinds.entries()) {
      const counts = reasons[k]!;
      running.push(run().catch((error) => counts.set(reason(error), (counts.get(reason(error)) ?? 0) + 1)));
    }
    if (i % (PER_SECOND * 1.5) === PER_SECOND) running.push(world.gateway.reload());
    await sleep(1000 / PER_SECOND);
  }
  await Promise.all(running);
  for (const [k, [wire, what, , promised]] of kinds.entries()) {
    const result = told(reasons[k]!, SECONDS * PER_SECOND);
    yield {
      wire,
      what: `${what}, reloads`,
      result: promised ? result : `${result} (not promised)`,
      kept: !promised || sum(reasons[k]!) === 0,
    };
  }
  client.close();
  await h1.destroy();
  await h2.destroy();
}
