import assert from 'node:assert/strict';
import { once } from 'node:events';
import net from 'node:net';
import { describe, it, type TestContext } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import tls from 'node:tls';
import { ACK, block, END_HEADERS, END_STREAM, FRAME, frame, RawH2, request, uint32 } from '../helpers/raw-h2.ts';
import { type RawWorld, rawWorld } from '../helpers/raw-world.ts';

const AT_ONCE = 8;

/** All rows in one world, a few at a time; each says what was not as it should be. */
async function all<Row extends { name: string }>(
  t: TestContext,
  rows: readonly Row[],
  run: (world: RawWorld, row: Row) => Promise<string | undefined>,
): Promise<void> {
  const world = await rawWorld(t);
  const wrong: string[] = [];
  let next = 0;
  const worker = async () => {
    while (next < rows.length) {
      const row = rows[next]!;
      next += 1;
      const what = await run(world, row).catch((error) => String(error));
      if (what !== undefined) wrong.push(`${row.name}: ${what}`);
    }
  };
  await Promise.all(Array.from({ length: AT_ONCE }, worker));
  assert.deepEqual(wrong, []);
  await world.finish();
}

const head = (line: string, ...headers: string[]) => `${[line, 'host: app.us1', ...headers].join('\r\n')}\r\n\r\n`;
const POST = 'POST /never HTTP/1.1';
const GET = 'GET /never HTTP/1.1';
const SMUGGLED = head('GET /admin/delete HTTP/1.1');
const REFUSED = /^(?:HTTP\/1\.1 (?:400|401|403|405|417|431|501|505) [\s\S]*|)$/;

describe('HTTP/1.1 heads that could be read in two ways', () => {
  const rows: [name: string, bytes: string][] = [
    ['length and chunked', `${head(POST, 'content-length: 4', 'transfer-encoding: chunked')}0\r\n\r\n${SMUGGLED}`],
    ['chunked and length', `${head(POST, 'transfer-encoding: chunked', 'content-length: 4')}0\r\n\r\n${SMUGGLED}`],
    ['two lengths', `${head(POST, 'content-length: 1', 'content-length: 2')}AA${SMUGGLED}`],
    ['two equal lengths', `${head(POST, 'content-length: 1', 'content-length: 1')}A${SMUGGLED}`],
    ['a list of lengths', `${head(POST, 'content-length: 1, 2')}AA`],
    ['a length with a sign', `${head(POST, 'content-length: +1')}A`],
    ['a negative length', head(POST, 'content-length: -1')],
    ['a hexadecimal length', `${head(POST, 'content-length: 0x1')}A`],
    ['a length with a space in it', `${head(POST, 'content-length: 1 1')}A`],
    ['an empty length', head(POST, 'content-length:')],
    ['a length beyond counting', head(POST, 'content-length: 99999999999999999999999')],
    ['a space before the colon', `${head(POST, 'content-length : 1')}A`],
    ['chunked twice over', `${head(POST, 'transfer-encoding: chunked', 'transfer-encoding: identity')}0\r\n\r\n`],
    ['chunked but not last', `${head(POST, 'transfer-encoding: chunked, gzip')}0\r\n\r\n${SMUGGLED}`],
    ['nearly chunked', `${head(POST, 'transfer-encoding: xchunked')}0\r\n\r\n${SMUGGLED}`],
    ['chunked in quotes', `${head(POST, 'transfer-encoding: "chunked"')}0\r\n\r\n${SMUGGLED}`],
    ['chunked after a vertical tab', `${head(POST, 'transfer-encoding: \x0bchunked')}0\r\n\r\n${SMUGGLED}`],
    ['chunked in HTTP/1.0', `POST /never HTTP/1.0\r\nhost: app.us1\r\ntransfer-encoding: xx\r\n\r\n0\r\n\r\n`],
    ['a folded header', head(GET, 'x: 1', ' transfer-encoding: chunked')],
    ['a folded header with a tab', head(GET, 'x: 1', '\tcontent-length: 4')],
    ['bare line feeds', `GET /never HTTP/1.1\nhost: app.us1\n\n`],
    ['a bare line feed in a header', `GET /never HTTP/1.1\r\nhost: app.us1\nx: y\r\n\r\n`],
    ['a bare carriage return', `GET /never HTTP/1.1\r\nhost: app.us1\rx: y\r\n\r\n`],
    ['a carriage return in a value', head(GET, 'x: a\rb')],
    ['a NUL in a value', head(GET, 'x: a\0b')],
    ['a NUL in a name', head(GET, 'x\0y: b')],
    ['a space in a name', head(GET, 'x y: b')],
    ['an empty name', head(GET, ': b')],
    ['no colon', head(GET, 'what')],
    ['a header before the request line', `x: y\r\n${head(GET)}`],
    ['no version', 'GET /never\r\nhost: app.us1\r\n\r\n'],
    ['a version that is none', head('GET /never HTTP/1.9')],
    ['version 2', head('GET /never HTTP/2.0')],
    ['a version in lower case', head('GET /never http/1.1')],
    ['a tab in the request line', head('GET\t/never HTTP/1.1')],
    ['a space in the target', head('GET /ne ver HTTP/1.1')],
    ['a method that is none', head('G@T /never HTTP/1.1')],
    ['a method that nobody knows', head('SMUGGLE /never HTTP/1.1')],
    ['CONNECT', head('CONNECT app.us1:80 HTTP/1.1')],
    ['the asterisk', head('OPTIONS * HTTP/1.1')],
    ['the asterisk for GET', head('GET * HTTP/1.1')],
    ['a target without slash', head('GET never HTTP/1.1')],
    ['an absolute target for another host', head('GET http://evil.us1/never HTTP/1.1')],
    ['an absolute target with user', head('GET http://u@app.us1/never HTTP/1.1')],
    ['an absolute target of another scheme', head('GET ftp://app.us1/never HTTP/1.1')],
    ['a target with a host only', head('GET //app.us1/never HTTP/1.1')],
    ['two hosts', head(GET, 'host: app.us1')],
    ['two hosts that differ', head(GET, 'host: evil.us1')],
    ['no host', 'GET /never HTTP/1.1\r\n\r\n'],
    ['an empty host', 'GET /never HTTP/1.1\r\nhost:\r\n\r\n'],
    ['a host with a comma', 'GET /never HTTP/1.1\r\nhost: app.us1,evil\r\n\r\n'],
    ['a host with a user', 'GET /never HTTP/1.1\r\nhost: u@app.us1\r\n\r\n'],
    ['a host with a path', 'GET /never HTTP/1.1\r\nhost: app.us1/x\r\n\r\n'],
    ['a host with a space', 'GET /never HTTP/1.1\r\nhost: app.us1 x\r\n\r\n'],
    ['a host with a bad port', 'GET /never HTTP/1.1\r\nhost: app.us1:99999\r\n\r\n'],
    ['two proxy authorizations', head(GET, 'proxy-authorization: Bearer a', 'proxy-authorization: Bearer b')],
    ['an expectation that is none', head(GET, 'expect: tea')],
    ['a head of 70 KiB', head(GET, ...Array.from({ length: 70 }, (_, i) => `x-${i}: ${'v'.repeat(1024)}`))],
    ['a target of 70 KiB', head(`GET /never${'x'.repeat(70_000)} HTTP/1.1`)],
    [
      'an upgrade with a length',
      `${head(GET, 'connection: upgrade', 'upgrade: websocket', 'content-length: 210')}${head('POST /b HTTP/1.1', 'content-length: 60')}${SMUGGLED}`,
    ],
    [
      'an upgrade with chunks',
      `${head(GET, 'connection: upgrade', 'upgrade: websocket', 'transfer-encoding: chunked')}5\r\nAAAAA\r\n0\r\n\r\n`,
    ],
    ['another upgrade with a length', `${head(POST, 'connection: upgrade', 'upgrade: h2c', 'content-length: 5')}AAAAA`],
    ['an upgrade to what is not allowed', head('GET /admin HTTP/1.1', 'connection: upgrade', 'upgrade: websocket')],
    ['TLS inside of TLS', '\x16\x03\x01\x02\x00\x01\x00'],
    ['the preface of HTTP/2', 'PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n'],
    ['nothing but noise', '\x00\xff\x00\xff\r\n\r\n'],
  ];
  it(`${rows.length} are refused, and no backend hears of them`, { timeout: 120_000 }, (t) =>
    all(
      t,
      rows.map(([name, bytes]) => ({ name, bytes })),
      async ({ h1 }, { bytes }) => {
        const answer = await h1(bytes);
        return REFUSED.test(answer) ? undefined : answer.slice(0, 200);
      },
    ),
  );
});

describe('HTTP/1.1 bodies that break off', () => {
  const whole = (line: string, ...headers: string[]) => head(line, 'connection: close', ...headers);
  const rows: { name: string; bytes: string[]; answer: RegExp }[] = [
    ['a short body', [`${head('POST /whole HTTP/1.1', 'content-length: 10')}AAA`], /^$/],
    ['a chunk of another size', [`${head('POST /whole HTTP/1.1', 'transfer-encoding: chunked')}5\r\nAAA`], /^$/],
    [
      'a chunk size that is none',
      [`${head('POST /whole HTTP/1.1', 'transfer-encoding: chunked')}`, 'zz\r\nAAA\r\n'],
      /^HTTP\/1\.1 [45]|^$/,
    ],
    [
      'a chunk size with a sign',
      [`${head('POST /whole HTTP/1.1', 'transfer-encoding: chunked')}`, '+3\r\nAAA\r\n0\r\n\r\n'],
      /^HTTP\/1\.1 [45]|^$/,
    ],
    [
      'a chunk size beyond counting',
      [`${head('POST /whole HTTP/1.1', 'transfer-encoding: chunked')}`, 'fffffffffffffffff\r\nA'],
      /^HTTP\/1\.1 [45]|^$/,
    ],
    [
      'a chunk without its end',
      [`${head('POST /whole HTTP/1.1', 'transfer-encoding: chunked')}`, '3\r\nAAAAAA\r\n0\r\n\r\n'],
      /^HTTP\/1\.1 [45]|^$/,
    ],
    [
      'a chunk that ends with a line feed',
      [`${head('POST /whole HTTP/1.1', 'transfer-encoding: chunked')}`, '3\nAAA\n0\n\n'],
      /^HTTP\/1\.1 [45]|^$/,
    ],
    [
      'an early answer to a short body',
      [`${head('POST /early HTTP/1.1', 'content-length: 999')}A`],
      /^HTTP\/1\.1 200 /,
    ],
    [
      'an early answer to a chunked body',
      [`${head('POST /early HTTP/1.1', 'transfer-encoding: chunked')}1\r\nA\r\n`],
      /^HTTP\/1\.1 200 /,
    ],
    [
      'a request in the middle of a body',
      [`${head('POST /early?quote HTTP/1.1', 'content-length: 999')}A`, SMUGGLED],
      /^HTTP\/1\.1 200 [\s\S]*early$/,
    ],
    [
      'a whole body in pieces',
      [whole('POST /whole HTTP/1.1', 'content-length: 4'), 'A', 'A', 'A', 'A'],
      /^HTTP\/1\.1 200 [\s\S]*whole/,
    ],
    [
      'whole chunks in pieces',
      [
        whole('POST /whole HTTP/1.1', 'transfer-encoding: chunked'),
        '1\r\nA\r\n',
        '2;x=y\r\nAA\r\n',
        '0\r\nx: y\r\n\r\n',
      ],
      /^HTTP\/1\.1 200 [\s\S]*whole/,
    ],
    [
      'two requests in one piece',
      [`${head('GET /1 HTTP/1.1')}${whole('GET /2 HTTP/1.1')}`],
      /^HTTP\/1\.1 200 [\s\S]*HTTP\/1\.1 200 /,
    ],
    [
      'a request after a body',
      [`${head('POST /whole HTTP/1.1', 'content-length: 1')}A${whole('GET /2 HTTP/1.1')}`],
      /^HTTP\/1\.1 200 [\s\S]*HTTP\/1\.1 200 /,
    ],
    [
      'what is not allowed after what is',
      [`${head('GET /1 HTTP/1.1')}${SMUGGLED}`],
      /^HTTP\/1\.1 200 [\s\S]*HTTP\/1\.1 403 /,
    ],
    [
      'Connection names the length',
      [`${head('POST /whole HTTP/1.1', 'content-length: 2', 'connection: content-length, close')}AA`],
      /^HTTP\/1\.1 200 [\s\S]*whole/,
    ],
    [
      'Connection names the host',
      [head('GET /1 HTTP/1.1', 'connection: host, x-forwarded-for, close')],
      /^HTTP\/1\.1 200 /,
    ],
    [
      'a body that a GET brings',
      [`${whole('GET /whole HTTP/1.1', 'content-length: 2')}AA`],
      /^HTTP\/1\.1 200 [\s\S]*whole/,
    ],
    [
      '100-continue',
      [whole('POST /whole HTTP/1.1', 'content-length: 2', 'expect: 100-continue'), 'AA'],
      /^HTTP\/1\.1 100 [\s\S]*HTTP\/1\.1 200 [\s\S]*whole/,
    ],
    [
      'a WebSocket',
      [head('GET /ws HTTP/1.1', 'connection: upgrade', 'upgrade: websocket'), 'hello'],
      /^HTTP\/1\.1 101 [\s\S]*\r\n\r\nhello$/,
    ],
    [
      'a WebSocket that is refused',
      [head('GET /no HTTP/1.1', 'connection: upgrade', 'upgrade: websocket')],
      /^HTTP\/1\.1 403 Forbidden\r\n(?:\S+: .+\r\n)*transfer-encoding: chunked\r\n(?:\S+: .+\r\n)*\r\n2\r\nno\r\n0\r\n\r\n$/i,
    ],
    ['another upgrade', [head('GET /1 HTTP/1.1', 'connection: upgrade', 'upgrade: h2c, x')], /^HTTP\/1\.1 200 /],
    [
      'another upgrade and a request behind it',
      [`${head('GET /1 HTTP/1.1', 'connection: upgrade', 'upgrade: x')}${SMUGGLED}`],
      /^HTTP\/1\.1 200 (?![\s\S]*HTTP)/,
    ],
  ].map(([name, bytes, answer]) => ({ name, bytes, answer }) as { name: string; bytes: string[]; answer: RegExp });
  it(`${rows.length} end as they should, and nobody else's request is mixed with them`, { timeout: 120_000 }, (t) =>
    all(t, rows, async ({ h1 }, { bytes, answer }) => {
      const got = await h1(bytes, { ms: 1_500 });
      return answer.test(got) ? undefined : got.slice(0, 300);
    }),
  );
});

describe('paths that two parsers read differently', () => {
  const paths = [
    '//never',
    '/./never',
    '/x/../never',
    '/x/..',
    '/.',
    '/never/./',
    '/%2e/never',
    '/x/%2e%2e/never',
    '/x/%2E./never',
    '/x/.%2e/never',
    '/x%2fnever',
    '/x%2Fnever',
    '/x/..;/never',
    '/x;a=b/never',
    '/x%3bnever',
    '/x\\never',
    '/x%5cnever',
    '/x/..\\never',
    '/never%00',
    '/never%0d%0aHost:x',
    '/never%',
    '/never%2',
    '/never%zz',
    '/never%ff',
    '/never%c0%af',
    '/x//never',
    '/never//',
    '/%2f/never',
    '/x/%2e%2e%2fnever',
    '/never#x',
  ];
  it(`${paths.length} are refused where a route has rules for paths, on both wires`, { timeout: 120_000 }, (t) =>
    all(
      t,
      paths.flatMap((path) => (['h1', 'h2'] as const).map((wire) => ({ name: `${wire} ${path}`, wire, path }))),
      async ({ h1, tls: options }, { wire, path }) => {
        if (wire === 'h1') {
          const answer = await h1(head(`GET ${path} HTTP/1.1`));
          return /^HTTP\/1\.1 400 /.test(answer) ? undefined : answer.slice(0, 100);
        }
        const outcome = await oneStream(options, request(path));
        return /^(?:400|reset 1)$/.test(outcome) ? undefined : outcome;
      },
    ),
  );

  it('are let in and matched decoded and without the query otherwise', { timeout: 60_000 }, async (t) => {
    const world = await rawWorld(t);
    const status = async (path: string, host = 'app.us1') =>
      (await world.h1(`GET ${path} HTTP/1.1\r\nhost: ${host}\r\n\r\n`)).slice(9, 12);
    for (const path of ['/admin', '/admin?x', '/%61dmin', '/%61dmin/x?y', '/admin/x%20y'])
      assert.equal(await status(path), '403', path);
    for (const path of ['/x?a=/../b//c;d', '/sp%20ace', '/x.', '/...', '/x..y', '/%E2%82%AC']) {
      assert.equal(await status(path), '200', path);
      assert.ok(world.seen.includes(`GET ${path}`), path);
    }
    // A route without rules for paths looks at none.
    for (const path of ['//x', '/a/../b', '/a%2fb', '/a;b', '/%zz']) {
      assert.equal(await status(path, 'open.us1'), '200', path);
      assert.ok(world.seen.includes(`GET ${path}`), path);
    }
    await world.finish();
  });
});

/** The outcome of one request on a connection of its own. */
async function oneStream(options: tls.ConnectionOptions, headers: Buffer, flags = END_STREAM): Promise<string> {
  const raw = await RawH2.connect(options);
  raw.write(frame(FRAME.HEADERS, END_HEADERS | flags, 1, headers));
  const outcome = await raw.outcome(1);
  raw.destroy();
  return outcome;
}

describe('HTTP/2 requests that could be read in two ways', () => {
  const plain: [string, string][] = [
    [':method', 'GET'],
    [':scheme', 'https'],
    [':authority', 'app.us1'],
    [':path', '/never'],
  ];
  const without = (name: string) => plain.filter(([each]) => each !== name);
  const rows: { name: string; headers: Buffer }[] = (
    [
      ['a header in upper case', [...plain, ['X-Up', '1']]],
      ['connection', [...plain, ['connection', 'close']]],
      ['transfer-encoding', [...plain, ['transfer-encoding', 'chunked']]],
      ['upgrade', [...plain, ['upgrade', 'websocket']]],
      ['keep-alive', [...plain, ['keep-alive', '1']]],
      ['proxy-connection', [...plain, ['proxy-connection', '1']]],
      ['te other than trailers', [...plain, ['te', 'gzip']]],
      ['two lengths', [...plain, ['content-length', '1'], ['content-length', '2']]],
      ['a negative length', [...plain, ['content-length', '-1']]],
      ['a length and no body', [...plain, ['content-length', '5']]],
      ['two paths', [...plain, [':path', '/x']]],
      ['two methods', [...plain, [':method', 'POST']]],
      ['two authorities', [...plain, [':authority', 'evil']]],
      ['two schemes', [...plain, [':scheme', 'http']]],
      ['a pseudo header that nobody knows', [...plain, [':what', '1']]],
      ['a pseudo header at the end', [...without(':path'), ['x', 'y'], [':path', '/never']]],
      [':status', [...plain, [':status', '200']]],
      [':protocol', [...plain, [':protocol', 'websocket']]],
      ['no path', without(':path')],
      ['no method', without(':method')],
      ['no scheme', without(':scheme')],
      ['no authority', without(':authority')],
      ['an empty path', [...without(':path'), [':path', '']]],
      ['a path without slash', [...without(':path'), [':path', 'never']]],
      ['a path with a space', [...without(':path'), [':path', '/never x']]],
      ['a path with a line', [...without(':path'), [':path', '/never\r\nhost: x']]],
      ['the asterisk', [...without(':path'), [':path', '*']]],
      ['an absolute path for another host', [...without(':path'), [':path', 'https://evil/never']]],
      ['a method with a space', [...without(':method'), [':method', 'GET /x']]],
      ['a method that is no token', [...without(':method'), [':method', 'G@T']]],
      [
        'CONNECT',
        [
          [':method', 'CONNECT'],
          [':authority', 'app.us1:80'],
        ],
      ],
      ['another scheme', [...without(':scheme'), [':scheme', 'file']]],
      ['an authority with a user', [...without(':authority'), [':authority', 'u@app.us1']]],
      ['an authority with a path', [...without(':authority'), [':authority', 'app.us1/x']]],
      ['another host', [...plain, ['host', 'evil']]],
      ['two hosts', [...plain, ['host', 'app.us1'], ['host', 'app.us1']]],
      [
        'two proxy authorizations',
        [...plain, ['proxy-authorization', 'Bearer a'], ['proxy-authorization', 'Bearer b']],
      ],
      ['1,100 headers', [...plain, ...Array.from({ length: 1_100 }, (_, i) => [`x-${i}`, '1'] as [string, string])]],
      ['gRPC without method', [...without(':path'), [':path', '/x'], ['content-type', 'application/grpc']], /^200$/],
    ] as [string, [string, string][], RegExp?][]
  ).map(([name, headers]) => ({ name, headers: block(headers) }));
  it(`${rows.length} are refused, and no backend hears of them`, { timeout: 120_000 }, (t) =>
    all(t, rows, async ({ tls: options }, { name, headers }) => {
      const outcome = await oneStream(options, headers);
      const wanted = name.startsWith('gRPC') ? /^200$/ : /^(?:400|405|431|reset (?:1|11)|goaway (?:1|11)|closed)$/;
      return wanted.test(outcome) ? undefined : outcome;
    }),
  );
});

const CODES = [...Array.from({ length: 14 }, (_, code) => code), 0xdead];

describe('HTTP/2 streams that are reset', () => {
  const length: [string, string][] = [['content-length', '211']];
  const grpc: [string, string][] = [
    ['content-type', 'application/grpc'],
    ['te', 'trailers'],
  ];
  const message = frame(FRAME.DATA, 0, 1, [0, 0, 0, 0, 2, 65, 65]);
  const moments: [name: string, headers: Buffer, data: Buffer | undefined, waits: boolean][] = [
    ['before the answer', request('/silent'), undefined, false],
    ['in an upload', request('/whole', length, 'POST'), frame(FRAME.DATA, 0, 1, [65]), false],
    ['in an upload without length', request('/whole', [], 'POST'), frame(FRAME.DATA, 0, 1, [65]), false],
    ['after an early answer', request('/early', length, 'POST'), frame(FRAME.DATA, 0, 1, [65]), true],
    ['after an early answer without length', request('/early', [], 'POST'), frame(FRAME.DATA, 0, 1, [65]), true],
    ['in an answer', request('/endless'), undefined, true],
    ['in a large answer', request('/large'), undefined, true],
    ['in a call before its answer', request('/t.T/Late', grpc, 'POST'), message, false],
    ['in a call', request('/t.T/Open', grpc, 'POST'), message, true],
    ['in a call that was refused', request('/t.T/Early', grpc, 'POST'), message, true],
  ];
  const rows = moments.flatMap(([moment, headers, data, waits]) =>
    CODES.map((code) => ({ name: `${moment}, code ${code}`, headers, data, waits, code })),
  );
  it(`${rows.length} harm nobody, and what follows is a request of its own`, { timeout: 180_000 }, (t) =>
    all(t, rows, async ({ tls: options }, { headers, data, waits, code }) => {
      const raw = await RawH2.connect(options);
      const isAlone = data === undefined ? END_STREAM : 0;
      raw.write(frame(FRAME.HEADERS, END_HEADERS | isAlone, 1, headers), ...(data === undefined ? [] : [data]));
      if (waits) {
        const outcome = await raw.outcome(1);
        if (outcome !== '200') return outcome;
      } else await sleep(20);
      raw.write(frame(FRAME.RST_STREAM, 0, 1, uint32(code)));
      // As long as the answer's head, so that it would fill what is missing of a body before it.
      raw.write(frame(FRAME.HEADERS, END_HEADERS | END_STREAM, 3, request('/next', [['x-pad', 'p'.repeat(100)]])));
      const next = await raw.outcome(3);
      await sleep(60);
      raw.destroy();
      return next === '200' ? undefined : next;
    }),
  );
});

describe('answers of backends that are not as they should be', () => {
  const ok = 'HTTP/1.1 200 OK\r\n';
  /** For both wires: the status, or `cut` where the answer begins and must not look whole. */
  const rows: [name: string, bytes: string | Buffer, wanted: string, close?: boolean][] = [
    ...['000', '001', '099'].map((status): [string, string, string] => [
      `status ${status}`,
      `HTTP/1.1 ${status} X\r\ncontent-length: 0\r\n\r\n`,
      '502',
    ]),
    ...['600', '700', '999'].map((status): [string, string, string] => [
      `status ${status}`,
      `HTTP/1.1 ${status} X\r\ncontent-length: 0\r\n\r\n`,
      '502',
    ]),
    ['status of two digits', 'HTTP/1.1 20 OK\r\ncontent-length: 0\r\n\r\n', '502'],
    ['status of four digits', 'HTTP/1.1 2000 OK\r\ncontent-length: 0\r\n\r\n', '502'],
    ['status 599', 'HTTP/1.1 599 X\r\ncontent-length: 0\r\n\r\n', '599'],
    [
      '101 that nobody asked for',
      'HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: x\r\n\r\n',
      '502',
    ],
    ['101 without an upgrade', 'HTTP/1.1 101 Switching Protocols\r\n\r\n', '502'],
    ['no HTTP', 'SSH-2.0-OpenSSH\r\n', '502'],
    ['TLS', Buffer.from([21, 3, 1, 0, 2, 2, 80]), '502', true],
    ['nothing', '', '502', true],
    ['half a head', `${ok}content-le`, '502', true],
    ['a head of 80 KiB', `${ok}x: ${'x'.repeat(80_000)}\r\ncontent-length: 0\r\n\r\n`, '502'],
    ['a head of 40 KiB', `${ok}x: ${'x'.repeat(40_000)}\r\ncontent-length: 0\r\n\r\n`, '200'],
    ['two lengths', `${ok}content-length: 1\r\ncontent-length: 2\r\n\r\nab`, '502'],
    ['length and chunks', `${ok}content-length: 1\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n`, '502'],
    ['a NUL in a header', `${ok}x: a\0b\r\ncontent-length: 0\r\n\r\n`, '502'],
    ['a control character in a header', `${ok}x: a\x01b\r\ncontent-length: 0\r\n\r\n`, '502'],
    ['a DEL in a header', `${ok}x: a\x7fb\r\ncontent-length: 0\r\n\r\n`, '502'],
    ['Latin in a header', `${ok}x: caf\xe9\r\ncontent-length: 0\r\n\r\n`, '200'],
    ['a name that is none', `${ok}x y: b\r\ncontent-length: 0\r\n\r\n`, '502'],
    ['__proto__', `${ok}__proto__: b\r\nconstructor: c\r\ncontent-length: 0\r\n\r\n`, '200'],
    [
      'connection headers',
      `${ok}connection: x-own, close\r\nx-own: 1\r\nkeep-alive: timeout=1\r\nproxy-connection: a\r\nupgrade: h2c\r\ncontent-length: 0\r\n\r\n`,
      '200',
    ],
    [
      'a hint',
      `HTTP/1.1 103 Early Hints\r\nlink: </style.css>; rel=preload\r\n\r\n${ok}content-length: 0\r\n\r\n`,
      '200',
    ],
    ['a hint that is none', `HTTP/1.1 103 Early Hints\r\nlink: style.css\r\n\r\n${ok}content-length: 0\r\n\r\n`, '200'],
    [
      'a hint with a bad header',
      `HTTP/1.1 103 Early Hints\r\nlink: a\x01\r\n\r\n${ok}content-length: 0\r\n\r\n`,
      '502',
    ],
    [
      'a hint with a length',
      `HTTP/1.1 103 Early Hints\r\ncontent-length: 5\r\n\r\n${ok}content-length: 0\r\n\r\n`,
      '200',
    ],
    [
      'a hundred hints',
      `${'HTTP/1.1 103 Early Hints\r\nlink: </a>; rel=preload\r\n\r\n'.repeat(100)}${ok}content-length: 0\r\n\r\n`,
      '200',
    ],
    ['102', `HTTP/1.1 102 Processing\r\n\r\n${ok}content-length: 0\r\n\r\n`, '200'],
    ['a body that breaks off', `${ok}content-length: 10\r\n\r\nabc`, 'cut', true],
    ['chunks that break off', `${ok}transfer-encoding: chunked\r\n\r\n3\r\nabc\r\n`, 'cut', true],
    ['a chunk that is none', `${ok}transfer-encoding: chunked\r\n\r\n3\r\nabc\r\nzz\r\n`, 'cut'],
    ['more than its length', `${ok}content-length: 2\r\n\r\nabHTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n`, '200'],
    ['two answers', `${ok}content-length: 2\r\n\r\nab${ok}content-length: 0\r\n\r\n`, '200'],
    ['a body that ends with the connection', `${ok}\r\nabc`, '200', true],
    ['204 with a body', 'HTTP/1.1 204 No Content\r\ncontent-length: 3\r\n\r\nabc', '204'],
    ['304 with a length', 'HTTP/1.1 304 Not Modified\r\ncontent-length: 3\r\n\r\n', '304'],
    ['205', 'HTTP/1.1 205 Reset\r\ncontent-length: 0\r\n\r\n', '205'],
    ['trailers', `${ok}transfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nx-t: v\r\n\r\n`, '200'],
    ['HTTP/1.0', 'HTTP/1.0 200 OK\r\n\r\nabc', '200', true],
    ['HTTP/2', Buffer.concat([frame(FRAME.SETTINGS, 0, 0)]), '502', true],
    ['forged errors', `${ok}x-kedge-error: forged\r\nx-kedge-error-type: no-route\r\ncontent-length: 0\r\n\r\n`, '200'],
  ];
  /**
   * In a kedge of their own: undici goes on with a connection whose trailers said that it is closed (it looks at the headers
   * alone, nodejs/undici lib/dispatcher/client-h1.js), and llhttp refuses the next answer there ("Data after `Connection: close`").
   */
  const trailers = [
    'connection: close',
    'keep-alive: 1',
    'transfer-encoding: chunked',
    'content-length: 9',
    'upgrade: x',
    'te: gzip',
    'host: x',
    'x: a\x01b',
  ].map((trailer): [string, string, string] => [
    `the trailer ${trailer}`,
    `${ok}transfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n${trailer}\r\nx-t: v\r\n\r\n`,
    'any',
  ]);
  const become = (t: TestContext, each: typeof rows) =>
    all(
      t,
      each.flatMap(([name, bytes, wanted, close = false], i) =>
        (['h1', 'h2'] as const).map((wire) => ({
          name: `${wire} ${name}`,
          wire,
          path: `/r/${wire}/${i}`,
          bytes,
          wanted,
          close,
        })),
      ),
      async ({ h1, answers, tls: options }, { wire, path, bytes, wanted, close }) => {
        answers.set(path, { bytes, close });
        let got: string;
        if (wire === 'h1') {
          const text = await h1(`GET ${path} HTTP/1.1\r\nhost: raw.us1\r\nconnection: close\r\n\r\n`);
          if (/forged|x-own|HTTP\/1\.1 101/.test(text)) return text;
          const final = /(?:^|\r\n\r\n)HTTP\/1\.1 ([2-9]\d\d) (?:[\s\S]*)$/.exec(text)?.[1] ?? 'none';
          const isWhole = /\r\n0\r\n(?:[\s\S]*\r\n)?\r\n$|content-length: 10\r\n[\s\S]*\r\n\r\n.{10}$/i.test(text);
          got = wanted === 'cut' && final === '200' && !isWhole ? 'cut' : final;
        } else {
          const raw = await RawH2.connect(options);
          const target = block([
            [':method', 'GET'],
            [':scheme', 'https'],
            [':authority', 'raw.us1'],
            [':path', path],
          ]);
          raw.write(frame(FRAME.HEADERS, END_HEADERS | END_STREAM, 1, target));
          got = await raw.outcome(1);
          if (wanted === 'cut' && got === '200') {
            const reset = await raw.first(({ type, stream }) => type === FRAME.RST_STREAM && stream === 1);
            if (reset !== undefined && reset.payload.readUInt32BE(0) !== 0) got = 'cut';
          }
          raw.destroy();
        }
        if (wanted === 'any') return /^(?:200|502|none)$/.test(got) ? undefined : got;
        return got === wanted || (wanted === 'cut' && /^reset/.test(got)) ? undefined : `${got}, not ${wanted}`;
      },
    );
  it(`${rows.length * 2} become an honest answer on both wires, or 502`, { timeout: 180_000 }, (t) => become(t, rows));
  it(`${trailers.length * 2} with odd trailers do, too`, { timeout: 180_000 }, (t) => become(t, trailers));

  it('pass on trailers from HTTP/1.1 to HTTP/1.1', { timeout: 60_000 }, async (t) => {
    const world = await rawWorld(t);
    world.answers.set('/t', {
      bytes: 'HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nx-t: v\r\nconnection: x\r\n\r\n',
      close: false,
    });
    const text = await world.h1('GET /t HTTP/1.1\r\nhost: raw.us1\r\n\r\n');
    assert.match(text, /\r\n0\r\nx-t: v\r\n\r\n$/);
    await world.finish();
  });

  it('become gRPC statuses that a caller understands', { timeout: 60_000 }, async (t) => {
    const world = await rawWorld(t);
    const grpc: [string, string][] = [
      ['content-type', 'application/grpc'],
      ['te', 'trailers'],
    ];
    const call = (path: string, more: [string, string][] = []) =>
      oneStream(world.tls, request(path, [...grpc, ...more], 'POST'), END_STREAM);
    assert.equal(await call('/t.T/Unavailable'), '503');
    for (const code of CODES) {
      const outcome = await call('/t.T/Reset', [['x-code', String(code)]]);
      assert.equal(outcome, code === 7 ? 'reset 7' : '200', `code ${code}`);
    }
    await world.finish();
  });
});

describe('clients that are slow, and floods', () => {
  const open = (world: RawWorld, settings?: [number, number][]) => RawH2.connect(world.tls, settings ?? []);
  const ping = frame(FRAME.PING, 0, 0, Buffer.alloc(8));
  const get = (stream: number, path: string) => frame(FRAME.HEADERS, END_HEADERS | END_STREAM, stream, request(path));
  const many = (count: number, make: (i: number) => Buffer) =>
    Buffer.concat(Array.from({ length: count }, (_, i) => make(i)));
  const floods: [name: string, bytes: () => Buffer][] = [
    ['SETTINGS', () => many(5_000, () => frame(FRAME.SETTINGS, 0, 0, [0, 4, 0, 0, 255, 255]))],
    ['SETTINGS acknowledged without being sent', () => many(5_000, () => frame(FRAME.SETTINGS, ACK, 0))],
    ['PING', () => many(20_000, () => ping)],
    ['PING acknowledged without being sent', () => many(1_000, () => frame(FRAME.PING, ACK, 0, Buffer.alloc(8)))],
    ['PRIORITY', () => many(20_000, (i) => frame(FRAME.PRIORITY, 0, 2 * i + 1, [0, 0, 0, 0, 1]))],
    ['frames that nobody knows', () => many(20_000, () => frame(99, 0, 0, [1, 2, 3]))],
    ['WINDOW_UPDATE', () => many(20_000, () => frame(FRAME.WINDOW_UPDATE, 0, 0, uint32(1)))],
    ['a window of no size', () => frame(FRAME.WINDOW_UPDATE, 0, 0, uint32(0))],
    ['a window that overflows', () => many(2, () => frame(FRAME.WINDOW_UPDATE, 0, 0, uint32(0x7fffffff)))],
    [
      'CONTINUATION',
      () =>
        Buffer.concat([
          frame(FRAME.HEADERS, 0, 1, request('/never')),
          many(20_000, () => frame(FRAME.CONTINUATION, 0, 1, [])),
        ]),
    ],
    [
      'CONTINUATION with headers',
      () =>
        Buffer.concat([
          frame(FRAME.HEADERS, 0, 1, request('/never')),
          many(2_000, (i) => frame(FRAME.CONTINUATION, 0, 1, block([[`x-${i}`, 'v'.repeat(200)]]))),
        ]),
    ],
    [
      'CONTINUATION of another stream',
      () =>
        Buffer.concat([frame(FRAME.HEADERS, 0, 1, request('/never')), frame(FRAME.CONTINUATION, END_HEADERS, 3, [])]),
    ],
    [
      'empty DATA',
      () =>
        Buffer.concat([
          frame(FRAME.HEADERS, END_HEADERS, 1, request('/whole', [], 'POST')),
          many(20_000, () => frame(FRAME.DATA, 0, 1)),
        ]),
    ],
    ['DATA for no stream', () => many(2_000, () => frame(FRAME.DATA, 0, 1, [65]))],
    ['DATA on stream 0', () => frame(FRAME.DATA, 0, 0, [65])],
    ['PUSH_PROMISE', () => frame(FRAME.PUSH_PROMISE, END_HEADERS, 1, [0, 0, 0, 2])],
    ['an even stream', () => get(2, '/never')],
    ['streams backwards', () => Buffer.concat([get(5, '/1'), get(3, '/never')])],
    ['a frame of 16 MiB', () => Buffer.concat([Buffer.from([255, 255, 255, 0, 0, 0, 0, 0, 1]), Buffer.alloc(100_000)])],
    ['RST_STREAM for no stream', () => many(2_000, (i) => frame(FRAME.RST_STREAM, 0, 2 * i + 1, uint32(8)))],
    [
      'rapid reset',
      () =>
        many(5_000, (i) =>
          Buffer.concat([get(2 * i + 1, '/silent'), frame(FRAME.RST_STREAM, 0, 2 * i + 1, uint32(8))]),
        ),
    ],
    [
      'rapid reset of calls',
      () =>
        many(2_000, (i) =>
          Buffer.concat([
            frame(
              FRAME.HEADERS,
              END_HEADERS,
              2 * i + 1,
              request('/t.T/Late', [['content-type', 'application/grpc']], 'POST'),
            ),
            frame(FRAME.RST_STREAM, 0, 2 * i + 1, uint32(0)),
          ]),
        ),
    ],
    ['more streams than are allowed', () => many(1_000, (i) => get(2 * i + 1, '/silent'))],
    [
      'header blocks that expand',
      () =>
        many(50, (i) =>
          frame(
            FRAME.HEADERS,
            END_HEADERS | END_STREAM,
            2 * i + 1,
            Buffer.concat([
              request('/1'),
              Buffer.from([0x40, 1, 120, 127, 0x81, 0x1e]),
              Buffer.alloc(4_000, 97),
              Buffer.alloc(1_000, 0xbe),
            ]),
          ),
        ),
    ],
    [
      'GOAWAY and more',
      () => Buffer.concat([frame(FRAME.GOAWAY, 0, 0, Buffer.alloc(8)), many(100, (i) => get(2 * i + 1, '/1'))]),
    ],
  ];
  it(`${floods.length} floods are survived, and memory stays bounded`, { timeout: 240_000 }, async (t) => {
    const world = await rawWorld(t);
    const wrong: string[] = [];
    const run = async () => {
      for (const [name, bytes] of floods) {
        const raw = await open(world);
        raw.write(bytes());
        await raw.closed(150);
        raw.destroy();
        try {
          process.kill(world.kedge.pid, 0);
        } catch {
          wrong.push(name);
          return;
        }
      }
    };
    await run();
    const before = world.rss();
    await run();
    await run();
    const grown = (world.rss() - before) / 1024 / 1024;
    assert.deepEqual(wrong, []);
    await world.finish();
    assert.ok(grown < 150, `${grown.toFixed(0)} MiB more after two rounds`);
  });

  it('a client that reads nothing takes no more than its share of a backend', { timeout: 120_000 }, async (t) => {
    const world = await rawWorld(t);
    const greedy = await Promise.all(Array.from({ length: 20 }, () => open(world, [[4, 0]])));
    for (const raw of greedy) raw.write(many(100, (i) => get(2 * i + 1, '/large')));
    await sleep(10_000);
    const [first] = greedy;
    assert.ok(first !== undefined && !first.isClosed);
    for (const raw of greedy) raw.destroy();
    await sleep(500);
    await world.finish();
  });

  it('heads that never end, silence, and what is no TLS are closed', { timeout: 60_000 }, async (t) => {
    const world = await rawWorld(t);
    const sockets: net.Socket[] = [];
    const closed = (socket: net.Socket, drip?: string | Buffer) => {
      sockets.push(socket);
      socket.on('error', () => {}).resume();
      const timer = drip === undefined ? undefined : setInterval(() => socket.write(drip), 700);
      socket.on('close', () => clearInterval(timer));
      return once(socket, 'close');
    };
    const secure = async (alpn: string) => {
      const socket = tls.connect({ ...world.tls, ALPNProtocols: [alpn] });
      await once(socket, 'secureConnect');
      return socket;
    };
    t.after(() => {
      for (const socket of sockets) socket.destroy();
    });
    const port = Number(world.tls.port);
    const slow = await secure('http/1.1');
    slow.write('GET / HTTP/1.1\r\nhost: app.us1\r\n');
    const frames = await open(world);
    frames.write(frame(FRAME.HEADERS, 0, 1, [0x82]));
    const partial = await open(world);
    partial.write(Buffer.from([0, 64, 0, 99, 0, 0, 0, 0, 0]));
    const began = performance.now();
    await Promise.all([
      closed(slow, 'x'),
      closed(await secure('http/1.1')),
      closed(await secure('h2')),
      closed(frames.socket, frame(FRAME.CONTINUATION, 0, 1, [])),
      closed(partial.socket, Buffer.from([0])),
      closed(net.connect(port, '127.0.0.1')),
      closed(net.connect(port, '127.0.0.1'), 'x'),
      closed(net.connect(port, '127.0.0.1'), Buffer.from([0x16])),
    ]);
    const took = performance.now() - began;
    assert.ok(took < 26_000, `${took} ms`);
    await world.finish();
  });

  it('a client that reads its download late is not taken for one that sends headers without end', {
    timeout: 60_000,
  }, async (t) => {
    const world = await rawWorld(t);
    const raw = await open(world);
    t.after(() => raw.destroy());
    raw.write(get(1, '/1'));
    assert.equal(await raw.outcome(1), '200');
    await sleep(1_500);
    // What was read is told late, when nothing is under way any more; and it answers PINGs, as every client does.
    raw.write(frame(FRAME.WINDOW_UPDATE, 0, 0, uint32(4)));
    const answered = new Set<object>();
    for (let i = 0; i < 240; i += 1) {
      for (const each of raw.frames) {
        if (each.type !== FRAME.PING || each.flags !== 0 || answered.has(each)) continue;
        answered.add(each);
        raw.write(frame(FRAME.PING, ACK, 0, each.payload));
      }
      await sleep(100);
    }
    raw.write(get(3, '/2'));
    assert.equal(await raw.outcome(3), '200');
    await world.finish();
  });
});
