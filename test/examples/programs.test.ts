import assert from 'node:assert/strict';
import { once } from 'node:events';
import { readdirSync, writeFileSync } from 'node:fs';
import http from 'node:http';
import type { AddressInfo } from 'node:net';
import { join } from 'node:path';
import { describe, it } from 'node:test';
import type * as grpc from '@grpc/grpc-js';
import { GreeterService, type Hello } from '../../examples/grpc/greeter.ts';
import { createDialer, single } from '../../src/index.ts';
import { startGrpcKedge } from '../helpers/grpc-kedge.ts';
import { KEDGE_NAME, startKedge, type TestKedge } from '../helpers/kedge.ts';
import { runNode } from '../helpers/process.ts';
import { kedgeProcesses } from '../helpers/reference-kedge.ts';
import { tempDir } from '../helpers/temp.ts';

const greet = (server: grpc.Server) =>
  server.addService(GreeterService, {
    sayHello: (call: grpc.ServerUnaryCall<Hello, unknown>, callback: grpc.sendUnaryData<unknown>) =>
      callback(null, { text: `Hello ${call.request.name}` }),
    chat: () => {},
  });

describe('the examples', () => {
  const programs: [string, string, RegExp][] = [
    ['examples/http/main.ts', 'http://orders.us1:8080/', /^200 .*"authority":"orders\.us1:8080"/],
    ['examples/grpc/main.ts', 'greeter.us1:9090', /^Hello Ada/],
  ];
  for (const [program, target, expected] of programs) {
    it(`${program} does what it says`, async (t) => {
      const kedge: TestKedge = program.includes('grpc')
        ? await startGrpcKedge(t, { addServices: greet })
        : await startKedge(t);
      const folder = await tempDir(t);
      const file = (name: string, content: string) => {
        writeFileSync(join(folder, name), content);
        return join(folder, name);
      };
      const { status, out } = await runNode([program, target], {
        env: {
          KEDGE: kedge.url,
          SERVER_NAME: KEDGE_NAME,
          CERT: file('tls.crt', kedge.client.cert),
          KEY: file('tls.key', kedge.client.key),
          CA: file('ca.crt', kedge.ca.cert),
        },
      });
      assert.equal(status, 0, out);
      assert.match(out, expected);
    });
  }

  it('the demo checks every answer and leaves nothing behind', async (t) => {
    const folder = await tempDir(t);
    const { status, out } = await runNode(['examples/demo/main.ts'], { env: { TMPDIR: folder } });
    assert.equal(status, 0, out);
    assert.match(out.trim(), /\ndemo: 13 calls, 0 failed, 4 TLS handshakes$/);
    assert.equal(out.match(/CN=checkout/g)?.length, 12);
    assert.deepEqual(readdirSync(folder), []);
  });

  it('the kedge refuses to start on wrong flags', async () => {
    assert.match((await runNode(['examples/kedge/main.ts', '--no_such_flag'])).out, /^kedge: Unknown option/);
    const { status, out } = await runNode([
      'examples/kedge/main.ts',
      '--server_tls_cert_file=x',
      '--server_tls_key_file=x',
    ]);
    assert.equal(status, 2);
    assert.match(out, /--server_tls_client_ca_files is required/);
    const missing = ['cert', 'key'].map((each) => `--server_tls_${each}_file=/nowhere/${each}`);
    const flags = [...missing, '--server_tls_client_ca_files=/nowhere/ca', '--server_http_tls_port=any'];
    const empty = ['director', 'backendpool'].map((each) => `--kedge_config_${each}_config={}`);
    assert.match(
      (await runNode(['examples/kedge/main.ts', ...flags, ...empty])).out,
      /^kedge: --server_tls_cert_file: \/nowhere\/cert cannot be read \(ENOENT\)$/m,
    );
  });

  it('the kedge finishes what is under way on SIGTERM, and exits', async (t) => {
    const arrived = Promise.withResolvers<void>();
    const release = Promise.withResolvers<void>();
    const backend = http
      .createServer(async (_request, response) => {
        arrived.resolve();
        await release.promise;
        response.end('whole');
      })
      .listen(0, '127.0.0.1');
    t.after(() => backend.close());
    await once(backend, 'listening');
    const host = { dns_name: '127.0.0.1', port: (backend.address() as AddressInfo).port };
    const { start, identity } = await kedgeProcesses(t, {
      director: { http: { routes: [{ backend_name: 'orders' }] } },
      backendPool: { http: { backends: [{ name: 'orders', host }] } },
    });
    const kedge = await start('any');
    const dialer = createDialer({
      mapper: single({ kedge: `https://127.0.0.1:${kedge.ready.port}`, serverName: KEDGE_NAME }),
      identity,
    });
    t.after(() => dialer.destroy());
    const call = dialer.fetch('http://orders.us1/');
    await arrived.promise;
    process.kill(kedge.pid, 'SIGTERM');
    setTimeout(release.resolve, 200);
    assert.equal(await (await call).text(), 'whole');
    assert.deepEqual(await kedge.exited, { code: 0, signal: null });
  });
});
