import assert from 'node:assert/strict';
import { once } from 'node:events';
import http from 'node:http';
import type { AddressInfo } from 'node:net';
import { describe, it, type TestContext } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import * as grpc from '@grpc/grpc-js';
import { grpcDialer } from '../../src/grpc/index.ts';
import { createDialer, single, staticToken } from '../../src/index.ts';
import { echoClient, startEchoServer, unary } from '../helpers/grpc-kedge.ts';
import type { NodeProcess } from '../helpers/process.ts';
import { type KedgeReady, kedgeProcesses } from '../helpers/reference-kedge.ts';

const TRACE = '00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01';
const ASKED = { 'x-kedge-info-logs': 'winch-me', 'x-kedge-request-id': 'winch-1', traceparent: TRACE };

async function started(t: TestContext, ...flags: string[]) {
  const seen: http.IncomingHttpHeaders[] = [];
  const backend = http.createServer((request, response) => {
    seen.push(request.headers);
    request.resume();
    response.end('ok');
  });
  backend.listen(0, '127.0.0.1');
  await once(backend, 'listening');
  t.after(() => {
    backend.closeAllConnections();
    backend.close();
  });
  const { port } = backend.address() as AddressInfo;
  const { port: echo } = await startEchoServer(t);
  const director = {
    http: {
      routes: [
        { backend_name: 'closed', host_matcher: 'closed.us1', allowed_clients: ['CN=somebody-else'] },
        { backend_name: 'nowhere', host_matcher: 'nowhere.us1' },
        { backend_name: 'orders', host_matcher: 'orders.us1' },
      ],
    },
    grpc: { routes: [{ backend_name: 'echo', service_name_matcher: 'test.*' }] },
  };
  const host = (dns_name: string, own: number) => ({ host: { dns_name, port: own } });
  const backendPool = {
    http: {
      backends: [
        { name: 'orders', ...host('127.0.0.1', port) },
        { name: 'nowhere', ...host('127.0.0.1', 1) },
      ],
    },
    grpc: { backends: [{ name: 'echo', ...host('127.0.0.1', echo) }] },
  };
  const processes = await kedgeProcesses(t, { director, backendPool });
  const kedge = await processes.start('any', ['--server_http_port=any', ...flags]);
  const dial = (token?: string, protocol: 'h1' | 'h2' = 'h2') => {
    const route = { kedge: `https://127.0.0.1:${kedge.ready.port}` };
    const mapper = single(token === undefined ? route : { ...route, proxyAuth: staticToken(token) });
    const dialer = createDialer({ mapper, identity: processes.identity, http: { protocol } });
    t.after(() => dialer.destroy());
    return dialer;
  };
  const get = async (url: string, headers = {}, dialer = dial()) => {
    const response = await dialer.fetch(url, { headers });
    await response.text();
    return response.status;
  };
  const debug = async (path: string, headers = {}) =>
    fetch(`http://127.0.0.1:${kedge.ready.debugPort}${path}`, { headers });
  return { kedge, dial, get, debug, seen, port, echo };
}

/** The lines that are there when it has said nothing for a while. */
async function linesOf(kedge: NodeProcess<KedgeReady>, count: number): Promise<Record<string, unknown>[]> {
  const lines = () => kedge.output.split('\n').filter((line) => line.startsWith('{"time"'));
  for (let i = 0; i < 100 && lines().length < count; i += 1) await sleep(30);
  await sleep(100);
  return lines().map((line) => JSON.parse(line) as Record<string, unknown>);
}

describe('the access log of the reference kedge', () => {
  it('has a line for a request that asks for it, on every wire, and passes its trace on', async (t) => {
    const { kedge, get, dial, seen, port, echo } = await started(t);
    assert.equal(await get('http://orders.us1/'), 200);
    assert.equal(await get('http://orders.us1/a/b?secret=1', ASKED), 200);
    assert.equal(await get('http://orders.us1/c', ASKED, dial(undefined, 'h1')), 200);
    const metadata = new grpc.Metadata();
    for (const [name, value] of Object.entries(ASKED)) metadata.set(name, value);
    const client = new (grpcDialer(dial()).wrap(echoClient()))('echo.us1:1');
    await unary(client, 'x', metadata);
    const lines = await linesOf(kedge, 3);
    assert.equal(lines.length, 3, kedge.output);
    const common = {
      level: 'info',
      msg: 'request proxied',
      client: 'CN=pod',
      traceparent: TRACE,
      info_logs: 'winch-me',
    };
    const wanted = [
      {
        wire: 'h2',
        method: 'GET',
        target: 'orders.us1',
        path: '/a/b',
        status: 200,
        backend: 'orders',
        address: `127.0.0.1:${port}`,
      },
      {
        wire: 'http/1.1',
        method: 'GET',
        target: 'orders.us1',
        path: '/c',
        status: 200,
        backend: 'orders',
        address: `127.0.0.1:${port}`,
      },
      {
        wire: 'grpc',
        method: 'POST',
        target: 'echo.us1:1',
        path: '/test.Echo/Unary',
        status: 0,
        backend: 'echo',
        address: `127.0.0.1:${echo}`,
      },
    ];
    for (const [i, { time, ms, request_id: id, ...line }] of lines.entries()) {
      assert.deepEqual(line, { ...wanted[i], ...common });
      assert.equal(id, 'winch-1');
      assert.ok(Math.abs(Date.parse(String(time)) - Date.now()) < 60_000 && Number(ms) > 0 && Number(ms) < 60_000);
    }
    for (const headers of seen.slice(1)) {
      assert.equal(headers['traceparent'], TRACE);
      assert.equal(headers['x-kedge-request-id'], 'winch-1');
    }
  });

  it('says as an error why a request that asks for it went nowhere, and nothing of callers that may not come in', async (t) => {
    const { kedge, dial, get } = await started(t, '--unsafe_bearer_token_proxy_auth=good', '--log_level=error');
    const known = dial('good');
    assert.equal(await get('http://orders.us1/', ASKED, known), 200);
    assert.equal(await get('http://nowhere.us1/', ASKED, known), 502);
    assert.equal(await get('http://closed.us1/', ASKED, known), 403);
    await get('http://orders.us1/', ASKED).catch(() => 0);
    await get('http://orders.us1/', ASKED, dial('bad')).catch(() => 0);
    const lines = await linesOf(kedge, 1);
    assert.deepEqual(
      lines.map((line) => [line['level'], line['msg'], line['target'], line['status'], line['error_type']]),
      [['error', 'request not proxied', 'nowhere.us1', 502, 'no-connection-to-all-resolved-addresses']],
    );
    assert.doesNotMatch(kedge.output, /good|bad/, 'no token');
  });

  it('has every request while debugging, whoever asks, in one line each', async (t) => {
    const { kedge, get } = await started(t, '--log_level=debug');
    assert.equal(await get('http://orders.us1/'), 200);
    assert.equal(await get('http://closed.us1/'), 403);
    assert.equal(await get(`http://orders.us1/${'x'.repeat(2000)}`, { traceparent: `"}\t${'y'.repeat(3000)}` }), 200);
    const lines = await linesOf(kedge, 3);
    assert.deepEqual(
      lines.map((line) => [line['level'], line['status'], String(line['path']).length, line['error_type']]),
      [
        ['debug', 200, 1, undefined],
        ['debug', 403, 1, 'unauthorized'],
        ['debug', 200, 256, undefined],
      ],
    );
    assert.equal(String(lines[2]!['traceparent']).length, 256);
    const last = get('http://orders.us1/last');
    await sleep(200);
    await kedge.stop();
    assert.equal(await last, 200);
    assert.equal((await linesOf(kedge, 4)).at(-1)!['path'], '/last', 'nor is one lost at the end');
  });
});

describe('the debug pages of the reference kedge', () => {
  it("have the original's counters beside ours", async (t) => {
    const { get, dial, debug, port } = await started(t);
    assert.equal(await get('http://orders.us1/'), 200);
    assert.equal(await get('http://nowhere.us1/'), 502);
    assert.equal(await get('http://unknown.us1/'), 502);
    const client = new (grpcDialer(dial()).wrap(echoClient()))('echo.us1:1');
    await unary(client, 'x');
    client.close();
    const wanted = [
      'kedge_requests_total{wire="h2",status="200"} 1',
      'kedge_requests_total{wire="grpc",status="0"} 1',
      'kedge_proxy_errors_total{backend_name="nowhere",type="no-connection-to-all-resolved-addresses"} 1',
      'kedge_proxy_errors_total{backend_name="",type="no-route"} 1',
      'kedge_http_backend_configuration_changes_total{backend_name="orders",action="create"} 1',
      'kedge_grpc_backend_configuration_changes_total{backend_name="echo",action="create"} 1',
      'kedge_http_lbtransport_failed_dials{resolve_addr="nowhere",target="127.0.0.1:1"} 1',
      'http_handler_started_requests_total{method="GET"} 3',
      'http_handler_completed_requests_total{method="GET",status="200"} 1',
      'http_handler_completed_requests_total{method="GET",status="502"} 2',
      'grpc_server_started_total{grpc_type="bidi_stream",grpc_service="test.Echo",grpc_method="Unary"} 1',
      'grpc_server_handled_total{grpc_type="bidi_stream",grpc_service="test.Echo",grpc_method="Unary",grpc_code="OK"} 1',
      'net_conntrack_dialer_conn_established_total{dialer_name="http_backend_orders"} 1',
      'kedge_host_resolver_resolutions_attempts_total 3',
    ];
    let text = '';
    for (let i = 0; i < 50 && !text.includes(wanted[5]!); i += 1) text = await (await debug('/metrics')).text();
    for (const each of wanted) assert.ok(text.includes(`${each}\n`), `${each}\n${text}`);
    assert.match(text, /^net_conntrack_listener_conn_accepted_total\{listener_name="http_tls"\} [1-9]/m);
    assert.match(
      text,
      /^net_conntrack_dialer_conn_failed_total\{dialer_name="http_backend_nowhere",reason="refused"\} [1-9]/m,
    );
    assert.ok(port > 0);
  });

  it('show its flags without secrets, and what it serves at the moment', async (t) => {
    const { debug } = await started(
      t,
      '--unsafe_bearer_token_proxy_auth=hush',
      '--server_enable_oidc_for_debug_endpoints',
    );
    for (const path of ['/debug/flagz', '/debug/routes', '/metrics', '/_version'])
      assert.equal((await debug(path)).status, 401, path);
    const authorization = 'Bearer hush';
    const flagz = await (await debug('/debug/flagz', { authorization })).text();
    assert.doesNotMatch(flagz, /hush/);
    const { flags } = JSON.parse(flagz) as { flags: { name: string; current_value: string; is_changed: boolean }[] };
    const flag = (name: string) => flags.find((each) => each.name === name)!;
    assert.equal(flag('unsafe_bearer_token_proxy_auth').is_changed, true);
    assert.equal(flag('server_metrics_path').current_value, '/metrics');
    assert.equal(flag('server_metrics_path').is_changed, false);
    type Routes = { http: { routes: { hostMatcher: string }[]; backends: { name: string }[] } };
    const { http: wire } = (await (await debug('/debug/routes', { authorization })).json()) as Routes;
    assert.deepEqual(
      wire.routes.map(({ hostMatcher }) => hostMatcher),
      ['closed.us1', 'nowhere.us1', 'orders.us1'],
    );
    assert.deepEqual(wire.backends.map(({ name }) => name).sort(), ['nowhere', 'orders']);
  });
});
