import assert from 'node:assert/strict';
import { once } from 'node:events';
import { describe, it } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { Metadata } from '@grpc/grpc-js';
import * as undici from 'undici';
import { connectDialer } from '../../src/connectrpc/index.ts';
import { grpcDialer } from '../../src/grpc/index.ts';
import { single } from '../../src/index.ts';
import { echoClient } from '../helpers/grpc-kedge.ts';
import { KEDGE_NAME, startKedge } from '../helpers/kedge.ts';
import { startRawKedge } from '../helpers/raw-kedge.ts';
import { until } from '../helpers/until.ts';

const TARGET = 'http://orders.us1:8080';

describe('what calls leave behind that were given up', () => {
  for (const protocol of ['h1', 'h2'] as const) {
    it(`a connection that nobody wants any more is not kept: ${protocol}`, async (t) => {
      const kedge = await startKedge(t);
      const dialer = kedge.dialer({ http: { protocol } });
      const abort = new AbortController();
      const call = undici.request(TARGET, { dispatcher: dialer.dispatcher as never, signal: abort.signal });
      abort.abort();
      await assert.rejects(call);
      await until('the connection holds the process', () => kedge.handshakes === 1 && kedge.sockets.size === 0, 2_000);
    });
  }

  it('a POST does not meet the connection that was dialled for an aborted call and closed since', async (t) => {
    const kedge = await startKedge(t);
    const dialer = kedge.dialer({ http: { protocol: 'h2' } });
    const abort = new AbortController();
    const call = undici.request(TARGET, { dispatcher: dialer.dispatcher as never, signal: abort.signal });
    abort.abort();
    await assert.rejects(call);
    await until('no connection', () => kedge.handshakes === 1, 2_000);
    await sleep(50);
    for (const socket of kedge.sockets) socket.end();
    await sleep(100);
    const answer = await undici.request(TARGET, { dispatcher: dialer.dispatcher as never, method: 'POST', body: 'x' });
    assert.equal(answer.statusCode, 200);
    await answer.body.dump();
  });

  describe('a kedge that allows no streams, with SETTINGS_MAX_CONCURRENT_STREAMS 0', () => {
    const soon = async (closed: Promise<void>) =>
      assert.equal(await Promise.race([closed.then(() => 'closed'), sleep(3000, 'waits')]), 'closed');

    it('http: close() does not wait for calls that are over', async (t) => {
      const kedge = await startKedge(t, { settings: { maxConcurrentStreams: 0 } });
      const dialer = kedge.dialer({ http: { protocol: 'h2' } });
      const calls = [1, 2, 3].map(() =>
        undici.request(TARGET, { dispatcher: dialer.dispatcher as never, signal: AbortSignal.timeout(300) }),
      );
      for (const call of calls) await assert.rejects(call);
      await soon(dialer.close());
    });

    it('grpc: a call that is over has no connection', async (t) => {
      const kedge = await startKedge(t, { settings: { maxConcurrentStreams: 0 } });
      const dialer = kedge.dialer();
      const client = new (grpcDialer(dialer).wrap(echoClient()))('orders.us1:8080', undefined as never);
      const { promise, resolve } = Promise.withResolvers<unknown>();
      client.unary({ text: 'a' }, new Metadata(), { deadline: Date.now() + 300 }, resolve);
      assert.equal(((await promise) as { code: number }).code, 4);
      await until(
        'its stream counts for ever',
        () => dialer.stats().kedges.every(({ inFlight }) => inFlight === 0),
        2_000,
      );
      client.close();
      await soon(dialer.close());
    });

    it('connect-es: a stream that its caller closes is over', async (t) => {
      const kedge = await startKedge(t, { settings: { maxConcurrentStreams: 0 } });
      const dialer = kedge.dialer();
      const manager = connectDialer(dialer).sessionManager(TARGET);
      const stream = await manager.request('POST', '/a.B/C', { 'content-type': 'application/grpc' });
      stream.on('error', () => {});
      await sleep(100);
      stream.close(8);
      await once(stream, 'close', { signal: AbortSignal.timeout(3000) });
      assert.equal(dialer.stats().inFlight, 0);
      await soon(dialer.close());
    });
  });

  it('calls that wait for a kedge which is silent behind TLS move on together', async (t) => {
    const kedge = await startKedge(t);
    const silent = await startRawKedge(t, 'h2', (socket) => socket.resume());
    const mapper = single({ kedge: [silent.url, kedge.url], serverName: KEDGE_NAME });
    const dialer = kedge.dialer({
      mapper,
      http: { protocol: 'h2', pingIntervalMs: 200 },
      failover: { retryBudget: 1 },
    });
    const calls = Array.from({ length: 40 }, () => undici.request(TARGET, { dispatcher: dialer.dispatcher as never }));
    for (const call of calls) await (await call).body.dump();
    // 40 calls, one for each connection before its SETTINGS, on 4 connections at a time.
    assert.ok(silent.connections <= 8, `${silent.connections} connections were tried one after the other`);
  });
});
