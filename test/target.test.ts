import assert from 'node:assert/strict';
import { describe, it } from 'node:test';
import { isKedgeError, type KedgeError } from '../src/support/errors.ts';
import { isIP, parseTarget } from '../src/target.ts';

const label63 = 'a'.repeat(63);
const name253 = [label63, label63, label63, 'b'.repeat(59), 'k'].join('.');

describe('parseTarget', () => {
  const canonical: [input: string, authority: string][] = [
    ['B.K.Internal', 'b.k.internal'],
    ['b.k.internal.', 'b.k.internal'],
    ['a_b.k.internal', 'a_b.k.internal'],
    [`${label63}.k.internal`, `${label63}.k.internal`],
    [name253, name253],
    [`${name253}.`, name253],
    ['bücher.k.internal', 'xn--bcher-kva.k.internal'],
    ['xn--bcher-kva.k.internal', 'xn--bcher-kva.k.internal'],
    ['ｂ.k.internal', 'b.k.internal'],
    ['b。k．internal', 'b.k.internal'],
    ['b.k.internal:65535', 'b.k.internal:65535'],
    ['__proto__', '__proto__'],
    ['constructor', 'constructor'],
  ];
  for (const [input, authority] of canonical) {
    it(`takes ${input.slice(0, 40)} on every wire`, () => {
      const port = authority.includes(':') ? '' : ':9090';
      assert.equal(parseTarget(input).authority, authority);
      assert.equal(parseTarget(`http://${input}`).authority, authority);
      assert.equal(parseTarget(`https://${input}/`).authority, authority);
      assert.equal(parseTarget(new URL(`http://${input}`)).authority, authority);
      assert.equal(parseTarget(input, { wire: 'grpc' }).authority, authority);
      assert.equal(parseTarget(`dns:///${input}${port}`, { wire: 'grpc' }).authority, authority + port);
      assert.equal(parseTarget(`dns:${input}${port}`, { wire: 'grpc' }).authority, authority + port);
    });
  }

  it('counts default ports as none, and gives every target a port', () => {
    assert.equal(parseTarget('http://b.k:80').authority, 'b.k');
    assert.equal(parseTarget('https://b.k:443').authority, 'b.k');
    assert.equal(parseTarget('http://b.k:443').authority, 'b.k:443');
    assert.equal(parseTarget('b.k:').authority, 'b.k');
    assert.equal(parseTarget('http://b.k:/').authority, 'b.k');
    assert.equal(parseTarget('http://b.k').port, 80);
    assert.equal(parseTarget('https://b.k').port, 443);
    assert.equal(parseTarget('b.k', { wire: 'grpc' }).port, 443);
    assert.equal(parseTarget('b.k:443', { wire: 'grpc' }).authority, 'b.k:443');
  });

  const addresses = [
    '127.0.0.1',
    '127.1',
    '2130706433',
    '0x7f.1',
    '0177.0.0.1',
    '0',
    '0.0.0.0',
    '[::1]',
    '[::ffff:127.0.0.1]',
  ];
  for (const input of addresses) {
    it(`knows ${input} as the IP address that a URL parser sees`, () => {
      const target = parseTarget(`${input}:8080`);
      assert.equal(isIP(target), true);
      assert.equal(target.authority, new URL(`http://${input}:8080`).host);
      assert.deepEqual(parseTarget(new URL(`http://${input}:8080`)), target);
      assert.equal(parseTarget(`${input}:8080`, { wire: 'grpc' }).hostname, target.hostname);
    });
  }

  const refused = [
    '',
    '.',
    'b..k.internal',
    '.k.internal',
    'b.k.internal..',
    '-a.k.internal',
    'a-.k.internal',
    `a${name253}`,
    `${'a'.repeat(64)}.k`,
    'b%2ek.internal',
    'b\0.k.internal',
    'b%00.k.internal',
    'b\r.k.internal',
    'b\n.k.internal',
    'b .k.internal',
    ' b.k.internal',
    'b.k.internal ',
    'b.k.internal\t',
    '\u00a0b.k.internal',
    '*',
    '{a}',
    'a,b',
    'a;b',
    "'a'",
    '"a"',
    '`a`',
    '$a',
    `$${'{cluster}'}`,
    '256.1.1.1',
    '[fe80::1%25eth0]',
    '[::',
    '[::1].k.internal',
    '::1',
    'user:pw@b.k.internal',
    'user@b.k.internal',
    'b.k.internal@evil.com',
    'evil.com#.k.internal',
    'evil.com/.k.internal',
    'evil.com?.k.internal',
    'evil.com\\.k.internal',
    'b.k:0',
    'b.k:65536',
    'b.k:-1',
    'b.k:80a',
    'b.k:080',
    'b.k:+80',
    'a:1:2',
    'xn--a.k',
    'xn--.k',
    'xn--zzzzzz.k',
    'xn--abc-.k',
    'ftp://b.k',
    'file:///b.k',
    'javascript:alert(1)',
    'unix:/b.k',
    'unix:b.k',
    'data:text/html,x',
    'dns://8.8.8.8/b.k',
    `${'a'.repeat(100_000)}`,
  ];
  for (const input of refused) {
    it(`refuses ${JSON.stringify(input).slice(0, 40)} on every wire`, () => {
      for (const call of [
        () => parseTarget(input),
        () => parseTarget(`http://${input}`),
        () => parseTarget(input, { wire: 'grpc' }),
        () => parseTarget(`dns:///${input}`, { wire: 'grpc' }),
      ]) {
        assert.throws(call, (error: unknown) => {
          assert.ok(isKedgeError(error));
          assert.equal(error.code, 'ERR_KEDGE_TARGET');
          assert.equal(error.stage, 'map');
          assert.doesNotMatch(error.message, /pw/, 'a password shows');
          assert.ok(error.message.length < 300);
          return true;
        });
      }
    });
  }

  it('refuses URLs with credentials, port 0 or another scheme, and shows no password', () => {
    for (const url of [
      'http://user:pw@b.k',
      'http://b.k:0',
      'ftp://b.k',
      'data:text/html,pw',
      'http://*.k',
      'http://a,b',
    ]) {
      assert.throws(
        () => parseTarget(new URL(url)),
        (error: unknown) => isKedgeError(error) && error.code === 'ERR_KEDGE_TARGET' && !error.message.includes('pw'),
      );
    }
  });

  it('says of a path, a query and credentials in a string that they do not belong there, and shows no secret', () => {
    const path = /a target is a host and a port, without a path or a query/;
    const credentials = /credentials in a target are not sent/;
    const http = { wire: 'http' } as const;
    const grpc = { wire: 'grpc' } as const;
    for (const [input, options, reason] of [
      ['http://a.us1/v1/orders', http, path],
      ['http://a.us1?key=pw', http, path],
      ['http://a.us1/v1?key=pw#pw', http, path],
      ['a.us1/v1#pw', http, path],
      ['http://a.us1/v1@b?pw', http, path],
      ['http://ada:pw/x@a.us1', http, path],
      ['http://ada:pw@a.us1/', http, credentials],
      ['http://ada:pw@pw@a.us1:8080', http, credentials],
      ['ada:pw@a.us1:8080', http, credentials],
      ['http://ada:pw@a.us1/v1?key=pw', http, credentials],
      ['a.us1:90/pkg.Service', grpc, path],
      ['ada:pw@a.us1:90', grpc, credentials],
    ] as const) {
      assert.throws(
        () => parseTarget(input, options),
        ({ code, message }: KedgeError) =>
          code === 'ERR_KEDGE_TARGET' && reason.test(message) && !message.includes('pw'),
        input,
      );
    }
  });

  it('decodes what the owner of a URL object has parsed', () => {
    assert.equal(parseTarget(new URL('http://b%2ek.internal')).authority, 'b.k.internal');
    assert.equal(parseTarget(new URL('http://evil.com#.k.internal')).authority, 'evil.com');
    assert.equal(parseTarget(new URL('http://evil.com/.k.internal')).authority, 'evil.com');
  });

  it('refuses what is neither string nor URL', () => {
    for (const input of [undefined, null, 1, {}, ['b.k'], { href: 'http://b.k' }]) {
      assert.throws(() => parseTarget(input as never), { code: 'ERR_KEDGE_TARGET' });
    }
  });
});
