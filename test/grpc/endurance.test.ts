import assert from 'node:assert/strict';
import { describe, it } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { grpcDialer } from '../../src/grpc/index.ts';
import { single, type TokenSource } from '../../src/index.ts';
import { echoClient, startGrpcKedge, unary } from '../helpers/grpc-kedge.ts';
import { rotating } from '../helpers/rotating.ts';

const EchoClient = echoClient();

describe('gRPC connections, for a while', () => {
  it('rotate every second for 20 s under load with asynchronous tokens', { timeout: 60_000 }, async (t) => {
    const kedge = await startGrpcKedge(t);
    const identity = rotating(kedge);
    const slow: TokenSource = { name: 'slow', peek: () => undefined, token: () => sleep(5, 'token') };
    const dialer = kedge.dialer({ identity, mapper: single(kedge.route({ proxyAuth: slow, backendAuth: slow })) });
    const client = new (grpcDialer(dialer).wrap(EchoClient))('greeter.us1:9090');
    let running = true;
    let calls = 0;
    // Any failure rejects, and fails the test.
    const load = Array.from({ length: 20 }, async () => {
      while (running) {
        await unary(client, 'x');
        calls += 1;
        await sleep(5);
      }
    });
    for (let i = 0; i < 20; i += 1) {
      const serial = await identity.rotate();
      const rotated = performance.now();
      while (kedge.connections.at(-1)?.clientSerial !== serial) {
        assert.ok(performance.now() - rotated < 1000, 'the kedge sees the new certificate within 1 s');
        await sleep(5);
      }
      await sleep(1000 - (performance.now() - rotated));
    }
    running = false;
    await Promise.all(load);
    assert.ok(calls > 1000, `${calls} calls`);
    assert.ok(kedge.connections.length >= 20 && kedge.connections.length <= 22, `${kedge.connections.length}`);
    assert.ok(kedge.connections.every(({ resumed }) => !resumed));
    t.diagnostic(`${calls} calls, ${kedge.connections.length} connections, 0 failed`);
    await dialer.close();
    assert.equal(identity.subscribers, 0);
  });
});
