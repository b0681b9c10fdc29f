import assert from 'node:assert/strict';
import { once } from 'node:events';
import { writeFileSync } from 'node:fs';
import http from 'node:http';
import type { AddressInfo } from 'node:net';
import { join } from 'node:path';
import { describe, it, type TestContext } from 'node:test';
import { helpOf, readFlags } from '../../examples/flags.ts';
import { readConfig } from '../../examples/kedge/config.ts';
import { createDialer, single } from '../../src/index.ts';
import { authority, KEDGE_NAME } from '../helpers/kedge.ts';
import { runNode, spawnNode } from '../helpers/process.ts';
import { type KedgeReady, kedgeProcesses } from '../helpers/reference-kedge.ts';
import { tempDir } from '../helpers/temp.ts';
import { ApiServer } from './api-server.ts';
import { vectors } from './vectors/read.ts';

interface FlagSet {
  set: string;
  /** Null: without a value. A list: once for each. */
  flags: Record<string, string | string[] | null>;
}

const flagSets = (program: 'kedge' | 'winch', words = {}) =>
  vectors<Record<typeof program, FlagSet[]>>('flags', words)[program];

const argsOf = ({ flags }: FlagSet) =>
  Object.entries(flags).flatMap(([name, value]) =>
    [value].flat().map((each) => (each === null ? `--${name}` : `--${name}=${each}`)),
  );

/** The flags of a program that mean nothing here, each with the reason that `--help` gives. */
async function ignoredBy(program: 'kedge' | 'winch'): Promise<ReadonlyMap<string, string>> {
  const { status, out } = await runNode([`examples/${program}/main.ts`, '--help']);
  assert.equal(status, 0, out);
  return new Map([...out.matchAll(/^ {2}--(\w+): (.+)$/gm)].map(([, name, reason]) => [name!, reason!]));
}

/** It warns of those that it was given, and of no other. */
function warnsOf(ignored: ReadonlyMap<string, string>, { set, flags }: FlagSet, output: string): void {
  const given = Object.keys(flags).filter((name) => ignored.has(name));
  const warnings = given.map((name) => `--${name} is ignored: ${ignored.get(name)}`);
  assert.deepEqual([...output.matchAll(/--\w+ is ignored: .+/g)].map(String), warnings, set);
}

/** Files of what they say, for the flags that name some. */
async function filesOf(t: TestContext, contents: Readonly<Record<string, string>>): Promise<Record<string, string>> {
  const folder = await tempDir(t);
  for (const [name, content] of Object.entries(contents)) writeFileSync(join(folder, name), content);
  return Object.fromEntries(Object.keys(contents).map((name) => [name, join(folder, name)]));
}

async function certificateFiles(t: TestContext): Promise<Record<string, string>> {
  const ca = await authority();
  const { cert, key } = await ca.issue({ cn: KEDGE_NAME, dns: [KEDGE_NAME] });
  return filesOf(t, { cert, key, ca: ca.cert });
}

describe("every flag of the original's help and documentation", () => {
  it('starts the kedge, bare ones too, and says why some mean nothing', async (t) => {
    const api = await ApiServer.start(t);
    const folder = join(api.kubeconfig, '..');
    const provider = http
      .createServer((_request, response) => response.end(JSON.stringify({ issuer, jwks_uri: `${issuer}/keys` })))
      .listen(0, '127.0.0.1');
    await once(provider, 'listening');
    t.after(() => provider.close().closeAllConnections());
    const issuer = `http://127.0.0.1:${(provider.address() as AddressInfo).port}`;
    const words = {
      ...(await certificateFiles(t)),
      ...(await filesOf(t, { director: '{"grpc":{},"http":{}}', pool: '{"grpc":{},"http":{}}' })),
      api: api.url,
      apiCa: join(folder, 'ca.crt'),
      apiToken: join(folder, 'token'),
      kubeconfig: api.kubeconfig,
      issuer,
    };
    const ignored = await ignoredBy('kedge');
    for (const each of flagSets('kedge', words)) {
      const kedge = await spawnNode<KedgeReady>(t, 'examples/kedge/main.ts', argsOf(each));
      const debug = (path: string, headers = {}) =>
        fetch(`http://127.0.0.1:${kedge.ready.debugPort}${path}`, { headers });
      warnsOf(ignored, each, kedge.output);
      assert.equal((await debug('/_healthz')).status, 200, 'probes bring no token');
      const path = each.flags['server_metrics_path'] ?? '/metrics';
      const token = each.flags['unsafe_bearer_token_proxy_auth'];
      assert.equal((await debug(String(path))).status, token === undefined ? 200 : 401, each.set);
      const mine = await debug(String(path), { authorization: `Bearer ${token}` });
      assert.match(await mine.text(), /kedge_connections/);
      await kedge.stop();
    }
  });

  it('starts winch, and shows its metrics at the address that is for them', async (t) => {
    const port = String(20_000 + (process.pid % 20_000));
    const words = {
      ...(await certificateFiles(t)),
      ...(await filesOf(t, {
        mapper: JSON.stringify({ routes: [{ direct: { key: 'a.test:80', url: `https://${KEDGE_NAME}` } }] }),
        auth: '{}',
        pac: 'function FindProxyForURL() { return "DIRECT"; }',
      })),
      port,
    };
    const ignored = await ignoredBy('winch');
    for (const each of flagSets('winch', words)) {
      const winch = await spawnNode<{ port: number }>(t, 'examples/winch/main.ts', argsOf(each));
      warnsOf(ignored, each, winch.output);
      const own = (path: string) => fetch(`http://127.0.0.1:${winch.ready.port}${path}`);
      if ('server_http_monitoring_address' in each.flags) {
        assert.match(await (await fetch(`http://127.0.0.1:${port}/m`)).text(), /winch_requests_total/);
        assert.equal((await fetch(`http://127.0.0.1:${port}/winch/cleartoken/x`)).status, 404);
        assert.equal((await own('/m')).status, 404, 'they are elsewhere');
      } else assert.match(await (await own('/metrics')).text(), /winch_requests_total/);
      if ('pac_file' in each.flags) assert.match(await (await own('/wpad.dat')).text(), /return "DIRECT"; }$/);
      await winch.stop();
    }
  });

  it('reads values as pflag does', () => {
    const defaults = { server_sigterm_timeout: 10, a_files: '', b_port: 1, c: false, d: true, log_level: 'info' };
    const read = (...args: string[]) => readFlags(defaults, { old: 'it is old' }, args).values;
    for (const [text, seconds] of [
      ['40s', 40],
      ['40', 40],
      ['1m30s', 90],
      ['1h0m0.5s', 3600.5],
      ['500ms', 0.5],
    ] as const)
      assert.equal(read('--server_sigterm_timeout', text).server_sigterm_timeout, seconds);
    assert.equal(read('--a_files=x,y', '--a_files', 'z').a_files, 'x,y,z');
    assert.equal(read('--b_port=1', '--b_port=2').b_port, 2);
    for (const yes of ['1', 't', 'T', 'true', 'TRUE', 'True']) assert.equal(read(`--c=${yes}`).c, true);
    for (const no of ['0', 'f', 'F', 'false', 'FALSE', 'False']) assert.equal(read(`--d=${no}`).d, false);
    assert.equal(read('--c', '--old', '--b-port=3').b_port, 3);
    assert.deepEqual(readFlags(defaults, { old: 'it is old' }, ['--old', 'x', '--c']).warnings, [
      '--old is ignored: it is old',
    ]);
    for (const [args, message] of [
      [['--c=2'], /--c is true or false/],
      [['--server_sigterm_timeout=1 day'], /is a time such as 40s/],
      [['--b_port=70000'], /a port/],
      [['--log_level=bogus'], /--log_level is debug/],
      [['--older'], /Unknown option '--older'/],
    ] as const)
      assert.throws(() => read(...args), message);
    assert.match(helpOf(defaults, { old: 'it is old' }), /--b_port=1\n[\s\S]*ignored:\n {2}--old: it is old$/);
  });

  it('is in --help', async () => {
    for (const program of ['kedge', 'winch'] as const) {
      const { status, out } = await runNode([`examples/${program}/main.ts`, '--help']);
      assert.equal(status, 0, out);
      for (const name of flagSets(program).flatMap(({ flags }) => Object.keys(flags)))
        assert.match(out, new RegExp(`^ {2}--${name.replaceAll('-', '_')}[=:]`, 'm'), name);
    }
  });
});

describe("the original's files", () => {
  const read = (director: object, pool: object) =>
    readConfig({ file: 'director', text: JSON.stringify(director) }, { file: 'pool', text: JSON.stringify(pool) });

  it('may have fields without meaning, numbers as text, enums as numbers, and null', () => {
    const config = read(
      {
        http: {
          routes: [{ backend_name: 'one', port_matcher: '8080', proxy_mode: 1, autogenerated: true, path_rules: null }],
        },
        grpc: { routes: [{ backendName: 'one', autogenerated: false, authority_port_matcher: '18271' }] },
      },
      {
        http: {
          backends: [
            { name: 'one', balancer: 0, disable_conntracking: true, host: { dns_name: 'localhost', port: '19101' } },
          ],
        },
        grpc: {
          backends: [
            { name: 'one', autogenerated: true, interceptors: [{ prometheus: true }], k8s: { dns_port_name: 'svc' } },
          ],
        },
      },
    );
    const { portMatcher, proxyMode, pathRules } = config.http.routes[0]!;
    assert.deepEqual([portMatcher, proxyMode, pathRules], [8080, 'REVERSE_PROXY', []]);
    assert.equal(config.http.backends.get('one')!.host!.port, 19101);
    assert.equal(config.grpc.routes[0]!.authorityPortMatcher, 18271);
    for (const bad of [{ port_matcher: '8o' }, { proxy_mode: 7 }, { port_matcher: '65536' }])
      assert.throws(() => read({ http: { routes: [{ backend_name: 'one', ...bad }] } }, {}), /expected/);
  });

  for (const [name, service, namespace, port] of [
    ['svc', 'svc', 'default', undefined],
    ['svc:', 'svc', 'default', undefined],
    ['svc:http', 'svc', 'default', 'http'],
    ['svc.ns', 'svc', 'ns', undefined],
    ['svc.ns:8080', 'svc', 'ns', '8080'],
    ['svc.ns.svc.cluster.local:http-1', 'svc', 'ns', 'http-1'],
    ['my-svc.my-ns.any.suffix.at.all', 'my-svc', 'my-ns', undefined],
  ] as const)
    it(`name a Service as ${name}`, () => {
      const backend = { name: 'one', k8s: { dns_port_name: name } };
      const { k8s } = read({}, { http: { backends: [backend] } }).http.backends.get('one')!;
      assert.deepEqual(k8s, { service, namespace, port });
    });

  for (const name of ['', 'k8s://svc', 'svc:a:b', '.ns'])
    it(`do not name a Service as "${name}"`, () => {
      const backend = { name: 'one', k8s: { dns_port_name: name } };
      assert.throws(() => read({}, { http: { backends: [backend] } }), /expected service\.namespace:port/);
    });

  it('may have a route without a backend: that one answers no-backend, the others serve', async (t) => {
    const director = { http: { routes: [{ backend_name: 'nobody', host_matcher: 'nobody.us1' }] } };
    const processes = await kedgeProcesses(t, { director, backendPool: {} });
    const kedge = await processes.start('any');
    assert.match(kedge.output, /no backend is called "nobody"/);
    const route = { kedge: `https://127.0.0.1:${kedge.ready.port}` };
    const dialer = createDialer({ mapper: single(route), identity: processes.identity });
    t.after(() => dialer.destroy());
    const answer = await dialer.fetch('http://nobody.us1/');
    assert.deepEqual([answer.status, answer.headers.get('x-kedge-error-type')], [502, 'no-backend']);
    assert.equal((await dialer.fetch('http://x.us1/')).headers.get('x-kedge-error-type'), 'no-route');
    writeFileSync(join(processes.folder, 'kedge_config_director_config_path'), '{}');
    for (let i = 0; i < 100 && !/reloaded/.test(kedge.output); i += 1) await new Promise((r) => setTimeout(r, 30));
    assert.match(kedge.output, /configuration reloaded/);
  });
});
