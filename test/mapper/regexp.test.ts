import assert from 'node:assert/strict';
import { describe, it } from 'node:test';
import { parseTarget, type RegexpOptions, regexp, staticToken } from '../../src/index.ts';

const EXP = '.*[.](?P<cluster>[a-z0-9-]+)[.]mesh[.]internal';
const URL_ = 'https://${cluster}.edge.example.net';
const token = { proxyAuth: staticToken('secret') };

const map = (options: RegexpOptions, target: string) =>
  regexp(options)(parseTarget(target, { wire: 'grpc' }))?.kedges[0]?.origin;

describe('regexp', () => {
  it('matches the whole host name, and puts captures into the host once', () => {
    assert.equal(map({ exp: EXP, url: URL_ }, 'a.fra1.mesh.internal:90'), 'https://fra1.edge.example.net');
    assert.equal(map({ exp: EXP, url: URL_ }, 'a.fra1.mesh.internal.evil.com'), undefined);
    assert.equal(map({ exp: 'mesh', url: URL_.replace('${cluster}', 'x') }, 'mesh.internal'), undefined);
    assert.equal(map({ exp: '(?<c>a)[.]b', url: 'https://${c}-${c}.net:8443' }, 'a.b'), 'https://a-a.net:8443');
    assert.equal(
      map({ exp: '(?P<c>[a-z]+)-(?P<p>[0-9]+)[.]b', url: 'https://${c}.net:${p}' }, 'x-99.b'),
      'https://x.net:99',
    );
  });

  it('searches in host:port, as winch does', () => {
    const options = { exp: '[.](?P<cluster>[a-z0-9]+)[.]mesh', url: URL_, search: true };
    assert.equal(map(options, 'a.fra1.mesh.internal.evil.com'), 'https://fra1.edge.example.net');
    assert.equal(map({ exp: ':90$', url: 'https://x.y.z', search: true }, 'a.b:90'), 'https://x.y.z');
    assert.equal(map({ exp: ':90$', url: 'https://x.y.z', search: true }, 'a.b'), undefined);
  });

  it('gives equal routes for equal kedges, and none for an IP address', () => {
    const mapper = regexp({ exp: EXP, url: URL_ });
    const [one, two] = ['a', 'b'].map((name) => mapper(parseTarget(`http://${name}.fra1.mesh.internal`)));
    assert.equal(one, two);
    assert.equal(regexp({ exp: '.*', url: 'https://x.y.z' })(parseTarget('http://10.0.0.1')), undefined);
  });

  it('takes linear time for any expression', () => {
    const mapper = regexp({ exp: '^(a+)+\\.internal$', url: 'https://x.y.z' });
    const time = (length: number) => {
      const target = parseTarget(`http://${`${'a'.repeat(length)}`.replace(/.{60}/g, '$&.')}`);
      const began = performance.now();
      for (let i = 0; i < 20; i += 1) mapper(target);
      return performance.now() - began;
    };
    time(38);
    // A backtracking engine would take 2^22 times as long.
    const [short, long] = [time(16), time(38)];
    assert.ok(long < short * 1000 + 50, `${short} ms, ${long} ms`);
  });

  it('refuses a host that no name may be', () => {
    for (const [exp, target] of [
      ['(?P<c>.*)x', 'x'],
      ['a(?P<c>-)x[.]b', 'a-x.b'],
      ['(?P<c>a[.])x', 'a.x'],
      ['(?P<c>.*)[.]b', `${'a'.repeat(63)}.${'a'.repeat(63)}.${'a'.repeat(63)}.${'a'.repeat(50)}.b`],
    ] as const) {
      const mapper = regexp({ exp, url: `https://\${c}.edge.example.net` });
      assert.throws(() => mapper(parseTarget(`http://${target}`)), { code: 'ERR_KEDGE_ROUTE', stage: 'map' }, target);
    }
    for (const [exp, url, target] of [
      ['(?P<c>[0-9.]+)[.]b', 'https://${c}', '127.0.0.1.b'],
      ['(?P<c>[0-9]+)[.]b', 'https://${c}', '2130706433.b'],
      ['(?P<c>[0-9]+)[.]b', 'https://x.y.z:${c}', '99999.b'],
      ['(?P<c>[0-9]+)[.]b', 'https://x.y.z:${c}', '080.b'],
      ['(?P<c>.*)', 'https://x${c}.net', 'a.b:90'],
    ] as const) {
      const mapper = regexp({ exp, url, search: true });
      assert.throws(
        () => mapper(parseTarget(target, { wire: 'grpc' })),
        { code: 'ERR_KEDGE_ROUTE', stage: 'map' },
        url,
      );
    }
  });

  it('refuses, with tokens, a host that a capture decides', () => {
    for (const url of ['https://${cluster}', 'https://${cluster}.net', 'https://edge.${cluster}.net']) {
      assert.throws(() => regexp({ exp: EXP, url, ...token }), { code: 'ERR_KEDGE_ROUTE', stage: 'config' }, url);
      assert.ok(regexp({ exp: EXP, url }));
      assert.ok(regexp({ exp: EXP, url, ...token, allowAnyHost: true }));
    }
    assert.ok(regexp({ exp: EXP, url: 'https://${cluster}.example.net', ...token }));
    assert.ok(regexp({ exp: EXP, url: 'https://example.net:${cluster}', ...token }));
  });

  it('refuses options that are wrong, when it is made', () => {
    for (const wrong of [
      {},
      { exp: '' },
      { exp: '(' },
      { exp: '(?=x)' },
      { exp: 1 },
      { url: 'x' },
      { url: 'ftp://x' },
      { url: 'https://u@x' },
      { url: 'https://x/path' },
      { url: 'https://${nothing}.net' },
      { url: 'https://${cluster' },
      { url: 'https://x:${cluster' },
      { url: 7 },
      { search: 1 },
      { allowAnyHost: 'yes' },
      { unknown: 1 },
      { url: 'http://${cluster}.edge.example.net', ...token },
      { url: 'https://-x.net' },
    ]) {
      const options = Object.keys(wrong).length === 0 ? undefined : { exp: EXP, url: URL_, ...wrong };
      assert.throws(
        () => regexp(options as never),
        { code: 'ERR_KEDGE_ROUTE', stage: 'config' },
        JSON.stringify(wrong),
      );
    }
  });
});
