/** TLS handshakes that stall or are refused. */
import { setTimeout as sleep } from 'node:timers/promises';
import { createAuthority } from '../../../examples/pki.ts';
import { pem } from '../../../src/index.ts';
import { authority } from '../../helpers/kedge.ts';
import { codeOf, failures, noneFailed, tally, typed, within } from '../asserts.ts';
import type { Client } from '../clients.ts';
import { startPair, until } from '../kedges.ts';
import type { Relay } from '../relay.ts';
import type { Scenario } from '../run.ts';
import { startStrict } from '../strict.ts';
import type { World } from '../world.ts';

const HANDSHAKE_MS = 1500;
/** A thousand calls in one turn are work for two cores. */
const WORK_MS = 4000;
const CODE = 'ERR_KEDGE_CLIENT_CERTIFICATE';

function burst(world: World, client: Client, count: number) {
  const method = client.wire === 'grpc' ? 'UNARY' : 'POST';
  return Promise.all(Array.from({ length: count }, () => world.call(client, method)));
}

const stall: Scenario = {
  name: 'TLS stall (accept, silence)',
  run: async (world) => {
    const { urls, relays } = await startPair(world);
    const options = { dialer: { connect: { handshakeTimeoutMs: HANDSHAKE_MS } } } as const;
    for (const wire of ['h1', 'h2', 'grpc'] as const) {
      relays[0]!.stalls = true;
      const [client] = world.clients(urls, { ...options, wires: [wire] });
      const dialer = world.dialers.at(-1)!;
      const over = await burst(world, client!, 1000);
      noneFailed(world, over);
      within(world, over, HANDSHAKE_MS + WORK_MS, `1000 calls over ${wire} move on together`);

      relays[1]!.stalls = true;
      relays[1]!.reset();
      const [none] = world.clients(urls, { ...options, wires: [wire] });
      const empty = world.dialers.at(-1)!;
      const failed = await burst(world, none!, 1000);
      world.check(
        failures(failed).length === 1000,
        `${failed.length - failures(failed).length} calls over ${wire} found a way`,
      );
      typed(world, failed, ['ERR_KEDGE_TLS_TIMEOUT']);
      within(world, failed, 2 * HANDSHAKE_MS + WORK_MS, `1000 calls over ${wire} fail together`);

      await Promise.all(relays.map((relay) => relay.heal()));
      const healed = performance.now();
      while (!(await world.call(none!)).ok && performance.now() - healed < 2000) await sleep(50);
      world.recovered(performance.now() - healed);
      // The wait of a gRPC channel before it dials again is a second (its connection backoff).
      world.check(performance.now() - healed < 1500, `${wire} does not recover when the kedges do`);
      // No slot is lost: as many again go through, and then nothing is left.
      noneFailed(world, await burst(world, none!, 200));
      const idle = await until(() => dialer.stats().inFlight + empty.stats().inFlight === 0, 1000);
      world.check(idle, `calls over ${wire} are still counted as under way`);
    }
  },
};

const refused: Scenario = {
  name: 'client certificate refused',
  run: async (world) => {
    const { urls, relays } = await startPair(world);
    const [ca, stranger] = await Promise.all([authority(), createAuthority('stranger')]);
    const { cert, key } = await stranger.issue({ cn: 'intruder' });
    world.secrets.add(key);
    world.identity = pem({ cert, key, ca: ca.cert });
    const storm = async (kedges: readonly string[], through: readonly Relay[]) => {
      const clients = world.clients(kedges);
      const load = world.load(clients, { rate: 20 });
      await world.pass(6, 1.5);
      await load.stop();
      const many = (await Promise.all(clients.map((client) => burst(world, client, 100)))).flat();
      const all = [...load.calls, ...many];
      world.check(failures(all).length === all.length, 'a kedge took a certificate of a CA that it does not know');
      const dials = through.reduce((sum, { accepted }) => sum + accepted, 0);
      // No call dials a kedge twice.
      world.check(dials <= all.length * kedges.length, `${dials} dials for ${all.length} calls`);
      world.note(`${dials} dials for ${all.length} calls: ${tally(many)}`);
      return all;
    };
    // The reference kedge closes without saying why, and nobody can know more.
    typed(world, await storm(urls, relays), [CODE, 'ERR_KEDGE_CONNECTION', 'ERR_KEDGE_CONNECT', 'ERR_KEDGE_TLS']);
    const port = await startStrict(world);
    if (port === undefined) return world.note('without alerts: there is no openssl');
    const relay = await world.relay(port);
    const told = await storm([relay.url], [relay]);
    typed(world, told, [CODE]);
    const mute = told.filter((call) => {
      const { cause } = (call.error ?? {}) as { cause?: unknown };
      return codeOf(call) === CODE && !/kedge 127\.0\.0\.1:\d+.*CN=intruder/.test(`${call.error} ${cause}`);
    });
    world.check(mute.length === 0, `${mute.length} errors do not name kedge and certificate: ${mute[0]?.error}`);
  },
};

export const handshakes: readonly Scenario[] = [stall, refused];
