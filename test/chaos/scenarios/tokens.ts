/** Token sources that are slow or fail, and kedges that refuse what they gave. */
import { setTimeout as sleep } from 'node:timers/promises';
import { cachedToken } from '../../../src/index.ts';
import type { KedgeHandler } from '../../helpers/kedge.ts';
import { codeOf, failures, noneFailed, tally, typed, within } from '../asserts.ts';
import { answer } from '../backend.ts';
import { httpClient } from '../clients.ts';
import { startFaulty, startPair } from '../kedges.ts';
import { isIdempotent } from '../load.ts';
import type { Scenario } from '../run.ts';
import type { World } from '../world.ts';

const SLOW_MS = 5000;

const slow: Scenario = {
  name: 'token source slow (5 s)',
  run: async (world) => {
    const { urls } = await startPair(world);
    const delay = Math.max(SLOW_MS * world.scale, 1000);
    let fetches = 0;
    const proxyAuth = cachedToken(async () => {
      fetches += 1;
      await sleep(delay);
      return { token: world.token };
    });
    const clients = world.clients(urls, { route: { proxyAuth } });
    const impatient = world.dialer(urls, {}, { proxyAuth });
    const began = performance.now();
    const aborted = Promise.all(
      Array.from({ length: 10 }, async () => {
        const signal = AbortSignal.timeout(200);
        const failed = await impatient.fetch('http://orders.us1:8080/', { signal }).then(
          () => false,
          () => true,
        );
        return failed && performance.now() - began < Math.min(delay, 1000);
      }),
    );
    const calls = await Promise.all(Array.from({ length: 1000 }, (_, i) => world.call(clients[i % clients.length]!)));
    world.check(!(await aborted).includes(false), 'a call that waits for a token cannot be aborted at once');
    noneFailed(world, calls);
    within(world, calls, delay + 4000, 'calls go on when the token is there');
    world.check(fetches === 1, `${fetches} fetches for 1000 calls at a time`);
    world.note(`${fetches} fetch of ${delay / 1000} s`);
  },
};

/** A kedge that wants the token that counts now, and says 407 to all others. */
function guarded(
  world: World,
  isGood: (token: string) => boolean,
  counts: { refused: number; naked: number },
): KedgeHandler {
  return (request, response) => {
    const given = String(request.headers['proxy-authorization'] ?? '');
    if (given === '') counts.naked += 1;
    if (isGood(given.replace(/^Bearer /, ''))) return void answer(world.ledger, request, response);
    counts.refused += 1;
    request.resume();
    if (request.headers['content-type'] === 'application/grpc') {
      response.setHeader('content-type', 'application/grpc');
      response.setHeader('grpc-status', '16');
    } else response.statusCode = 407;
    response.end();
  };
}

const failing: Scenario = {
  name: 'token source failing',
  run: async (world) => {
    const counts = { refused: 0, naked: 0 };
    const handler = guarded(world, (token) => token === world.token, counts);
    const kedges = await Promise.all([startFaulty(world, handler), startFaulty(world, handler)]);
    const life = Math.max(6000 * world.scale, 3000);
    let isDown = false;
    const expiresAt = new Date(Date.now() + life);
    const proxyAuth = cachedToken(async () => {
      // Causes of other people may quote what they read.
      if (isDown) throw new Error(`cannot renew ${world.token}`);
      isDown = true;
      return { token: world.token, expiresAt };
    });
    const load = world.load(
      world.clients(
        kedges.map(({ url }) => url),
        { route: { proxyAuth } },
      ),
      { rate: 40 },
    );
    const expired = performance.now() + (expiresAt.getTime() - Date.now());
    await sleep(life + 1500);
    await load.stop();
    const before = load.calls.filter(({ endedAt }) => endedAt < expired - 50);
    const after = load.calls.filter(({ startedAt }) => startedAt > expired + 50);
    noneFailed(world, before);
    world.check(after.length > 0 && failures(after).length === after.length, 'a token was used past its date');
    typed(world, load.calls, ['ERR_KEDGE_TOKEN_UNAVAILABLE']);
    world.check(counts.naked === 0, `${counts.naked} requests came without a token`);
    world.note(`${before.length} calls on the cached token, then ${tally(after)}`);
  },
};

const revoked: Scenario = {
  name: '401/407 from the kedge with a cached token',
  run: async (world) => {
    let valid = 0;
    const counts = { refused: 0, naked: 0 };
    const handler = guarded(world, (token) => token === `${world.token}-${valid}`, counts);
    const kedges = await Promise.all([startFaulty(world, handler), startFaulty(world, handler)]);
    const urls = kedges.map(({ url }) => url);
    let fetches = 0;
    const source = () =>
      cachedToken(async () => {
        fetches += 1;
        return { token: `${world.token}-${valid}` };
      });
    const load = world.load(world.clients(urls, { wires: ['h1', 'h2'], route: { proxyAuth: source() } }));
    // gRPC calls are not sent again: the refusal is the status of one, and the next brings a fresh token.
    const grpc = world.load(world.clients(urls, { wires: ['grpc'], route: { proxyAuth: source() } }), {
      methods: ['UNARY'],
      rate: 20,
    });
    const revocations = world.times(10, 3);
    for (let i = 0; i < revocations; i += 1) {
      await sleep(700);
      valid += 1;
    }
    await sleep(700);
    await Promise.all([load.stop(), grpc.stop()]);
    noneFailed(world, load.calls);
    const lost = failures(grpc.calls);
    world.check(lost.length <= revocations * 3, `${lost.length} gRPC calls failed in ${revocations} revocations`);
    // Answers that were under way when a token went bad may name a later one.
    world.check(fetches <= 2 + revocations * 4, `${fetches} fetches for ${revocations} revocations`);

    const never = { refused: 0, naked: 0 };
    const closed = await Promise.all(
      [0, 1].map(() =>
        startFaulty(
          world,
          guarded(world, () => false, never),
        ),
      ),
    );
    const dialer = world.dialer(
      closed.map(({ url }) => url),
      {},
      { proxyAuth: source() },
    );
    const client = httpClient('h2', dialer.dispatcher);
    for (const method of ['GET', 'POST', 'PUT'] as const) await world.call(client, method);
    const failed = world.calls.slice(-3);
    typed(world, failed, ['ERR_KEDGE_UNAUTHORIZED']);
    world.check(failures(failed).length === 3, 'a refused call went well');
    world.check(never.refused <= 6, `${never.refused} requests for 3 calls that were refused`);
    world.note(
      `${revocations} revocations, ${fetches} fetches, ${counts.refused} refusals, gRPC told of ${lost.length}`,
    );
  },
};

const storm: Scenario = {
  name: 'retry storm (50% 503)',
  run: async (world) => {
    let requests = 0;
    const handler: KedgeHandler = (request, response) => {
      requests += 1;
      if (world.random() < 0.5) return void answer(world.ledger, request, response);
      request.resume();
      response.statusCode = 503;
      response.end();
    };
    const kedges = await Promise.all([startFaulty(world, handler), startFaulty(world, handler)]);
    const options = { wires: ['h1', 'h2'], dialer: { failover: { statuses: [503] } } } as const;
    const load = world.load(
      world.clients(
        kedges.map(({ url }) => url),
        options,
      ),
      { rate: 250 },
    );
    await world.pass(12, 4);
    await load.stop();
    const extra = requests / load.calls.length - 1;
    // Each dialer has ten retries from the start.
    world.check(requests <= load.calls.length * 1.2 + 2 * 10, `${(extra * 100).toFixed(1)}% more requests than calls`);
    world.check(
      failures(load.calls).every((call) => codeOf(call) === 'status 503'),
      tally(failures(load.calls)),
    );
    const repeated = failures(load.calls).filter(isIdempotent).length;
    world.note(`${(extra * 100).toFixed(1)}% extra load; ${repeated} idempotent calls were told 503`);
  },
};

export const tokens: readonly Scenario[] = [slow, failing, revoked, storm];
