import assert from 'node:assert/strict';
import { describe, it } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import {
  createDialer,
  firstMatch,
  hostPorts,
  hosts,
  type Mapper,
  parseTarget,
  pem,
  route,
  single,
  staticToken,
  suffix,
} from '../../src/index.ts';

const kedgeOf = (mapper: Mapper, target: string) => mapper(parseTarget(target))?.kedges[0]?.host;
const refuses = (call: () => unknown, message: RegExp) =>
  assert.throws(call, (error: Error & { code?: string }) => {
    assert.equal(error.code, 'ERR_KEDGE_ROUTE');
    assert.match(error.message, message);
    return true;
  });

describe('hosts and hostPorts', () => {
  it('look keys up in their canonical spelling, and only own ones', () => {
    const mapper = hosts({ 'Cart.K.internal.': 'https://a.example', 'bücher.k': 'https://b.example' });
    assert.equal(kedgeOf(mapper, 'http://cart.k.internal:81'), 'a.example');
    assert.equal(kedgeOf(mapper, 'http://xn--bcher-kva.k'), 'b.example');
    for (const name of ['__proto__', 'constructor', 'toString'])
      assert.equal(kedgeOf(mapper, `http://${name}`), undefined);
    assert.equal(kedgeOf(hostPorts(new Map([['cart.k:443', 'https://a.example']])), 'https://cart.k'), 'a.example');
  });

  it('refuse keys that are doubled, addresses, or of the wrong form', () => {
    refuses(() => hosts({ 'a.k': 'https://a.example', 'A.k.': 'https://b.example' }), /"A.k." stands there twice/);
    refuses(() => hosts({ '127.0.0.1': 'https://a.example' }), /IP address/);
    refuses(() => hosts({ 'a.k:80': 'https://a.example' }), /has a port/);
    refuses(() => hostPorts({ 'a.k': 'https://a.example' }), /has no port/);
    refuses(() => hosts({ 'a b': 'https://a.example' }), /not a host/);
    refuses(() => hosts(null as never), /object or a Map/);
    const polluted = JSON.parse('{"__proto__": "https://evil.example"}');
    assert.equal(kedgeOf(hosts(polluted), 'http://toString'), undefined);
  });
});

describe('suffix', () => {
  it('refuses patterns that are not whole labels', () => {
    refuses(() => suffix({ match: '*.a*b.k', suffix: '.example.com' }), /whole label/);
    refuses(() => suffix({ match: '*..k', suffix: '.example.com' }), /not a valid name/);
    refuses(() => suffix({ match: '*.k', suffix: '.exa mple.com' }), /not a valid name/);
    refuses(
      () => suffix({ match: '*.k', suffix: '.example.com', proxyAuth: staticToken('t'), scheme: 'http' }),
      /tokens need https/,
    );
  });

  it('compares canonical labels and gives equal targets one route', () => {
    const mapper = suffix({ match: '*.K.Internal', suffix: '.Edge.example.com' });
    assert.equal(kedgeOf(mapper, 'http://x.B.k.internal.'), 'b.edge.example.com');
    assert.equal(mapper(parseTarget('x.b.k.internal')), mapper(parseTarget('http://y.b.k.internal:81')));
    for (const other of ['k.internal', 'evilk.internal', 'b.k.internal.evil.com', '127.0.0.1']) {
      assert.equal(kedgeOf(mapper, `http://${other}`), undefined);
    }
  });

  it('refuses a kedge name that grows too long', () => {
    const mapper = suffix({ match: '*.*.*.k', suffix: `.${'x'.repeat(63)}.example.com` });
    const long = ['a', 'b', 'c'].map((letter) => letter.repeat(63)).join('.');
    refuses(() => mapper(parseTarget(`${long}.k`)), /not a valid name/);
  });
});

describe('single and firstMatch', () => {
  it('never take an IP address', () => {
    const mapper = single('https://a.example');
    for (const ip of ['127.0.0.1', '0', '[::1]', '0x7f.1']) assert.equal(kedgeOf(mapper, `http://${ip}`), undefined);
  });

  it('ask in order', () => {
    const mapper = firstMatch(hosts({ 'a.k': 'https://a.example' }), single('https://rest.example'));
    assert.equal(kedgeOf(mapper, 'http://a.k'), 'a.example');
    assert.equal(kedgeOf(mapper, 'http://b.k'), 'rest.example');
    refuses(() => firstMatch('x' as never), /every argument/);
  });
});

describe('route', () => {
  it('takes a URL, several, or options, and copies them', () => {
    const url = new URL('https://a.example:8443');
    const built = route({ kedge: [url, 'https://b.example'], serverName: 'Edge.Example.' });
    url.hostname = 'evil.example';
    assert.deepEqual(
      built.kedges.map((kedge) => kedge.href),
      ['https://a.example:8443/', 'https://b.example/'],
    );
    assert.equal(built.serverName, 'edge.example');
    assert.ok(Object.isFrozen(built) && Object.isFrozen(built.kedges));
  });

  const wrong: [unknown, RegExp][] = [
    [undefined, /a route is/],
    [{}, /not a kedge URL/],
    [{ kedge: [] }, /empty/],
    ['kedge.example.com', /not a kedge URL/],
    ['ftp://a.example', /scheme/],
    ['https://user:secret@a.example', /credentials/],
    ['https://a.example/path', /no path/],
    ['https://a.example/?q', /no path/],
    ['https://a.example/#f', /no path/],
    ['https://a.example:0', /port 0/],
    ['https://a*.example', /not a valid name/],
    [
      { kedge: 'https://a.example', proxyAuht: staticToken('t') },
      /unknown option `proxyAuht`; did you mean `proxyAuth`\?/,
    ],
    [{ kedge: 'https://a.example', proxyAuth: 'token' }, /`proxyAuth` is a token source/],
    [{ kedge: 'https://a.example', identity: {} }, /`identity` is an identity/],
    [{ kedge: 'https://a.example', serverName: 'a b' }, /not a valid host name/],
    [{ kedge: 'https://a.example', overrideAuthorization: 'yes' }, /boolean/],
    [{ kedge: 'http://a.example', proxyAuth: staticToken('t') }, /tokens need https/],
    [{ kedge: ['https://b.example', 'http://a.example'], backendAuth: staticToken('t') }, /tokens need https/],
    [
      { kedge: 'https://a.example', proxyAuth: staticToken('t'), peer: { dangerouslySkipVerification: true } },
      /verified/,
    ],
  ];
  for (const [init, message] of wrong) {
    it(`refuses ${JSON.stringify(init)}`, () => {
      refuses(() => route(init as never), message);
      assert.throws(
        () => route(init as never),
        (error: Error) => !error.message.includes('secret'),
      );
    });
  }

  it('refuses a broken peer policy as an option', () => {
    const peers = [
      { spkiPins: [] },
      { spkiPins: ['x'] },
      { spiffeId: 'http://x' },
      { minVersion: 'TLSv1' },
      { insecure: true },
    ];
    for (const peer of peers) {
      assert.throws(() => route({ kedge: 'https://a.example', peer: peer as never }), { code: 'ERR_KEDGE_OPTIONS' });
    }
  });
});

describe('pem', () => {
  it('says which part is wrong', () => {
    const cases: [unknown, RegExp][] = [
      [undefined, /takes \{ cert/],
      [{ key: 'x' }, /`cert` is required/],
      [{ cert: 'x', key: 'x' }, /`cert` holds no PEM/],
      [{ cert: '', key: '', kay: '' }, /unknown option `kay`; did you mean `key`\?/],
    ];
    for (const [init, message] of cases) {
      assert.throws(
        () => pem(init as never),
        (error: Error & { code?: string }) => {
          assert.equal(error.code, 'ERR_KEDGE_IDENTITY');
          assert.match(error.message, message);
          return true;
        },
      );
    }
  });
});

describe('a mapper that is asynchronous', () => {
  it('is refused, and what its promise rejects with ends nothing', async (t) => {
    const rejections: unknown[] = [];
    const note = (error: unknown) => rejections.push(error);
    process.on('unhandledRejection', note);
    t.after(() => process.off('unhandledRejection', note));
    for (const mapper of [
      async () => {
        throw new Error('asynchronous');
      },
      () => sleep(5).then(() => Promise.reject(new Error('late'))),
    ]) {
      const dialer = createDialer({ mapper: mapper as never });
      await assert.rejects(dialer.fetch('http://a.test/'), (error: Error) => {
        assert.equal((error.cause as { code?: string }).code, 'ERR_KEDGE_ROUTE');
        return true;
      });
      await dialer.close();
    }
    await sleep(30);
    assert.deepEqual(rejections, []);
  });
});
