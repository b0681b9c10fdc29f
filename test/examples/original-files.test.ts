import assert from 'node:assert/strict';
import { once } from 'node:events';
import { writeFileSync } from 'node:fs';
import http from 'node:http';
import type { AddressInfo } from 'node:net';
import { join } from 'node:path';
import { before, describe, it, type TestContext } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import * as grpc from '@grpc/grpc-js';
import { type BackendConfig, type Config, readConfig } from '../../examples/kedge/config.ts';
import { routeGrpc, routeHttp, splitAuthority } from '../../examples/kedge/director.ts';
import { createDialer, loadWinchConfig, parseTarget, single } from '../../src/index.ts';
import { echoClient, startEchoServer, unary } from '../helpers/grpc-kedge.ts';
import { authority, KEDGE_NAME } from '../helpers/kedge.ts';
import { startNamedBackend } from '../helpers/named-backend.ts';
import { runNode, spawnNode } from '../helpers/process.ts';
import { kedgeProcesses } from '../helpers/reference-kedge.ts';
import { tempDir } from '../helpers/temp.ts';
import { ApiServer, sliceOf } from './api-server.ts';
import { vectors } from './vectors/read.ts';

type Wire = 'http' | 'grpc';

/** The two files are looked at one after the other. */
const RELOADED_MS = 1_000;

interface Request {
  wire: Wire;
  target: string;
  path?: string;
  headers?: Record<string, string>;
  /** Null: unknown route. */
  backend: string | null;
  /** In a real kedge its backend is there. */
  answered?: boolean;
  /** In a real kedge: this status, for it is a rule of adhoc that says no. */
  refused?: number;
}

interface KedgeFiles {
  of: string;
  director: object;
  pool: object;
  backends: Record<Wire, Record<string, Record<string, string>>>;
  requests: Request[];
}

interface WinchFiles {
  of: string;
  mapper: object;
  auth: object;
  targets: { wire: Wire; target: string; kedge: string | null; proxyAuth?: string; backendAuth?: string }[];
}

function backendOf({ http, grpc }: Config, { wire, target, path = '', headers = {} }: Request): string | null {
  const { host, port } = splitAuthority(target)!;
  const route =
    wire === 'http'
      ? routeHttp(http.routes, { host, port: port ?? 80, path: path || '/', headers, mode: 'REVERSE_PROXY' })
      : routeGrpc(grpc.routes, { host, port: port ?? 0, method: path || 'any.Service/Method', metadata: headers });
  return route?.backendName ?? null;
}

/** In the words of the vectors. */
function resolverOf({ host, srv, k8s }: BackendConfig): Record<string, string> {
  if (host !== undefined) return { host: `${host.dnsName}:${host.port}` };
  if (srv !== undefined) return { srv: srv.dnsName + (srv.portOverride === 0 ? '' : `:${srv.portOverride}`) };
  return { k8s: `${k8s!.service}.${k8s!.namespace}${k8s!.port === undefined ? '' : `:${k8s!.port}`}` };
}

describe("the original's files of kedges", () => {
  for (const { of, director, pool, backends, requests } of vectors<KedgeFiles[]>('kedge-files')) {
    it(`${of}: mean what they mean there`, () => {
      const config = readConfig(
        { file: 'director', text: JSON.stringify(director) },
        { file: 'pool', text: JSON.stringify(pool) },
      );
      for (const wire of ['http', 'grpc'] as const) {
        const found = [...config[wire].backends].map(([name, each]) => [name, resolverOf(each)]);
        assert.deepEqual(Object.fromEntries(found), backends[wire]);
      }
      for (const request of requests)
        assert.equal(backendOf(config, request), request.backend, JSON.stringify(request));
    });
  }

  it('run a kedge, which takes one after the other and routes by it', async (t) => {
    const api = await ApiServer.start(t);
    const port = await startNamedBackend(t, 'the backend');
    api.put('endpointslices', sliceOf('controller', 'default', { http: port }));
    api.put('endpointslices', sliceOf('web', 'shop', { 'pods-port': port }));
    const [first, ...others] = vectors<KedgeFiles[]>('kedge-files');
    const processes = await kedgeProcesses(t, { director: first!.director, backendPool: first!.pool });
    const kedge = await processes.start('any', [`--k8sclient_kubeconfig_path=${api.kubeconfig}`]);
    const route = { kedge: `https://127.0.0.1:${kedge.ready.port}`, serverName: KEDGE_NAME };
    const dialer = createDialer({ mapper: single(route), identity: processes.identity });
    t.after(() => dialer.destroy());
    const routes = async ({ requests }: KedgeFiles) => {
      for (const { wire, target, backend, answered, refused } of requests) {
        if (wire === 'grpc' || (backend !== null && answered !== true)) continue;
        const answer = await dialer.fetch(`http://${target}/`);
        const type = answer.headers.get('x-kedge-error-type');
        if (answered === true) assert.deepEqual([answer.status, await answer.text()], [200, 'the backend'], target);
        else assert.deepEqual([answer.status, refused ?? type], [refused ?? 502, refused ?? 'no-route'], target);
      }
    };
    await routes(first!);
    for (const files of others) {
      const reloads = kedge.output.split('configuration reloaded').length;
      // The routes last: with what came before they may name a backend that is not there.
      writeFileSync(join(processes.folder, 'kedge_config_backendpool_config_path'), JSON.stringify(files.pool));
      writeFileSync(join(processes.folder, 'kedge_config_director_config_path'), JSON.stringify(files.director));
      while (kedge.output.split('configuration reloaded').length === reloads) await sleep(50);
      await sleep(RELOADED_MS);
      assert.doesNotMatch(kedge.output, /refused/, files.of);
      await routes(files);
    }
  });
});

describe("the original's files of winch", () => {
  before(async () => {
    const { status, out } = await runNode(['node_modules/typescript/bin/tsc', '-p', '.']);
    assert.equal(status, 0, out);
  });

  const words = async (t: TestContext) => {
    const serviceAccount = join(await tempDir(t), 'service-account.json');
    const { key } = await (await authority()).issue({ cn: 'robot' });
    writeFileSync(
      serviceAccount,
      JSON.stringify({ type: 'service_account', client_email: 'robot@example.org', private_key: key }),
    );
    return { serviceAccount };
  };

  for (const [i, { of }] of vectors<WinchFiles[]>('winch-files').entries()) {
    it(`${of}: map what they map there`, async (t) => {
      const { mapper, auth, targets } = vectors<WinchFiles[]>('winch-files', await words(t))[i]!;
      const config = loadWinchConfig({ mapper, auth });
      for (const { wire, target, kedge, ...tokens } of targets) {
        const route = config.mapper(parseTarget(wire === 'http' ? `http://${target}` : target, { wire }));
        assert.equal(route?.kedges[0]?.href, kedge === null ? undefined : new URL(kedge).href, target);
        assert.equal(route?.proxyAuth?.name, tokens.proxyAuth, target);
        assert.equal(route?.backendAuth?.name, tokens.backendAuth, target);
      }
    });
  }

  it('start winch, all in one', async (t) => {
    const all = vectors<WinchFiles[]>('winch-files', await words(t));
    const join = (pick: (files: WinchFiles) => object) =>
      JSON.stringify(all.flatMap((files) => pick(files) as object[]));
    const winch = await spawnNode<{ port: number }>(t, 'examples/winch/main.ts', [
      '--server_http_port=any',
      '--server_grpc_port=any',
      `--server_mapper_config={"routes":${join(({ mapper }) => Object.values(mapper)[0])}}`,
      `--server_auth_config={"auth_sources":${join(({ auth }) => Object.values(auth)[0])}}`,
    ]);
    assert.equal((await fetch(`http://127.0.0.1:${winch.ready.port}/version`)).status, 200);
  });
});

interface EndToEnd {
  kedgeToken: string;
  backendTokens: Record<Wire, string>;
  calls: { backendWantsToken?: true; kedgeWantsToken?: true; wire: Wire; target: string; status: number }[];
}

describe("the original's end-to-end tests", () => {
  const { kedgeToken, backendTokens, calls } = vectors<EndToEnd>('end-to-end');
  const EchoClient = echoClient();

  for (const wanting of ['kedge', 'backend'] as const)
    it(`pass where the ${wanting} wants a token`, async (t) => {
      const isWanted = (wire: Wire, given: unknown) =>
        wanting === 'kedge' || String(given) === `Bearer ${backendTokens[wire]}`;
      const web = http
        .createServer((request, response) => {
          const name = new URL(request.url!, 'http://x').searchParams.get('name');
          response.writeHead(isWanted('http', request.headers.authorization) ? 200 : 401).end(`Hello ${name}!`);
        })
        .listen(0, '127.0.0.1');
      await once(web, 'listening');
      t.after(() => web.close().closeAllConnections());
      const rpc = await startEchoServer(t, {
        unary: ({ request, metadata }, callback) => {
          const [given] = metadata.get('authorization');
          if (isWanted('grpc', given)) callback(null, { text: `Hello ${request.text}!`, authority: '' });
          else callback({ code: grpc.status.UNAUTHENTICATED, details: 'wrong token' });
        },
      });
      const backendPorts = { http: (web.address() as AddressInfo).port, grpc: rpc.port };
      const at = (ports: Record<string, number>, value: object) =>
        JSON.parse(JSON.stringify(value).replace(/\b18\d{3}\b/g, (port) => String(ports[port])));

      const { director, pool } = vectors<KedgeFiles[]>('kedge-files')[0]!;
      const own = { 18270: backendPorts.http, 18271: backendPorts.grpc };
      const ca = await authority();
      const server = await ca.issue({ cn: 'localhost', dns: ['localhost'] });
      const client = await ca.issue({ cn: 'winch' });
      const processes = await kedgeProcesses(t, { director: at(own, director), backendPool: at(own, pool) });
      const dir = await tempDir(t);
      const file = (name: string, content: string | object) => {
        writeFileSync(join(dir, name), typeof content === 'string' ? content : JSON.stringify(content));
        return join(dir, name);
      };
      const kedge = await processes.start('any', [
        '--server_grpc_tls_port',
        'any',
        '--server_tls_cert_file',
        file('localhost.crt', server.cert),
        '--server_tls_key_file',
        file('localhost.key', server.key),
        '--server_tls_client_ca_files',
        file('ca.crt', ca.cert),
        '--server_tls_client_cert_required',
        'true',
        '--unsafe_bearer_token_proxy_auth',
        wanting === 'kedge' ? kedgeToken : '',
        '--log_level',
        'debug',
      ]);
      const { mapper, auth } = vectors<WinchFiles[]>('winch-files')[0]!;
      const kedgePorts = { 18171: kedge.ready.port, 18172: kedge.ready.grpcPort! };
      const winch = await spawnNode<{ port: number; grpcPort: number }>(t, 'examples/winch/main.ts', [
        '--server_http_port=any',
        '--server_grpc_port=any',
        '--server_mapper_config_path',
        file('winch_mapper.json', at(kedgePorts, mapper)),
        '--server_auth_config_path',
        file('winch_auth.json', auth),
        '--pac_redirect_sh_expressions',
        '*.*.internal.example.com',
        '--client_tls_cert_file',
        file('client.crt', client.cert),
        '--client_tls_key_file',
        file('client.key', client.key),
        '--client_tls_root_ca_files',
        join(dir, 'ca.crt'),
        '--debug_mode',
        'true',
      ]);
      for (const { wire, target, status, ...wants } of calls) {
        if (wants[`${wanting}WantsToken`] !== true) continue;
        if (wire === 'http') {
          const url = `http://${target}:${backendPorts.http}/?name=kedge`;
          const request = http.get({ port: winch.ready.port, path: url, headers: { host: new URL(url).host } });
          const [answer] = (await once(request, 'response')) as [http.IncomingMessage];
          const body = Buffer.concat(await answer.toArray()).toString();
          assert.equal(answer.statusCode, status, body);
          if (status === 200) assert.equal(body, 'Hello kedge!');
        } else {
          const stub = new EchoClient(`127.0.0.1:${winch.ready.grpcPort}`, grpc.credentials.createInsecure(), {
            'grpc.default_authority': `${target}:${backendPorts.grpc}`,
          });
          t.after(() => stub.close());
          if (status === 0) assert.equal((await unary(stub, 'kedge')).text, 'Hello kedge!');
          else await assert.rejects(unary(stub, 'kedge'), { code: status });
        }
      }
      const pac = await fetch(`http://127.0.0.1:${winch.ready.port}/wpad.dat`);
      assert.match(await pac.text(), /shExpMatch\(host, "\*\.\*\.internal\.example\.com"\)\)/);
    });
});
