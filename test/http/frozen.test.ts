import assert from 'node:assert/strict';
import { subscribe, unsubscribe } from 'node:diagnostics_channel';
import http from 'node:http';
import type http2 from 'node:http2';
import type { AddressInfo } from 'node:net';
import { describe, it, type TestContext } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import * as undici from 'undici';
import { createDialer, single } from '../../src/index.ts';
import { Relay } from '../chaos/relay.ts';
import { KEDGE_NAME, type KedgeHandler, startKedge, type TestKedge } from '../helpers/kedge.ts';
import { kedgeProcesses } from '../helpers/reference-kedge.ts';

const TARGET = 'http://orders.us1:8080/';
const MIB = 1024 * 1024;
/** Ten times as often as by default, so that everything here is ten times as fast. */
const INTERVAL_MS = 200;

async function relayed(t: TestContext, kedge: TestKedge) {
  const relay = await new Relay(kedge.port).listen();
  t.after(() => relay.close());
  const { dispatcher } = kedge.dialer({
    mapper: single(kedge.route({ kedge: relay.url })),
    http: { protocol: 'h2', pingIntervalMs: INTERVAL_MS, connections: 1 },
  });
  return { relay, dispatcher };
}

/** Answers with what a backend says now and what it says 1.5 s later; after the first half `then` happens. */
function halves(then: (session: http2.Http2Session) => void): KedgeHandler {
  return (request, response) => {
    const { stream } = request as http2.Http2ServerRequest;
    stream.on('error', () => {});
    stream.respond();
    stream.write('first ');
    setTimeout(() => then(stream.session!), 50);
    setTimeout(() => response.end('second'), 1500);
  };
}

describe('an HTTP/2 answer', () => {
  it('outlives the GOAWAY of its kedge, however long it is silent', async (t) => {
    const kedge = await startKedge(t, { handler: halves((session) => session.close()) });
    const { dispatcher } = await relayed(t, kedge);
    for (let i = 0; i < 2; i += 1) {
      const { body } = await undici.request(TARGET, { dispatcher });
      assert.equal(await body.text(), 'first second');
    }
    assert.equal(kedge.handshakes, 2);
  });

  it('fails soon where its connection freezes, draining or not', async (t) => {
    for (const drains of [false, true]) {
      const kedge = await startKedge(t, { handler: halves((session) => drains && session.close()) });
      const { dispatcher, relay } = await relayed(t, kedge);
      const { body } = await undici.request(TARGET, { dispatcher });
      await sleep(100);
      const at = performance.now();
      relay.freeze();
      await assert.rejects(body.text(), { code: 'ERR_KEDGE_CONNECTION', message: /the connection is frozen/ });
      assert.ok(performance.now() - at < 2.5 * INTERVAL_MS + 300, `${performance.now() - at} ms`);
    }
  });

  it('arrives over a link so slow that answers to PINGs stand behind it', async (t) => {
    const kedge = await startKedge(t, { handler: (_request, response) => void response.end(Buffer.alloc(2 * MIB)) });
    const { dispatcher, relay } = await relayed(t, kedge);
    relay.slice = { bytes: 8 * 1024, everyMs: 10 };
    const { body } = await undici.request(TARGET, { dispatcher });
    assert.equal((await body.arrayBuffer()).byteLength, 2 * MIB);
    assert.equal(kedge.handshakes, 1);
  });
});

describe('an HTTP/2 upload', () => {
  it('arrives over a link so slow that PINGs stand behind it', async (t) => {
    const kedge = await startKedge(t, {
      settings: { initialWindowSize: 16 * MIB },
      handler: (request, response) => {
        let bytes = 0;
        request.on('data', (chunk: Buffer) => {
          bytes += chunk.length;
        });
        request.on('error', () => {});
        request.on('end', () => response.end(String(bytes)));
      },
    });
    const { dispatcher, relay } = await relayed(t, kedge);
    await (await undici.request(TARGET, { dispatcher })).body.dump();
    for (const session of kedge.sessions) session.setLocalWindowSize(16 * MIB);
    await sleep(50);
    relay.slice = { bytes: 8 * 1024, everyMs: 10 };
    const { body } = await undici.request(TARGET, { dispatcher, method: 'POST', body: Buffer.alloc(3 * MIB) });
    assert.equal(await body.text(), String(3 * MIB));
    assert.equal(kedge.handshakes, 1);
  });
});

describe('a process that stands still', () => {
  it('takes no connection for frozen before it has read what came meanwhile', async (t) => {
    const backend = http.createServer(
      (_request, response) => void setTimeout(() => response.end('ok'), 4 * INTERVAL_MS),
    );
    await new Promise<void>((resolve) => backend.listen(0, '127.0.0.1', resolve));
    t.after(() => {
      backend.closeAllConnections();
      backend.close();
    });
    const host = { dns_name: '127.0.0.1', port: (backend.address() as AddressInfo).port };
    const { start, identity } = await kedgeProcesses(t, {
      director: { http: { routes: [{ backend_name: 'orders' }] } },
      backendPool: { http: { backends: [{ name: 'orders', host }] } },
    });
    const { ready } = await start('any');
    const dialer = createDialer({
      identity,
      mapper: single({ kedge: `https://127.0.0.1:${ready.port}`, serverName: KEDGE_NAME }),
      http: { protocol: 'h2', pingIntervalMs: INTERVAL_MS, connections: 1 },
    });
    t.after(() => dialer.destroy());
    const { dispatcher } = dialer;
    let pauses = 0;
    /** Leaves a PING and lets nothing be read before two more of them are due. */
    const pauseAfterPing = (message: unknown) => {
      const { session } = (message as { stream: http2.ClientHttp2Stream }).stream;
      const ping = session!.ping;
      session!.ping = (...args: unknown[]) => {
        if (pauses < 3) {
          pauses += 1;
          setImmediate(() => {
            for (const end = performance.now() + 2.2 * INTERVAL_MS; performance.now() < end; );
          });
        }
        return ping.apply(session, args as never);
      };
      unsubscribe('http2.client.stream.created', pauseAfterPing);
    };
    subscribe('http2.client.stream.created', pauseAfterPing);
    const failures: unknown[] = [];
    const calls: Promise<unknown>[] = [];
    const until = performance.now() + 10_000;
    while (pauses < 3 && performance.now() < until) {
      const call = undici.request(TARGET, { dispatcher, method: 'POST', body: 'x' });
      calls.push(call.then(({ body }) => body.dump()).catch((error) => failures.push(error)));
      await sleep(5 * INTERVAL_MS);
    }
    await Promise.all(calls);
    assert.deepEqual(failures, []);
    assert.equal(pauses, 3);
    assert.equal(dialer.stats().handshakes, 1);
  });
});
