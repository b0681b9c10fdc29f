import assert from 'node:assert/strict';
import { writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, it, type TestContext } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import type { V1Service } from '@kubernetes/client-node';
import { type Config, readConfig } from '../../examples/kedge/config.ts';
import { withServices } from '../../examples/kedge/services.ts';
import { grpcDialer } from '../../src/grpc/index.ts';
import { createDialer, single } from '../../src/index.ts';
import { echoClient, startEchoServer, unary } from '../helpers/grpc-kedge.ts';
import { startNamedBackend } from '../helpers/named-backend.ts';
import { kedgeProcesses } from '../helpers/reference-kedge.ts';
import { ApiServer, type Item, sliceOf } from './api-server.ts';
import { vectors } from './vectors/read.ts';

const OPTIONS = { suffix: 'ext.test', prefix: 'kedge.com/' };
/** How long the API server is away in the test of that. */
const OUTAGE_MS = Number(process.env['KEDGE_TEST_OUTAGE_MS'] ?? 3_000);

type Port = [name: string, port: number, targetPort?: string | number];

function service(name: string, namespace: string, ports: Port[], annotations: Record<string, string> = {}): Item {
  return {
    metadata: { name, namespace, labels: { 'kedge.com/kedge-exposed': 'true' }, annotations },
    spec: { ports: ports.map(([portName, port, targetPort]) => ({ name: portName, port, targetPort })) },
  };
}

const files = (director: object = {}, pool: object = {}) =>
  readConfig({ file: 'director', text: JSON.stringify(director) }, { file: 'pool', text: JSON.stringify(pool) });

const read = (base: Config, services: Item[]) => withServices(base, services as unknown as V1Service[], OPTIONS);

/** Routes and backends in short: `host:port -> backend`, `name = service.namespace:port`, `tls` after those that are. */
function shortOf({ http, grpc }: Config, wire: 'http' | 'grpc'): { routes: string[]; backends: string[] } {
  const routes =
    wire === 'http'
      ? http.routes.map((each) => `${each.hostMatcher}:${each.portMatcher} -> ${each.backendName}`)
      : grpc.routes.map((each) => `${each.authorityHostMatcher}:${each.authorityPortMatcher} -> ${each.backendName}`);
  const backends = [...(wire === 'http' ? http : grpc).backends.values()].map(({ name, k8s, security }) => {
    const tls = security === undefined ? '' : security.insecureSkipVerify ? ' tls unverified' : ' tls';
    return `${name} = ${k8s?.service}.${k8s?.namespace}:${k8s?.port}${tls}`;
  });
  return { routes, backends: backends.sort() };
}

describe('services become routes and backends', () => {
  const base = files(
    {
      http: { routes: [{ backend_name: 'already_there', host_matcher: 'something', port_matcher: 1234 }] },
      grpc: {
        routes: [{ backend_name: 'already_there', authority_host_matcher: 'something', authority_port_matcher: 1234 }],
      },
    },
    {
      http: { backends: [{ name: 'something', k8s: { dns_port_name: 's2.ns1:some' } }] },
      grpc: { backends: [{ name: 'something', k8s: { dns_port_name: 's2.ns1:some' } }] },
    },
  );
  interface Discovery {
    suffix: string;
    prefix: string;
    files: { director: object; pool: object };
    events: { type: string; object: Item; routes: string[]; backends: string[] }[];
  }

  for (const wire of ['http', 'grpc'] as const)
    it(`over ${wire}: as the original's tests say`, () => {
      const { files: own, events, ...options } = vectors<Discovery>('discovery', { wire });
      const seen = new Map<string, Item>();
      for (const { type, object, routes, backends } of events) {
        if (type === 'DELETED') seen.delete(object.metadata.name);
        else seen.set(object.metadata.name, object);
        const from = files(own.director, own.pool);
        const { config, skipped } = withServices(from, [...seen.values()] as unknown as V1Service[], options);
        assert.deepEqual(skipped, []);
        const found = shortOf(config, wire);
        const sorted = found.routes.map((each) => each.replace(' -> ', ' ')).sort();
        assert.deepEqual(sorted, routes, type);
        assert.equal(found.backends.length, backends.length, type);
        for (const [i, each] of backends.entries()) {
          // One of several ports with one target: which, the original leaves to chance.
          const [name, service, ports, tls = ''] = each.split(' ');
          const any = ports!.split('|').map((port) => `${name} = ${service}:${port} ${tls}`.trim());
          assert.ok(any.includes(found.backends[i]!), `${type}: ${found.backends[i]}`);
        }
        // What is more particular comes first; the other wire is as it was.
        const ports = found.routes
          .filter((route) => !route.startsWith('something'))
          .map((route) => /:(\d+) /.exec(route)![1]);
        assert.deepEqual(
          ports,
          ports.toSorted((one, other) => Number(one) - Number(other)),
        );
        const other = wire === 'http' ? 'grpc' : 'http';
        assert.deepEqual(shortOf(config, other), shortOf(from, other));
      }
    });

  it('leaves out what cannot be served, by name, and serves the others', () => {
    const host = (value: string) => ({ 'kedge.com/host-matcher': value });
    const guarded = files({
      http: {
        routes: [
          { backend_name: 'own', host_matcher: 'own.test', port_matcher: 80 },
          { backend_name: 'own', host_matcher: 'admin.test', allowed_clients: ['CN=admin'] },
        ],
      },
    });
    const { config, skipped } = read(guarded, [
      service('spaces', 'a', [['http', 80]], host('no host')),
      service('port', 'a', [['http', 80]], host('a.test:80')),
      service('files', 'a', [['http', 80]], host('OWN.test')),
      service('second', 'b', [['http', 80]], host('twice.test')),
      service(
        'first',
        'a',
        [
          ['http', 80],
          ['http-2', 81],
        ],
        host('twice.test'),
      ),
      service('tls', 'a', [['httptls', 443]], { 'kedge.com/tls-config': 'none' }),
      service('admin', 'a', [['http', 80]], host('admin.test')),
      service('good', 'a', [['http', 80]]),
    ]);
    assert.deepEqual(skipped, [
      'service a/files is not served: there is a route for own.test:80 already',
      'service a/port is not served: "a.test:80" is not the name of a host',
      'service a/spaces is not served: "no host" is not the name of a host',
      'service a/tls is not served: there is no TLS configuration "none"',
      'service b/second is not served: there is a route for twice.test:80 already',
    ]);
    assert.deepEqual(shortOf(config, 'http').routes, [
      'own.test:80 -> own',
      'admin.test:0 -> own',
      'admin.test:80 -> admin_a_80',
      'twice.test:80 -> first_a_80',
      'twice.test:81 -> first_a_81',
      'good.a.svc.ext.test:80 -> good_a_80',
    ]);
  });

  it('stands before routes that would hide it, never before one that says who is allowed', () => {
    const good = service('good', 'a', [['http', 80]]);
    const at = (...routes: object[]) =>
      shortOf(
        read(files({ http: { routes: routes.map((each) => ({ backend_name: 'own', ...each })) } }), [good]).config,
        'http',
      ).routes.map((each) => each.split(':')[0]);
    const own = 'good.a.svc.ext.test';
    assert.deepEqual(at({ host_matcher: 'x' }, {}), ['x', own, '']);
    assert.deepEqual(at({ host_matcher: 'x' }, { host_matcher: own.toUpperCase() }), ['x', own, own.toUpperCase()]);
    assert.deepEqual(at({}, { allowed_clients: ['CN=a'] }, { host_matcher: 'x' }), ['', '', 'x', own]);
  });

  it('gives a name of its own to a backend whose name is taken or too long', () => {
    const long = 'x'.repeat(63);
    const { config, skipped } = read(base, [
      service('a-b', 'c', [['http', 80, 'web']]),
      service('a', 'b-c', [['http', 80, 'web']]),
      service('some', 'thing', [['http', 80, 'web']]),
      service(long, 'ns', [['http', 80, 'web']]),
    ]);
    assert.deepEqual(skipped, []);
    const backends = [...config.http.backends.values()].filter(({ k8s }) => k8s?.port === 'http');
    assert.equal(backends.length, 4);
    assert.equal(new Set(backends.map(({ k8s }) => `${k8s?.service}.${k8s?.namespace}`)).size, 4);
    for (const { name } of backends) assert.match(name, /^[a-z_0-9.]{2,64}$/);
    for (const { backendName } of config.http.routes.slice(1)) assert.ok(config.http.backends.has(backendName));
  });

  it('does not verify a TLS backend only where its annotation says so', () => {
    const skip = { 'kedge.com/insecure-skip-verify': 'true' };
    const { config } = read(base, [service('s', 'n', [['httptls', 443, 'web']], skip)]);
    assert.deepEqual(shortOf(config, 'http').backends, [
      's_n_web = s.n:httptls tls unverified',
      'something = s2.ns1:some',
    ]);
  });
});

/** The kedge as a process that discovers Services, with one HTTP and one gRPC backend behind them. */
async function startWorld(t: TestContext) {
  const api = await ApiServer.start(t);
  const listen = (name: string) => startNamedBackend(t, name);
  const [one, two, file, rpc] = await Promise.all([listen('one'), listen('two'), listen('file'), startEchoServer(t)]);
  api.put('services', service('orders', 'shop', [['http', 80, 'web']]));
  api.put('endpointslices', sliceOf('orders', 'shop', { http: one }));
  api.put('services', service('greeter', 'shop', [['grpc', 9090]]));
  api.put('endpointslices', sliceOf('greeter', 'shop', { grpc: rpc.port }));
  const processes = await kedgeProcesses(t, {
    director: { http: { routes: [{ backend_name: 'file', host_matcher: 'file.test' }] } },
    backendPool: { http: { backends: [{ name: 'file', host: { dns_name: '127.0.0.1', port: file } }] } },
  });
  const start = () =>
    processes.start('any', [
      '--kedge_dynamic_routings_enabled',
      '--discovery_external_domain_suffix=ext.test',
      `--k8sclient_kubeconfig_path=${api.kubeconfig}`,
    ]);
  const kedge = await start();
  const dialer = createDialer({
    mapper: single(`https://127.0.0.1:${kedge.ready.port}`),
    identity: processes.identity,
  });
  t.after(() => dialer.destroy());
  const ask = async (host: string) => {
    const response = await dialer.fetch(`http://${host}/`);
    const text = await response.text();
    return response.status === 200 ? text : `${response.status} ${response.headers.get('x-kedge-error-type')}`;
  };
  const until = async (host: string, wanted: string, ms = 2_000) => {
    const began = performance.now();
    let got = await ask(host);
    while (got !== wanted) {
      assert.ok(performance.now() - began < ms, `${host}: ${got}, not ${wanted} within ${ms} ms\n${kedge.output}`);
      await sleep(20);
      got = await ask(host);
    }
    return Math.round(performance.now() - began);
  };
  const client = new (grpcDialer(dialer).wrap(echoClient()))('greeter.shop.svc.ext.test:9090');
  return { api, kedge, processes, ask, until, client, start, one, two };
}

const ORDERS = 'orders.shop.svc.ext.test';

describe('a kedge that discovers services', () => {
  it('serves what is exposed, beside its files, as it changes', async (t) => {
    const { api, kedge, processes, ask, until, client, two } = await startWorld(t);
    assert.equal(await ask(ORDERS), 'one', 'from the first request on');
    assert.equal(await ask('file.test'), 'file');
    assert.equal((await unary(client, 'hi')).text, 'hi');
    assert.match(api.requests[0]!, /^\/api\/v1\/services\?labelSelector=kedge\.com%2Fkedge-exposed$/);

    api.put('services', service('more', 'shop', [['http', 80]]));
    api.put('endpointslices', sliceOf('more', 'shop', { http: two }));
    await until('more.shop.svc.ext.test', 'two');
    const { metadata, spec } = service('more', 'shop', [['http', 80]]) as Item & { spec: object };
    api.put('services', { metadata: { ...metadata, labels: {} }, spec });
    await until('more.shop.svc.ext.test', '502 no-route');

    api.put('services', service('bad', 'shop', [['http', 80]], { 'kedge.com/host-matcher': 'no host' }));
    api.put('services', service('orders', 'shop', [['http', 80, 'web']], { 'kedge.com/host-matcher': 'other.test' }));
    await until('other.test', 'one');
    assert.equal(await ask(ORDERS), '502 no-route');
    assert.match(kedge.output, /service shop\/bad is not served: "no host" is not the name of a host/);

    writeFileSync(join(processes.folder, 'kedge_config_director_config_path'), '{');
    for (let i = 0; i < 100 && !/refused/.test(kedge.output); i += 1) await sleep(30);
    api.remove('services', service('orders', 'shop', []));
    await until('other.test', '502 no-route');
    assert.equal(await ask('file.test'), 'file', 'services change while the files are wrong');
    assert.equal(kedge.output.match(/service shop\/bad is not served/g)?.length, 1, 'said once');
  });

  it(`serves all it knew while the API server is away for ${OUTAGE_MS} ms, and what is new soon after`, async (t) => {
    const { api, kedge, ask, until, client, two } = await startWorld(t);
    assert.equal(await ask(ORDERS), 'one');
    await api.down();
    const began = performance.now();
    let asked = 0;
    while (performance.now() - began < OUTAGE_MS) {
      assert.deepEqual([await ask(ORDERS), (await unary(client, 'x')).text], ['one', 'x'], kedge.output);
      asked += 2;
      await sleep(5);
    }
    api.put('endpointslices', sliceOf('orders', 'shop', { http: two }));
    api.put('services', service('new', 'shop', [['http', 80]]));
    api.put('endpointslices', sliceOf('new', 'shop', { http: two }));
    api.remove('services', service('greeter', 'shop', []));
    api.forget();
    await api.up();
    const back = performance.now();
    await Promise.all([until(ORDERS, 'two'), until('new.shop.svc.ext.test', 'two')]);
    await assert.rejects(unary(client, 'x'), { details: 'unknown route to service' });
    t.diagnostic(
      `${asked} requests while it was away, all served; new ${Math.round(performance.now() - back)} ms later`,
    );
    assert.equal(kedge.output.match(/services cannot be watched/g)?.length, 1, 'said once');
  });

  it('starts with its files where the API server is away, and has the services when it is back', async (t) => {
    const { api, processes, start } = await startWorld(t);
    await api.down();
    const kedge = await start();
    const dialer = createDialer({
      mapper: single(`https://127.0.0.1:${kedge.ready.port}`),
      identity: processes.identity,
    });
    t.after(() => dialer.destroy());
    assert.equal(await (await dialer.fetch('http://file.test/')).text(), 'file');
    assert.equal((await dialer.fetch(`http://${ORDERS}/`)).status, 502);
    await api.up();
    for (let i = 0; i < 100; i += 1) {
      if ((await dialer.fetch(`http://${ORDERS}/`)).status === 200) return;
      await sleep(20);
    }
    assert.fail(kedge.output);
  });

  it('needs the suffix', async (t) => {
    const processes = await kedgeProcesses(t, { director: {}, backendPool: {} });
    await assert.rejects(
      processes.start('any', ['--kedge_dynamic_routings_enabled']),
      /--kedge_dynamic_routings_enabled needs --discovery_external_domain_suffix/,
    );
  });
});
