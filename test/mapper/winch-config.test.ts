import assert from 'node:assert/strict';
import { writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { describe, it } from 'node:test';
import { createDialer, loadWinchConfig, parseTarget, type WinchConfigOptions } from '../../src/index.ts';
import { tempDir } from '../helpers/temp.ts';

const direct = { key: 'a.internal:80', url: 'https://x.example.net' };

const auth = {
  auth_sources: [
    { name: 'plain', token: { token: 'canary-plain' } },
    { name: 'dummy', dummy: { value: 'canary-dummy' } },
    { name: 'kube', kube: { user: 'me', path: '~/.kube/config' } },
    {
      name: 'oidc',
      oidc: {
        provider: 'https://id.example.com',
        client_id: 'id',
        secret: 'canary-secret',
        scopes: ['email'],
        path: '/tmp/x',
        login_callback_path: '/oidc/callback',
      },
    },
    {
      name: 'google',
      serviceAccountOidc: {
        provider: 'https://accounts.google.com',
        clientId: 'id',
        secret: '',
        scopes: [],
        serviceAccountJsonPath: '/nowhere.json',
      },
    },
  ],
};

describe('loadWinchConfig', () => {
  it('reads files and objects, every kind of source, and asks nobody for it', async (t) => {
    const dir = await tempDir(t);
    const [mapperFile, authFile] = [join(dir, 'mapper.json'), join(dir, 'auth.json')];
    const mapper = {
      routes: auth.auth_sources.map(({ name }, i) => ({
        proxy_auth: name,
        backendAuth: name,
        protocol: i,
        direct: { key: `${name}.internal:80`, url: 'https://x.example.net' },
      })),
    };
    for (const [i, route] of mapper.routes.entries()) route.protocol = i % 3;
    await Promise.all([writeFile(mapperFile, JSON.stringify(mapper)), writeFile(authFile, JSON.stringify(auth))]);
    for (const config of [loadWinchConfig({ mapper: mapperFile, auth: authFile }), loadWinchConfig({ mapper, auth })]) {
      assert.deepEqual(config.warnings, []);
      for (const [i, { name }] of auth.auth_sources.entries()) {
        for (const wire of ['http', 'grpc'] as const) {
          const found = config.mapper(
            parseTarget(wire === 'http' ? `http://${name}.internal` : `${name}.internal:80`, { wire }),
          );
          const expected = i % 3 === 0 || (i % 3 === 1) === (wire === 'http');
          assert.equal(found?.proxyAuth?.name, expected ? name : undefined);
          assert.equal(found?.overrideAuthorization, expected ? true : undefined);
        }
      }
    }
    const dialer = createDialer({ mapper: loadWinchConfig({ mapper: mapperFile, auth: authFile }).mapper });
    assert.match(
      dialer.explain('http://plain.internal').mapper,
      /mapper\.json: routes\[0\]: hostPorts: has "plain\.internal:80"/,
    );
    assert.equal(dialer.explain('http://nobody.internal').mapper, 'no route matches');
    await dialer.close();
  });

  it('takes a key without a port for requests without one', async () => {
    const mapper = {
      routes: [
        { direct: { key: 'Resource1.ext.example.com', url: 'https://one.example.net' } },
        { direct: { key: 'resource1.ext.example.com:8080', url: 'https://two.example.net' } },
        { protocol: 'GRPC', direct: { key: 'resource2.ext.example.com', url: 'https://three.example.net' } },
      ],
    };
    const config = loadWinchConfig({ mapper });
    for (const [wire, input, kedge] of [
      ['http', 'http://resource1.ext.example.com/', 'one.example.net'],
      ['http', 'http://resource1.ext.example.com:80/', 'one.example.net'],
      ['http', 'https://resource1.ext.example.com/', 'one.example.net'],
      ['http', 'https://resource1.ext.example.com:80/', undefined],
      ['http', 'http://resource1.ext.example.com:443/', undefined],
      ['http', 'http://resource1.ext.example.com:8080/', 'two.example.net'],
      ['http', 'http://resource1.ext.example.com:8081/', undefined],
      ['http', 'http://more.resource1.ext.example.com/', undefined],
      ['grpc', 'resource1.ext.example.com', 'one.example.net'],
      ['grpc', 'resource1.ext.example.com:9090', undefined],
      ['grpc', 'resource2.ext.example.com', 'three.example.net'],
      ['http', 'http://resource2.ext.example.com', undefined],
    ] as const) {
      assert.equal(config.mapper(parseTarget(input, { wire }))?.kedges[0]?.host, kedge, `${wire} ${input}`);
    }
    const dialer = createDialer({ mapper: config.mapper });
    assert.match(dialer.explain('http://resource1.ext.example.com').mapper, /routes\[0\]: hosts: has "resource1/);
    await dialer.close();
    for (const key of ['127.0.0.1', 'a b', 'resource1.ext.example.com']) {
      const twice = [...mapper.routes, { direct: { key, url: 'https://x.example.net' } }];
      assert.throws(() => loadWinchConfig({ mapper: { routes: twice } }), { code: 'ERR_KEDGE_ROUTE' }, key);
    }
  });

  it('lists what may send tokens where nobody meant them to go; strict refuses it', () => {
    const route = (exp: string, url: string) => ({
      mapper: { routes: [{ proxyAuth: 'plain', regexp: { exp, url } }] },
      auth,
    });
    const hazards = (options: WinchConfigOptions) => loadWinchConfig(options).warnings;
    assert.deepEqual(hazards(route('^(?P<c>[a-z]+)[.]x$', 'https://${c}.example.net')), []);
    assert.match(
      hazards(route('^(?P<c>[a-z]+)$', 'https://${c}.net'))[0]!,
      /^mapper: routes\[0\]\.regexp: a capture decides the host/,
    );
    assert.match(hazards(route('[.]x', 'https://a.b.net'))[0]!, /without \^ and \$/);
    assert.equal(hazards(route('(?P<c>.*)', 'https://${c}')).length, 2);
    assert.throws(() => loadWinchConfig({ ...route('x', 'https://a.b.net'), strict: true }), {
      code: 'ERR_KEDGE_ROUTE',
    });
    assert.deepEqual(
      hazards({ mapper: { routes: [{ regexp: { exp: 'x', url: 'https://a.b.net' } }] } }),
      [],
      'no tokens',
    );
  });

  it('says in one line which file, where in it, and what was expected', async (t) => {
    const dir = await tempDir(t);
    const file = join(dir, 'mapper.json');
    const wrong: [string, RegExp][] = [
      ['{', /^config: .*mapper\.json: not JSON(, at .*)?$/],
      ['[]', /mapper\.json:: expected an object|mapper\.json: expected an object/],
      ['{"routes": {}}', /mapper\.json: routes: expected a list$/],
      ['{"routes": [1]}', /routes\[0\]: expected an object$/],
      ['{"route": []}', /mapper\.json: route: unknown; there are routes$/],
      ['{"routes": [{"direct": {"key": 1}}]}', /routes\[0\]\.direct\.key: expected a string$/],
      ['{"routes": [{"protocol": "UDP"}]}', /routes\[0\]\.protocol: expected ANY or HTTP or GRPC$/],
      ['{"routes": [{"protocol": 3}]}', /routes\[0\]\.protocol: expected ANY/],
      ['{"routes": [{"proxy_auth": "a", "proxyAuth": "b"}]}', /routes\[0\]\.proxyAuth: is there twice$/],
      ['{"routes": [{"direct": {"key": "a:1", "key": "b:1"}}]}', /routes\[0\]\.direct\.key: is there twice$/],
      ['{"routes": [], "r\\u006futes": []}', /mapper\.json: routes: is there twice$/],
      ['{"routes": [{"direct": {"key": "a:1"}}]}', /routes\[0\]\.direct\.url: is required$/],
      ['{"routes": [{}]}', /routes\[0\]: expected either `direct` or `regexp`$/],
      [
        '{"routes": [{"direct": {"key": "a:1", "url": "https://x"}, "regexp": {"exp": "x", "url": "https://x"}}]}',
        /routes\[0\]: expected either/,
      ],
      ['{"routes": [{"direct": {"key": "a b", "url": "https://x"}}]}', /routes\[0\]: hosts: key "a b" is not a host$/],
      ['{"routes": [{"direct": {"key": "a:1", "url": "ftp://x"}}]}', /routes\[0\]: .*scheme is not https or http$/],
      ['{"routes": [{"regexp": {"exp": "(", "url": "https://x"}}]}', /routes\[0\]: regexp: `exp` "\(" is not RE2/],
      [
        '{"routes": [{"proxy_auth": "none", "direct": {"key": "a:1", "url": "https://x"}}]}',
        /routes\[0\]: no auth source is called "none"$/,
      ],
      [
        '{"routes": [{"direct": {"key": "a:1", "url": "https://x"}}, {"direct": {"key": "A:1", "url": "https://y"}}]}',
        /routes\[1\]\.direct\.key: "A:1" is there twice$/,
      ],
      ['{"__proto__": {"routes": []}}', /mapper\.json: __proto__: unknown/],
      ['{"routes": [{"constructor": {}}]}', /routes\[0\]\.constructor: unknown/],
    ];
    for (const [content, message] of wrong) {
      await writeFile(file, content);
      assert.throws(
        () => loadWinchConfig({ mapper: file }),
        (error: Error & { code: string }) => {
          assert.equal(error.code, 'ERR_KEDGE_ROUTE');
          assert.match(error.message, message, content);
          assert.doesNotMatch(error.message, /\n/);
          assert.ok(error.message.includes(file));
          return true;
        },
        content,
      );
    }
    const mapper = join(dir, 'none');
    assert.throws(() => loadWinchConfig({ mapper }), { message: /`mapper`: .*none: cannot be read \(ENOENT\)/ });
    assert.throws(() => loadWinchConfig({ mapper: { routes: [] }, auth: mapper }), {
      message: /`auth`: .*none: cannot be read \(ENOENT\)/,
    });
    assert.equal(({} as Record<string, unknown>)['routes'], undefined);
    for (const nothing of [undefined, {}, { mapper: 1 }, { mapper: null }]) {
      assert.throws(() => loadWinchConfig(nothing as never), { code: 'ERR_KEDGE_ROUTE' });
    }
  });

  it('shows no token in what it says of the auth file', () => {
    const bad =
      (...auth_sources: object[]) =>
      () =>
        loadWinchConfig({ mapper: { routes: [{ direct }] }, auth: { auth_sources } });
    const [plain] = auth.auth_sources;
    for (const [load, message] of [
      [bad({ token: { token: 'canary' } }), /auth: auth_sources\[0\]\.name: is required/],
      [bad(plain!, plain!), /auth_sources\[1\]\.name: "plain" is there twice/],
      [bad({ name: 'x' }), /auth_sources\[0\]: expected one of token, dummy/],
      [bad({ ...plain, dummy: { value: 'x' } }), /auth_sources\[0\]: expected one of/],
      [
        bad({ name: 'x', token: { token: 'canary\n' } }),
        /auth_sources\[0\]: token source x: what the source gave is not a token/,
      ],
      [bad({ name: 'x', token: {} }), /not a token/],
      [
        bad({ name: 'x', oidc: { provider: 'http://canary.example.com', client_id: 'x' } }),
        /`issuer` is an https: URL/,
      ],
      [bad({ name: 'x', service_account_oidc: { provider: 'https://x' } }), /`keyFile` is required/],
    ] as const) {
      assert.throws(load, (error: Error) => {
        assert.match(error.message, message);
        assert.doesNotMatch(error.message, /canary/);
        return true;
      });
    }
  });

  for (const home of ['~', '$HOME'])
    it(`finds files below ${home}`, async (t) => {
      const dir = await tempDir(t);
      const users = [{ name: 'me', user: { token: 'canary-kube' } }];
      await writeFile(join(dir, 'kubeconfig'), JSON.stringify({ apiVersion: 'v1', kind: 'Config', users }));
      const { HOME } = process.env;
      process.env['HOME'] = dir;
      t.after(() => {
        process.env['HOME'] = HOME;
      });
      const { tokenSources } = loadWinchConfig({
        mapper: { routes: [{ direct }] },
        auth: { auth_sources: [{ name: 'kube', kube: { user: 'me', path: `${home}/kubeconfig` } }] },
      });
      assert.equal(await tokenSources.get('kube')!.token(), 'canary-kube');
    });
});
