import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { describe, it } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { type Identity, pem, single } from '../../src/index.ts';
import { type Seen, startKedge } from '../helpers/kedge.ts';

describe('more kedges than maxKedges', () => {
  it('drain and are never cut', async (t) => {
    const release = Promise.withResolvers<void>();
    const slow = async (_request: unknown, response: { end(text: string): unknown }) => {
      await release.promise;
      response.end('whole');
    };
    const [one, two] = await Promise.all([
      startKedge(t, { handler: slow as never }),
      startKedge(t, { handler: slow as never }),
    ]);
    const routes = { one: single(one.route()), two: single(two.route()) };
    const dialer = one.dialer({
      maxKedges: 1,
      mapper: (target) => (target.hostname.endsWith('.one') ? routes.one : routes.two)(target),
    });
    const calls = Array.from({ length: 20 }, async (_, i) => {
      await sleep(i * 5);
      return (await dialer.fetch(`http://a.${i % 2 ? 'one' : 'two'}/`)).text();
    });
    await sleep(150);
    assert.ok(dialer.stats().kedges.length > 1, 'the evicted ones drain');
    release.resolve();
    assert.deepEqual(await Promise.all(calls), Array(20).fill('whole'));
    await sleep(20);
    assert.equal(dialer.stats().kedges.length, 1);
    assert.equal(dialer.stats().handshakes, one.handshakes + two.handshakes);
  });
});

describe('a rotated identity', () => {
  it('is shown on new connections at once, never resumed, and costs no call', async (t) => {
    const kedge = await startKedge(t);
    const certificates = await Promise.all(Array.from({ length: 4 }, () => kedge.ca.issue({ cn: 'pod' })));
    const snapshots = certificates.map(({ cert, key }) => pem({ cert, key, ca: kedge.ca.cert }).current());
    let current = 0;
    const listeners = new Set<() => void>();
    const identity: Identity = {
      current: () => snapshots[current]!,
      subscribe: (listener) => {
        listeners.add(listener);
        return () => listeners.delete(listener);
      },
    };
    const dialer = kedge.dialer({ identity });
    let running = true;
    let calls = 0;
    const load = Array.from({ length: 10 }, async () => {
      while (running) {
        const response = await dialer.fetch('http://a.us1/', { method: 'POST', body: 'x' });
        await response.json();
        calls += 1;
      }
    });
    while (current < 3) {
      await sleep(100);
      current += 1;
      for (const listener of listeners) listener();
      const seen = (await (await dialer.fetch('http://a.us1/')).json()) as Seen;
      assert.equal(seen.clientSerial, certificates[current]!.serial);
      assert.equal(seen.resumed, false);
    }
    running = false;
    await Promise.all(load);
    assert.ok(calls > 50, `${calls} calls`);
    await sleep(20);
    const [stats] = dialer.stats().kedges;
    assert.equal(stats!.generation, 4);
    assert.equal(kedge.sockets.size, stats!.connections);
    await dialer.close();
    assert.equal(listeners.size, 0);
  });
});

describe('DEBUG=kedge:*', () => {
  it('shows the way of an HTTP and a gRPC call, without secrets', async (t) => {
    const { startGrpcKedge } = await import('../helpers/grpc-kedge.ts');
    const kedge = await startKedge(t);
    const grpcKedge = await startGrpcKedge(t);
    const src = (path: string) => JSON.stringify(new URL(`../../src/${path}`, import.meta.url).href);
    const code = `
      import * as grpc from '@grpc/grpc-js';
      import { createDialer, firstMatch, hosts, pem, staticToken } from ${src('index.ts')};
      import { grpcDialer } from ${src('grpc/index.ts')};
      const { echoClient, unary } = await import(${JSON.stringify(new URL('../helpers/grpc-kedge.ts', import.meta.url).href)});
      const { cert, key, ca, http, rpc } = JSON.parse(process.argv[1]);
      const proxyAuth = staticToken('top-secret');
      const mapper = hosts({ 'a.us1': { ...http, proxyAuth }, 'b.us1': { ...rpc, proxyAuth } });
      const dialer = createDialer({ mapper, identity: pem({ cert, key, ca }) });
      await (await dialer.fetch('http://a.us1/')).text();
      const client = new (grpcDialer(dialer).wrap(echoClient()))('b.us1:9090');
      await unary(client, 'hi');
      await dialer.close();
    `;
    const init = {
      cert: kedge.client.cert,
      key: kedge.client.key,
      ca: kedge.ca.cert,
      http: kedge.route(),
      rpc: grpcKedge.route(),
    };
    const child = spawn(process.execPath, ['--input-type=module', '-e', code, JSON.stringify(init)], {
      cwd: new URL('../..', import.meta.url),
      env: { ...process.env, DEBUG: 'kedge:*', NODE_OPTIONS: '' },
    });
    let log = '';
    child.stderr.on('data', (chunk) => {
      log += chunk;
    });
    const [status] = await new Promise<[number | null]>((resolve) => child.on('exit', (exit) => resolve([exit])));
    assert.equal(status, 0, log);
    const way = [
      /kedge:map http a\.us1 -> 127\.0\.0\.1:\d+/,
      /kedge:http GET a\.us1 -> kedge 127/,
      /kedge:dial 127\.0\.0\.1:\d+: connecting/,
      /kedge:dial 127\.0\.0\.1:\d+: tls TLSv1\.3, h2/,
      /kedge:http GET a\.us1 <- 200/,
      /kedge:map grpc b\.us1:9090 -> 127/,
      /kedge:grpc b\.us1:9090\/test\.Echo\/Unary -> kedge 127/,
      /kedge:grpc b\.us1:9090\/test\.Echo\/Unary <- OK/,
    ];
    let from = 0;
    for (const line of way) {
      const at = log.slice(from).search(line);
      assert.notEqual(at, -1, `${line} is missing or out of order in:\n${log}`);
      from += at;
    }
    assert.doesNotMatch(log, /secret|PRIVATE KEY/);
  });
});
