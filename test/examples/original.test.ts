import assert from 'node:assert/strict';
import { writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, it } from 'node:test';
import { helpOf, readFlags } from '../../examples/flags.ts';
import { readConfig } from '../../examples/kedge/config.ts';
import { createDialer, single } from '../../src/index.ts';
import { KEDGE_NAME } from '../helpers/kedge.ts';
import { runNode, spawnNode } from '../helpers/process.ts';
import { kedgeProcesses } from '../helpers/reference-kedge.ts';
import { ApiServer } from './api-server.ts';

/** Flags of the original kedge beyond ports and files, each with a value of its own documentation or help. */
const KEDGE_FLAGS = [
  'server_bind_address=127.0.0.1',
  'server_metrics_path=/m',
  'server_http_max_write_timeout=10s',
  'server_http_max_read_timeout=10s',
  'server_tracing_grpc_enabled',
  'server_sigterm_timeout=40s',
  'server_tls_client_cert_required=T',
  'server_enable_oidc_for_debug_endpoints',
  'unsafe_bearer_token_proxy_auth=t',
  'log_level=debug',
  'log_backend_resolution_on_addition',
  'logstash_hostport=127.0.0.1:1',
  'logstash_log_tags=a,b',
  'logstash_write_buffer_size=5000',
  'logstash_write_timeout=2s',
  'http_reverseproxy_buffer_size_bytes=32768',
  'http_reverseproxy_buffer_count=2048',
  'http_reverseproxy_flushing_interval=10ms',
  'lbtransport_failed_target_backoff_duration=2s',
  'lbtransport_trial_dial_timeout=500ms',
  'k8sresolver_first_update_timouet=300ms',
  'k8sresolver_resync_timouet=30m0s',
  'k8sclient_auth_timeout=10s',
  'k8sclient_tls_insecure',
];

const WINCH_FLAGS = [
  'client_insecure',
  'debug-mode',
  'log_level=warning',
  'server_auth_timeout=10s',
  'server_http_max_read_timeout=15s',
  'server_http_max_write_timeout=15s',
  'server_metrics_path=/m',
  'winch_reverseproxy_buffer_count=2048',
  'winch_reverseproxy_buffer_size_bytes=32768',
  'winch_reverseproxy_flushing_interval=10ms',
  'cors_allowed_origin=http://a.test',
  'cors_allowed_origin=http://b.test',
];

describe("what the original's documentation starts", () => {
  it('starts the kedge with every flag, bare ones too, and says why some mean nothing', async (t) => {
    const api = await ApiServer.start(t);
    const folder = join(api.kubeconfig, '..');
    const processes = await kedgeProcesses(t, { director: {}, backendPool: {} });
    const kedge = await processes.start('any', [
      ...KEDGE_FLAGS.map((each) => `--${each}`),
      '--server_grpc_tls_port=any',
      '--server_http_port=any',
      `--k8sclient_kubeapi_url=${api.url}`,
      `--k8sclient_ca_file=${folder}/ca.crt`,
      `--k8client_token_file=${folder}/token`,
    ]);
    const debug = (path: string, headers = {}) =>
      fetch(`http://127.0.0.1:${kedge.ready.debugPort}${path}`, { headers });
    assert.equal((await debug('/_healthz')).status, 200, 'probes bring no token');
    assert.equal((await debug('/m')).status, 401);
    const mine = await debug('/m', { authorization: 'Bearer t' });
    assert.match(await mine.text(), /kedge_connections/);
    assert.equal((await debug('/metrics', { authorization: 'Bearer t' })).status, 404);
    assert.equal(kedge.output.match(/--\w+ is ignored: \w+/g)?.length, 16);
  });

  it('starts winch with every flag, and shows its metrics at the address that is for them', async (t) => {
    const mapper = JSON.stringify({ routes: [{ direct: { key: 'a.test:80', url: `https://${KEDGE_NAME}` } }] });
    const port = 20_000 + (process.pid % 20_000);
    const winch = await spawnNode<{ port: number }>(t, 'examples/winch/main.ts', [
      '--server_http_port=any',
      '--server_grpc_port=any',
      `--server_mapper_config=${mapper}`,
      `--server_http_monitoring_address=127.0.0.1:${port}`,
      ...WINCH_FLAGS.map((each) => `--${each}`),
    ]);
    assert.match(await (await fetch(`http://127.0.0.1:${port}/m`)).text(), /winch_requests_total/);
    assert.equal((await fetch(`http://127.0.0.1:${port}/winch/cleartoken/x`)).status, 404);
    assert.match(await (await fetch(`http://127.0.0.1:${winch.ready.port}/m`)).text(), /winch_requests_total/);
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

  it('says in --help what every flag is', async () => {
    for (const [program, flags] of [
      ['kedge', KEDGE_FLAGS],
      ['winch', WINCH_FLAGS],
    ] as const) {
      const { status, out } = await runNode([`examples/${program}/main.ts`, '--help']);
      assert.equal(status, 0, out);
      for (const flag of flags)
        assert.match(out, new RegExp(`^ {2}--${flag.split('=')[0]!.replaceAll('-', '_')}[=:]`, 'm'), flag);
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

  for (const name of ['', 'k8s://svc', 'svc:a:b', '.ns', 'svc:'])
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
