import assert from 'node:assert/strict';
import { readFileSync } from 'node:fs';
import { describe, it } from 'node:test';
import { readConfig } from '../../examples/kedge/config.ts';
import { routeGrpc, routeHttp, splitAuthority } from '../../examples/kedge/director.ts';

interface HttpVectors {
  routes: { backend_name?: string; backendName?: string }[];
  cases: {
    url: string;
    headers?: Record<string, string>;
    mode?: 'REVERSE_PROXY' | 'FORWARD_PROXY';
    backend: string | null;
  }[];
}

interface GrpcVectors {
  routes: { backend_name?: string; backendName?: string }[];
  cases: { method: string; authority?: string; metadata?: Record<string, string[]>; backend: string | null }[];
}

function vectors<T>(name: string): T {
  return JSON.parse(readFileSync(new URL(`../conformance/${name}.json`, import.meta.url), 'utf8'));
}

/** The routes with a backend for each, as the files of a kedge would have them. */
function configOf(wire: 'http' | 'grpc', routes: HttpVectors['routes']) {
  const names = new Set(routes.map((route) => route.backend_name ?? route.backendName!));
  const backends = [...names].map((name) => ({ name, host: { dns_name: 'localhost', port: 1 } }));
  return readConfig(
    { file: 'director.json', text: JSON.stringify({ [wire]: { routes } }) },
    { file: 'backendpool.json', text: JSON.stringify({ [wire]: { backends } }) },
  );
}

describe('http-routes.json', () => {
  const { routes, cases } = vectors<HttpVectors>('http-routes');
  const config = configOf('http', routes);
  for (const { url, headers = {}, mode = 'REVERSE_PROXY', backend } of cases) {
    it(`${mode} ${url} ${JSON.stringify(headers)} -> ${backend}`, () => {
      const { host, protocol, pathname } = new URL(url);
      const { host: name, port } = splitAuthority(host)!;
      const lower = Object.fromEntries(Object.entries(headers).map(([key, value]) => [key.toLowerCase(), value]));
      const target = {
        host: name,
        port: port ?? (protocol === 'https:' ? 443 : 80),
        path: pathname,
        headers: lower,
        mode,
      };
      assert.equal(routeHttp(config.http.routes, target)?.backendName ?? null, backend);
    });
  }
});

describe('grpc-routes.json', () => {
  const { routes, cases } = vectors<GrpcVectors>('grpc-routes');
  const config = configOf('grpc', routes);
  for (const { method, authority = '', metadata = {}, backend } of cases) {
    it(`${method} ${authority} ${JSON.stringify(metadata)} -> ${backend}`, () => {
      const { host, port = 0 } = splitAuthority(authority) ?? { host: '' };
      assert.equal(
        routeGrpc(config.grpc.routes, { method: method.slice(1), host, port, metadata })?.backendName ?? null,
        backend,
      );
    });
  }
});

describe('readConfig', () => {
  const good = { http: { backends: [{ name: 'orders', host: { dns_name: 'a', port: 1 } }] } };
  const wrong: [director: unknown, pool: unknown, message: RegExp][] = [
    [{ htp: {} }, good, /^director: htp: unknown; there are http, grpc$/],
    [{ http: { routes: {} } }, good, /^director: http\.routes: expected a list$/],
    [{ http: { routes: [{}] } }, good, /^director: http\.routes\[0\]\.backend_name: expected a value/],
    [
      { http: { routes: [{ backend_name: 'x', backendName: 'x' }] } },
      good,
      /^director: http\.routes\[0\]\.backendName: is there twice$/,
    ],
    [{ http: { routes: [{ backend_name: 'orders', port_matcher: 99_999 }] } }, good, /port_matcher: expected a port/],
    [{ http: { routes: [{ backend_name: 'orders', proxy_mode: 'BOTH' }] } }, good, /proxy_mode: expected ANY or/],
    [{}, { http: { backends: [{ name: 'X' }] } }, /^pool: http\.backends\[0\]\.name: expected a name/],
    [{}, { http: { backends: [good.http.backends[0], good.http.backends[0]] } }, /"orders" is there twice/],
    [{}, { http: { backends: [{ name: 'orders', host: { dns_name: 'a' } }] } }, /host\.port: expected a value/],
    [[], good, /^director: the file: expected an object$/],
  ];
  for (const [director, pool, message] of wrong) {
    it(`says ${message.source}`, () => {
      const file = (name: string, value: unknown) => ({ file: name, text: JSON.stringify(value) });
      assert.throws(
        () => readConfig(file('director', director), file('pool', pool)),
        (error: Error) => message.test(error.message),
      );
    });
  }

  it('names the file that is not JSON, and is not fooled by __proto__', () => {
    const pool = { file: 'pool', text: '{}' };
    assert.throws(() => readConfig({ file: 'director', text: '{' }, pool), /^Error: director: /);
    assert.throws(
      () => readConfig({ file: 'director', text: '{"__proto__": {"http": {}}}' }, pool),
      /__proto__: unknown/,
    );
  });
});
