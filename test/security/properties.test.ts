import assert from 'node:assert/strict';
import http from 'node:http';
import type { AddressInfo } from 'node:net';
import { describe, it } from 'node:test';
import fc from 'fast-check';
import { Dispatcher, Pool } from 'undici';
import { createDialer, type Dialer, isKedgeError, type Mapper, pem, route, staticToken } from '../../src/index.ts';
import { startKedge } from '../helpers/kedge.ts';
import { TOKENS } from './tokens.ts';

/** A million in `KEDGE_TEST_TARGETS=1000000 node --test test/security/properties.test.ts`. */
const TARGETS = Number(process.env['KEDGE_TEST_TARGETS'] ?? 100_000);
const BATCH = 200;

const hostile = fc.oneof(
  {
    weight: 4,
    arbitrary: fc.constantFrom(
      'b',
      'k',
      'internal',
      'evil',
      'com',
      'a_b',
      'xn--bcher-kva',
      'bücher',
      '127',
      '0x7f',
      '1',
    ),
  },
  {
    weight: 5,
    arbitrary: fc.constantFrom('.', '.', '.', '。', '．', '..', '-', ':', ':80', ':8080', ':443', ':0', ':65536'),
  },
  {
    weight: 1,
    arbitrary: fc.constantFrom(
      '@',
      '#',
      '?',
      '/',
      '\\',
      '%',
      '%2e',
      '%00',
      '\0',
      '\n',
      '\t',
      ' ',
      '[',
      ']',
      '::1',
      '*',
      '${x}',
      'user:pw@',
      '\u202e',
      '\u00ad',
      'ｂ',
      'і',
      '💥',
    ),
  },
  { weight: 1, arbitrary: fc.string({ maxLength: 4, unit: 'binary' }) },
);
/** Pieces of names, and of what parsers disagree about, often close to a name that is mapped. */
const target = fc.oneof(
  { weight: 3, arbitrary: fc.array(hostile, { minLength: 1, maxLength: 7 }).map((pieces) => pieces.join('')) },
  {
    weight: 2,
    arbitrary: fc
      .tuple(fc.array(hostile, { maxLength: 3 }), fc.constantFrom('b.k.internal', '.k.internal'))
      .map(([pieces, end]) => pieces.join('') + end),
  },
  {
    weight: 1,
    arbitrary: fc
      .tuple(fc.constantFrom('b.k.internal', 'a.k.internal'), fc.array(hostile, { maxLength: 3 }))
      .map(([start, pieces]) => start + pieces.join('')),
  },
  { weight: 1, arbitrary: fc.domain() },
  {
    weight: 1,
    arbitrary: fc.oneof(
      fc.ipV4(),
      fc.ipV4Extended(),
      fc.ipV6().map((ip) => `[${ip}]`),
    ),
  },
);

const isMapped = (hostname: string) => hostname.endsWith('.k.internal');

/** `kedge orders.k.internal`, `direct orders.test` or the code of the error. */
function goes(dialer: Dialer, input: string | URL, wire: 'http' | 'grpc'): string {
  try {
    const { outcome, target: authority } = dialer.explain(input, { wire });
    // The wires differ in which port goes without saying, and in nothing else.
    return `${outcome} ${authority.replace(/:(?:80|443)$/, '')}`;
  } catch (error) {
    assert.ok(isKedgeError(error), String(error));
    return error.code;
  }
}

describe('any target at all', () => {
  it('goes to one place, whichever entry point it comes by', () => {
    const mapper: Mapper = ({ hostname }) => (isMapped(hostname) ? mapped : undefined);
    const mapped = route('https://kedge.test');
    const dialer = createDialer({ mapper });
    fc.assert(
      fc.property(target, (input) => {
        const [text, grpc] = [goes(dialer, `http://${input}`, 'http'), goes(dialer, input, 'grpc')];
        // `dns:` is gRPC's own, and an origin may end in a slash.
        if (!/^dns:|\/$/i.test(input)) assert.equal(grpc, text, JSON.stringify(input));
        const url = URL.parse(`http://${input}/`);
        if (url === null) {
          assert.equal(text, 'ERR_KEDGE_TARGET', `no URL parser takes ${JSON.stringify(input)}`);
          return;
        }
        // What one parser reads, and what is written when it is printed, are the same place.
        const parsed = goes(dialer, new URL(url.origin), 'http');
        if (!parsed.startsWith('ERR')) assert.equal(goes(dialer, url.origin, 'http'), parsed);
        // A text is taken literally or not at all: never as another place than the URL.
        if (!text.startsWith('ERR')) assert.equal(text, parsed, JSON.stringify(input));
      }),
      { numRuns: Math.max(20_000, TARGETS / 5) },
    );
  });

  it(`takes no credential anywhere but to a mapped kedge, ${TARGETS} times`, { timeout: 600_000 }, async (t) => {
    const kedge = await startKedge(t, { handler: (_request, response) => response.end('ok') });
    let canaries = 0;
    const leaks: string[] = [];
    const canary = http.createServer((request, response) => {
      canaries += 1;
      const text = request.rawHeaders.join('\n');
      for (const token of TOKENS) if (text.includes(token)) leaks.push(`${request.headers.host}: ${text}`);
      response.end('ok');
    });
    await new Promise<void>((resolve) => canary.listen(0, '127.0.0.1', resolve));
    const origin = `http://127.0.0.1:${(canary.address() as AddressInfo).port}`;
    const pool = new Pool(origin, { connections: 16 });
    t.after(() => pool.close());
    t.after(() => canary.close());
    const fallback = new (class extends Dispatcher {
      override dispatch(options: Dispatcher.DispatchOptions, handler: Dispatcher.DispatchHandler): boolean {
        return pool.dispatch({ ...options, origin }, handler);
      }
    })();
    const auth = { proxyAuth: staticToken(TOKENS[0]), backendAuth: staticToken(TOKENS[1]) };
    const mapped = route(kedge.route(auth));
    const { cert, key } = kedge.client;
    const dialer = createDialer({
      mapper: ({ hostname }) => (isMapped(hostname) ? mapped : undefined),
      identity: pem({ cert, key, ca: kedge.ca.cert }),
      fallback,
    });
    t.after(() => dialer.destroy());
    const counts = { kedge: 0, direct: 0, refused: 0 };
    const send = async (where: string | URL) => {
      const before = kedge.seen.length;
      try {
        const { body } = await (dialer.dispatcher.request({
          origin: where,
          path: '/',
          method: 'GET',
        }) as never as Promise<{ body: { dump(): Promise<void> } }>);
        await body.dump();
        counts[kedge.seen.length > before ? 'kedge' : 'direct'] += 1;
      } catch (error) {
        assert.ok(isKedgeError(error), `${JSON.stringify(where)} ${error}`);
        counts.refused += 1;
      }
    };
    for (const [i, batch] of batches(TARGETS)) {
      await Promise.all(
        batch.map((input) => {
          const url = i % 2 === 0 ? null : URL.parse(`http://${input}/`);
          return send(url === null ? `http://${input}` : new URL(url.origin));
        }),
      );
      for (const { authority, headers } of kedge.seen.splice(0)) {
        assert.ok(isMapped(authority.replace(/:\d+$/, '')), authority);
        assert.equal(headers['proxy-authorization'], `Bearer ${TOKENS[0]}`);
      }
    }
    assert.deepEqual(leaks, []);
    const { refused } = counts;
    assert.ok(canaries > TARGETS / 50 && refused > TARGETS / 50, JSON.stringify({ canaries, refused }));
    t.diagnostic(
      `${TARGETS} targets: ${refused} refused, ${canaries} seen by the canary, ${TARGETS - refused - canaries} by the kedge`,
    );
  });
});

function* batches(count: number): Generator<[number, string[]]> {
  const seed = Date.now();
  for (let i = 0; i * BATCH < count; i += 1) yield [i, fc.sample(target, { numRuns: BATCH, seed: seed + i })];
}
