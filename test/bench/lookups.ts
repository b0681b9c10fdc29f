import { do_not_optimize, measure } from 'mitata';
import { coreOf } from '../../src/engine/core.ts';
import {
  cachedToken,
  createDialer,
  firstMatch,
  hostPorts,
  hosts,
  type Mapper,
  parseTarget,
  regexp,
  single,
  staticToken,
  suffix,
} from '../../src/index.ts';
import type { Bench } from './bench.ts';

const KEDGE = 'https://us1.kedge.example.com';
const HOST = 'orders.shop.us1.prod.clusters.local';
const LIST_SIZES = [1, 100, 10_000];

/** Mappers by how many rules they have; the target is found last. */
const MAPPERS: Readonly<Record<string, (rules: number) => Mapper>> = {
  single: () => single(KEDGE),
  suffix: () => suffix({ match: '*.*.clusters.local', suffix: '.kedge.example.com' }),
  hosts: (rules) => hosts(table(rules, '')),
  hostPorts: (rules) => hostPorts(table(rules, ':8080')),
  'firstMatch of suffix': (rules) =>
    firstMatch(
      ...Array.from({ length: rules - 1 }, (_, i) => suffix({ match: `*.c${i}.local`, suffix: '.k.example.com' })),
      suffix({ match: '*.*.clusters.local', suffix: '.kedge.example.com' }),
    ),
  'firstMatch of regexp': (rules) =>
    firstMatch(
      ...Array.from({ length: rules - 1 }, (_, i) => regexp({ exp: `.*[.]c${i}[.]local`, url: KEDGE })),
      regexp({ exp: '.*[.](?P<c>[a-z0-9]+)[.]prod[.]clusters[.]local', url: 'https://${c}.kedge.example.com' }),
    ),
};

function table(rules: number, port: string): Record<string, string> {
  const names = Array.from({ length: rules - 1 }, (_, i) => `svc${i}.shop.us1.prod.clusters.local`);
  return Object.fromEntries([...names, HOST].map((name) => [`${name}${port}`, KEDGE]));
}

async function nanos(call: () => unknown): Promise<number> {
  const { p50 } = await measure(() => do_not_optimize(call()), { min_cpu_time: 100e6, min_samples: 50 } as never);
  return p50;
}

/** What it costs to know where a call goes and with which token. */
export async function lookups({ fact }: Bench): Promise<void> {
  const target = parseTarget(`http://${HOST}:8080`);
  for (const [name, build] of Object.entries(MAPPERS)) {
    const sizes = build.length === 0 ? [1] : LIST_SIZES;
    await fact(`look-up, ${name}`, `${sizes.join(' / ')} rules`, async () => {
      const uncached: string[] = [];
      const cached: string[] = [];
      for (const size of sizes) {
        const mapper = build(size);
        uncached.push((await nanos(() => mapper(target))).toFixed(0));
        const core = coreOf(createDialer({ mapper }));
        const origins = [`http://${HOST}:8080`, `http://a.${HOST}:8080`];
        let i = 0;
        // Two targets in turn, so that it is the cache that answers and not the memory of the last call.
        const look = () => {
          i = 1 - i;
          return core.resolve('http', origins[i]!);
        };
        look();
        cached.push((await nanos(look)).toFixed(0));
      }
      return `mapper ${uncached.join(' / ')} ns, cached ${cached.join(' / ')} ns`;
    });
  }
  await fact('token, cached', 'static token', async () => {
    const far = new Date(Date.now() + 3600_000);
    const source = cachedToken(async () => ({ token: 'x'.repeat(800), expiresAt: far }));
    await source.token();
    const plain = staticToken('x'.repeat(800));
    return `${(await nanos(() => source.peek())).toFixed(0)} against ${(await nanos(() => plain.peek())).toFixed(0)} ns`;
  });
}
