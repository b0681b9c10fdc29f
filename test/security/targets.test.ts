import assert from 'node:assert/strict';
import { describe, it, type TestContext } from 'node:test';
import { Dispatcher, MockAgent } from 'undici';
import { type Mapper, route } from '../../src/index.ts';
import { countEffects, type Effects } from '../helpers/effects.ts';
import { type EntryPoint, entryPoints, type Outcome } from '../helpers/entry-points.ts';
import { startGrpcKedge } from '../helpers/grpc-kedge.ts';
import { startKedge } from '../helpers/kedge.ts';
import { TOKENS } from './tokens.ts';

type Expected = 'REJ' | 'PASS' | `MAP ${string}`;

interface Row {
  readonly input: string;
  /** For those who take a string literally: origins, gRPC addresses, winch's authorities. */
  readonly text: Expected;
  /** For those behind a URL parser. Default: the same. */
  readonly url?: Expected;
  /** Through undici's own functions, which take user names out of a URL before we see it. */
  readonly undici?: Expected;
  /** On the gRPC wire, where no port is a default one. Default: as `text`. */
  readonly grpc?: Expected;
}

const B = 'b.k.internal';
const label63 = 'a'.repeat(63);
const name253 = `${`${label63}.`.repeat(3)}${'a'.repeat(253 - 192 - '.k.internal'.length)}.k.internal`;
assert.equal(name253.length, 253);

const ROWS: Row[] = [
  { input: 'B.K.Internal', text: `MAP ${B}` },
  { input: `${B}.`, text: `MAP ${B}` },
  ...['b..k.internal', '.k.internal', `${B}..`].map((input): Row => ({ input, text: 'REJ' })),
  ...['k.internal', 'evilk.internal', `${B}.evil.com`].map((input): Row => ({ input, text: 'PASS' })),
  ...['-a.k.internal', 'a-.k.internal'].map((input): Row => ({ input, text: 'REJ' })),
  { input: 'a_b.k.internal', text: 'MAP a_b.k.internal' },
  { input: `${label63}.k.internal`, text: `MAP ${label63}.k.internal` },
  { input: name253, text: `MAP ${name253}` },
  { input: `a${name253}`, text: 'REJ' },
  { input: `a${label63}.k.internal`, text: 'REJ' },
  { input: 'bücher.k.internal', text: 'MAP xn--bcher-kva.k.internal' },
  { input: 'xn--bcher-kva.k.internal', text: 'MAP xn--bcher-kva.k.internal' },
  { input: 'xn--a.k.internal', text: 'REJ' },
  // Cyrillic letters that look like ASCII.
  { input: 'b.k.іnternal', text: 'PASS' },
  { input: 'b。k．internal', text: `MAP ${B}` },
  { input: 'ｂ.k.internal', text: `MAP ${B}` },
  { input: 'b%2ek.internal', text: 'REJ', url: `MAP ${B}` },
  ...['b\0.k.internal', 'b%00.k.internal', `b .k.internal`].map((input): Row => ({ input, text: 'REJ' })),
  // URL parsers take spaces and line ends off, and out.
  { input: ` ${B}`, text: 'REJ' },
  { input: `${B} `, text: 'REJ' },
  { input: 'b\r\n.k.internal', text: 'REJ', url: `MAP ${B}` },
  { input: `b.k\n.internal`, text: 'REJ', url: `MAP ${B}` },
  ...['*', '{a}', ',', ';', '"', '`', '$', "'", '!', '(', '&', '=', '~'].map(
    (char): Row => ({ input: `b${char}.k.internal`, text: 'REJ' }),
  ),
  { input: '${cluster}.k.internal', text: 'REJ' },
  ...['__proto__', 'constructor', 'toString', 'hasOwnProperty'].map((input): Row => ({ input, text: 'PASS' })),
  ...['127.0.0.1', '127.1', '2130706433', '0x7f.1', '0177.0.0.1', '[::1]', '[::ffff:127.0.0.1]', '0.0.0.0', '0'].map(
    (input): Row => ({ input, text: 'PASS' }),
  ),
  ...['256.1.1.1', '[fe80::1%25eth0]', '[::', '[::1].k.internal', '1.2.3.4.5', '0x100000000'].map(
    (input): Row => ({ input, text: 'REJ' }),
  ),
  { input: `user:pw@${B}`, text: 'REJ', undici: `MAP ${B}` },
  { input: `${B}@evil.com`, text: 'REJ', undici: 'PASS' },
  ...['#', '/', '?'].map((char): Row => ({ input: `evil.com${char}.k.internal`, text: 'REJ', url: 'PASS' })),
  { input: `evil.com\\.k.internal`, text: 'REJ', url: 'PASS' },
  ...['0', '65536', '-1', '80a', '080', '1e1', ' 80', '+80'].map(
    (port): Row => ({ input: `${B}:${port}`, text: 'REJ' }),
  ),
  { input: `${B}:080`, text: 'REJ', url: `MAP ${B}` },
  { input: `${B}:65535`, text: `MAP ${B}:65535` },
  { input: `${B}:`, text: `MAP ${B}` },
  { input: `${B}:80`, text: `MAP ${B}`, grpc: `MAP ${B}:80` },
  { input: `${B}:443`, text: `MAP ${B}:443` },
  { input: 'a:1:2', text: 'REJ' },
  { input: '', text: 'REJ' },
  { input: '.', text: 'REJ' },
].filter(({ input }, i, all) => all.findLastIndex((row) => row.input === input) === i) as Row[];

interface World {
  readonly effects: Effects;
  readonly entries: EntryPoint[];
  /** Credentials that reached anybody but the kedge. */
  readonly leaked: string[];
  secretsSeen(): number;
}

async function startWorld(t: TestContext): Promise<World> {
  const [kedge, rpc] = await Promise.all([startKedge(t), startGrpcKedge(t)]);
  const effects = countEffects(t);
  const leaked: string[] = [];
  const fallback = new (class extends Dispatcher {
    override dispatch(options: Dispatcher.DispatchOptions, handler: Dispatcher.DispatchHandler): boolean {
      const text = JSON.stringify(options.headers ?? {});
      for (const token of TOKENS) if (text.includes(token)) leaked.push(`${options.origin} ${text}`);
      return agent.dispatch({ ...options, origin: 'http://unmapped.test', path: '/' }, handler);
    }
  })();
  const agent = new MockAgent();
  agent.disableNetConnect();
  agent.get('http://unmapped.test').intercept({ path: '/' }).reply(299, 'unmapped').persist();
  const auth = {
    proxyAuth: effects.source('proxy', TOKENS[0]),
    backendAuth: effects.source('backend', TOKENS[1]),
  };
  const [httpRoute, grpcRoute] = [route(kedge.route(auth)), route(rpc.route(auth))];
  const mapper: Mapper = ({ wire, hostname }) => {
    if (!hostname.endsWith('.k.internal')) return undefined;
    return wire === 'http' ? httpRoute : grpcRoute;
  };
  const dialer = kedge.dialer({ mapper, fallback });
  // Connected beforehand, so that a mapped call needs no look-up and no socket of its own.
  await dialer.warm(`http://${B}`);
  const entries = entryPoints(t, dialer);
  for (const entry of entries) assert.deepEqual(await entry.call(B), { is: 'map', authority: B }, entry.name);
  effects.take();
  const secretsSeen = () => {
    const http = kedge.seen.filter(({ headers }) => headers['authorization'] === `Bearer ${TOKENS[1]}`).length;
    return http + rpc.calls.filter(({ metadata }) => metadata.get('authorization')[0] === `Bearer ${TOKENS[1]}`).length;
  };
  return { effects, entries, leaked, secretsSeen };
}

const outcomeOf = (expected: Expected): Outcome['is'] =>
  expected === 'REJ' ? 'refuse' : expected === 'PASS' ? 'pass' : 'map';

describe('where a target goes, by every entry point', () => {
  it('is the same, and what is refused looks nothing up, opens no socket and takes no token', async (t) => {
    const { effects, entries, leaked, secretsSeen } = await startWorld(t);
    let checked = 0;
    for (const row of ROWS) {
      for (const { name, isUrl, wire, call } of entries) {
        const isUndici = /^undici|origin URL/.test(name);
        const expected =
          (isUndici ? row.undici : undefined) ?? (isUrl ? row.url : wire === 'grpc' ? row.grpc : undefined) ?? row.text;
        const what = `${name}: ${JSON.stringify(row.input.slice(0, 80))}`;
        const before = secretsSeen();
        const outcome = await call(row.input);
        const used = effects.take();
        checked += 1;
        if (isUrl && !URL.canParse(`http://${row.input}/`)) {
          // The URL parser answers first, with its own error.
          assert.equal(outcome.is, 'refuse', what);
          assert.deepEqual(used, { lookups: 0, sockets: 0, tokens: 0 }, what);
          continue;
        }
        // Fetch refuses credentials and bad ports by itself.
        const isParsers = isUrl && expected === 'REJ' && outcome.is === 'refuse';
        if (!isParsers) assert.equal(outcome.is, outcomeOf(expected), what);
        if (outcome.is === 'map' && !isParsers) assert.equal(`MAP ${outcome.authority}`, expected, what);
        if (outcome.is === 'refuse' && !isUrl) assert.equal(outcome.code, 'ERR_KEDGE_TARGET', what);
        if (outcome.is === 'map') {
          if (!name.startsWith('explain')) assert.equal(secretsSeen(), before + 1, what);
        } else {
          assert.deepEqual(used, { lookups: 0, sockets: 0, tokens: 0 }, what);
          assert.equal(secretsSeen(), before, what);
        }
      }
    }
    assert.deepEqual(leaked, []);
    t.diagnostic(`${ROWS.length} inputs by ${entries.length} entry points: ${checked} checked`);
  });

  it('refuses other schemes without a trace', async (t) => {
    const { effects, entries } = await startWorld(t);
    const kedge = await startKedge(t);
    const dialer = kedge.dialer();
    effects.take();
    for (const scheme of ['ftp:', 'file:', 'javascript:', 'unix:', 'data:', 'ws:', 'wss:', 'blob:']) {
      for (const origin of [`${scheme}//${B}`, `${scheme}${B}`]) {
        await assert.rejects(dialer.dispatcher.request({ origin, path: '/', method: 'GET' }) as never, origin);
        await assert.rejects(dialer.fetch(`${origin}/`), origin);
        assert.throws(() => dialer.explain(origin), { code: 'ERR_KEDGE_TARGET' });
      }
    }
    assert.deepEqual(effects.take(), { lookups: 0, sockets: 0, tokens: 0 });
    assert.ok(entries.length >= 10);
  });
});
