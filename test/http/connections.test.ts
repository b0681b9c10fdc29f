import assert from 'node:assert/strict';
import { AsyncLocalStorage } from 'node:async_hooks';
import { subscribe, unsubscribe } from 'node:diagnostics_channel';
import http2 from 'node:http2';
import { Readable } from 'node:stream';
import { describe, it, type TestContext } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import v8 from 'node:v8';
import * as undici from 'undici';
import { createDialer, type Dialer, type KedgeError, single } from '../../src/index.ts';
import { KEDGE_NAME, type Seen, startKedge } from '../helpers/kedge.ts';
import { runNode } from '../helpers/process.ts';
import { kedgeProcesses } from '../helpers/reference-kedge.ts';
import { startRelay } from '../helpers/relay.ts';

const TARGET = 'http://orders.us1:8080/';
const SOURCE = JSON.stringify(new URL('../../src/index.ts', import.meta.url).href);

async function until(isSo: () => boolean): Promise<void> {
  for (let i = 0; i < 200 && !isSo(); i += 1) await sleep(10);
}

function open(dialer: Dialer): number {
  return dialer.stats().kedges.reduce((sum, { connections }) => sum + connections, 0);
}

/** A kedge that goes on while this process is busy. */
async function kedgeProcess(t: TestContext) {
  const { start, identity } = await kedgeProcesses(t, { director: {}, backendPool: {} });
  const { ready } = await start('any');
  return { identity, url: `https://127.0.0.1:${ready.port}` };
}

for (const protocol of ['h2', 'h1'] as const) {
  describe(`warm() over ${protocol}`, () => {
    it('makes the connection that the next call uses, and sends nothing', async (t) => {
      const kedge = await startKedge(t);
      const dialer = kedge.dialer({ http: { protocol } });
      for (let i = 0; i < 3; i += 1) await dialer.warm(TARGET);
      assert.equal(open(dialer), 1);
      await sleep(50);
      assert.equal(kedge.seen.length, 0);
      await (await undici.request(TARGET, { dispatcher: dialer.dispatcher })).body.dump();
      assert.equal(kedge.handshakes, 1);
      assert.equal(dialer.stats().inFlight, 0);
    });

    it('has it ready for many calls at once', async (t) => {
      const kedge = await startKedge(t);
      const connections = protocol === 'h2' ? 4 : 1;
      const dialer = kedge.dialer({ http: { protocol, connections } });
      await dialer.warm(TARGET);
      const call = async () => (await undici.request(TARGET, { dispatcher: dialer.dispatcher })).body.dump();
      await Promise.all(Array.from({ length: 50 }, call));
      assert.equal(kedge.handshakes, 1);
    });

    it('looks again each time: it dials when the connection is gone, and fails when the kedge is', async (t) => {
      const kedge = await startKedge(t);
      const relay = await startRelay(t, kedge.port);
      const dialer = kedge.dialer({ mapper: single(kedge.route({ kedge: relay.url })), http: { protocol } });
      for (let round = 1; round <= 3; round += 1) {
        relay.is = 'up';
        await dialer.warm(TARGET);
        assert.equal(open(dialer), 1);
        // With TLS 1.3 it is done for us before it is for the kedge.
        await until(() => kedge.handshakes === round);
        assert.equal(kedge.handshakes, round);
        relay.is = 'down';
        relay.cut();
        await until(() => open(dialer) === 0);
        await assert.rejects(dialer.warm(TARGET), { code: /^ERR_KEDGE_/, target: 'orders.us1:8080' });
        // A failed dial is remembered for a moment.
        await sleep(150);
      }
    });

    it('notices when the kedge closes the connection before anybody used it', async (t) => {
      const kedge = await startKedge(t);
      const dialer = kedge.dialer({ http: { protocol } });
      await dialer.warm(TARGET);
      await until(() => (protocol === 'h2' ? kedge.sessions : kedge.sockets).size === 1);
      if (protocol === 'h2') for (const session of kedge.sessions) session.close();
      else for (const socket of kedge.sockets) socket.end();
      await until(() => open(dialer) === 0);
      assert.equal(open(dialer), 0);
      const { body } = await undici.request(TARGET, { dispatcher: dialer.dispatcher, method: 'POST', body: 'x' });
      assert.equal(((await body.json()) as Seen).method, 'POST');
    });

    it('keeps its connection no longer than an idle one is kept', async (t) => {
      const kedge = await startKedge(t);
      const dialer = kedge.dialer({ http: { protocol, keepAliveTimeoutMs: 1100 } });
      await dialer.warm(TARGET);
      assert.equal(open(dialer), 1);
      await sleep(3000);
      assert.equal(open(dialer), 0);
    });

    it('does not keep the process', async (t) => {
      const kedge = await startKedge(t);
      const code = `
        import { createDialer, pem, single } from ${SOURCE};
        const { cert, key, ca, kedge, protocol } = JSON.parse(process.argv[1]);
        const dialer = createDialer({ mapper: single(kedge), identity: pem({ cert, key, ca }), http: { protocol } });
        await dialer.warm('http://a.us1/');
        setTimeout(() => process.exit(3), 5000).unref();
        console.log(dialer.stats().kedges[0].connections);
      `;
      const { cert, key } = kedge.client;
      const init = JSON.stringify({ cert, key, ca: kedge.ca.cert, kedge: kedge.route(), protocol });
      const began = performance.now();
      const { status, out } = await runNode(['--input-type=module', '-e', code, init]);
      assert.equal(status, 0, out);
      assert.equal(out.trim(), '1');
      assert.ok(performance.now() - began < 5000);
    });
  });

  describe(`calls that wait for the first connection (${protocol})`, () => {
    it('are announced in the context of their own callers', async (t) => {
      const kedge = await startKedge(t);
      const { dispatcher } = kedge.dialer({ http: { protocol } });
      const context = new AsyncLocalStorage<string>();
      const announced: string[] = [];
      const note = (message: unknown) => {
        const { request } = message as { request: { path: string } };
        announced.push(`${request.path} by ${context.getStore()}`);
      };
      subscribe('undici:request:create', note);
      t.after(() => unsubscribe('undici:request:create', note));
      const names = ['a', 'b', 'c', 'd'];
      const calls = names.map((name) =>
        context.run(name, async () => (await undici.request(TARGET + name, { dispatcher })).body.dump()),
      );
      await Promise.all(calls);
      assert.deepEqual(
        announced.sort(),
        names.map((name) => `/${name} by ${name}`),
      );
    });

    it('are told of a failed dial in that context, and all of them, also when one of them throws', async () => {
      const code = `
        import { AsyncLocalStorage } from 'node:async_hooks';
        import { createDialer, single } from ${SOURCE};
        const context = new AsyncLocalStorage();
        const thrown = [];
        process.on('uncaughtException', ({ message }) => thrown.push(message));
        const dialer = createDialer({ mapper: single('http://127.0.0.1:1'), http: { protocol: '${protocol}' } });
        const told = [];
        for (const name of ['a', 'b', 'c']) {
          const handler = {
            onRequestStart() {},
            onResponseStart() {},
            onResponseData() {},
            onResponseEnd() {},
            onResponseError(_, { code }) {
              told.push([name, context.getStore(), code]);
              if (name !== 'c') throw new Error('thrown by ' + name);
            },
          };
          context.run(name, () => dialer.dispatcher.dispatch({ origin: 'http://x.us1', path: '/', method: 'GET' }, handler));
        }
        setTimeout(() => console.log(JSON.stringify({ told, thrown, inFlight: dialer.stats().inFlight })), 300);
      `;
      const { out } = await runNode(['--input-type=module', '-e', code]);
      assert.deepEqual(JSON.parse(out), {
        told: ['a', 'b', 'c'].map((name) => [name, name, 'ERR_KEDGE_CONNECT']),
        thrown: ['thrown by a', 'thrown by b'],
        inFlight: 0,
      });
    });
  });
}

describe('a dial', () => {
  it('is not late when this process was busy while it was answered', async (t) => {
    const kedge = await kedgeProcess(t);
    const dialer = createDialer({
      identity: kedge.identity,
      mapper: single({ kedge: kedge.url, serverName: KEDGE_NAME }),
      connect: { timeoutMs: 200, handshakeTimeoutMs: 200 },
    });
    t.after(() => dialer.destroy());
    const warm = dialer.warm(TARGET);
    // The look-up and connect() are on their way by then.
    await new Promise((resolve) => setImmediate(resolve));
    for (const end = performance.now() + 400; performance.now() < end; );
    await warm;
    assert.equal(open(dialer), 1);
  });
});

describe('a failed dial', () => {
  it('leaves no client behind', async (t) => {
    const kedge = await startKedge(t);
    const relay = await startRelay(t, kedge.port);
    const dialer = kedge.dialer({ mapper: single(kedge.route({ kedge: relay.url })) });
    const call = async () => (await undici.request(TARGET, { dispatcher: dialer.dispatcher })).body.dump();
    await call();
    const before = v8.queryObjects(undici.Client, { format: 'count' });
    relay.is = 'down';
    relay.cut();
    await until(() => open(dialer) === 0);
    for (let i = 0; i < 200; i += 1) await assert.rejects(call());
    const kept = v8.queryObjects(undici.Client, { format: 'count' }) - before;
    assert.ok(kept < 20, `${kept} clients are kept`);
    relay.is = 'up';
    await sleep(150);
    await call();
  });

  it('after a GOAWAY that left requests out lets them be made again at once', async (t) => {
    const kedge = await startKedge(t, {
      handler: (request, response) => {
        const { stream } = request as http2.Http2ServerRequest;
        if (stream.id === 1 || relay.is === 'up') response.end('ok');
        // The first that was left to wait, and all the others that are here.
        else setTimeout(() => stream.session?.goaway(0, 1), 20);
      },
    });
    const relay = await startRelay(t, kedge.port);
    const dialer = kedge.dialer({
      mapper: single(kedge.route({ kedge: relay.url })),
      http: { protocol: 'h2', connections: 1 },
    });
    const dispatcher = dialer.dispatcher as undici.Dispatcher;
    await (await undici.request(TARGET, { dispatcher })).body.dump();
    relay.is = 'down';
    const ends: string[] = [];
    const { promise, resolve } = Promise.withResolvers<void>();
    const send = (again: boolean) => {
      const end = (how: string) => {
        ends.push(how);
        // In the callback itself, as who tries again without a pause does.
        if (again) send(false);
        else if (ends.length === 20) resolve();
      };
      const options = { origin: TARGET, path: '/', method: 'POST' as const, body: 'x' };
      dispatcher.dispatch(options, {
        onRequestStart: () => {},
        onResponseStart: () => {},
        onResponseData: () => {},
        onResponseEnd: () => end('served'),
        onResponseError: (_controller, error) => end((error as KedgeError).code),
      });
    };
    for (let i = 0; i < 10; i += 1) send(true);
    await promise;
    assert.deepEqual(ends, Array(20).fill('ERR_KEDGE_TLS'));
    assert.equal(dialer.stats().inFlight, 0);
    relay.is = 'up';
    await sleep(110);
    await (await undici.request(TARGET, { dispatcher })).body.dump();
  });

  it('for an upgrade, which the kedge has no HTTP/1.1 for, is nothing to other calls', async (t) => {
    const kedge = await startKedge(t, { alpn: ['h2'] });
    const { dispatcher } = kedge.dialer();
    for (let i = 0; i < 3; i += 1) {
      const upgrade = undici.upgrade(TARGET, { dispatcher, protocol: 'websocket' });
      await assert.rejects(upgrade, { code: 'ERR_KEDGE_TLS' });
      for (const session of kedge.sessions) session.destroy();
      await sleep(20);
      const { body } = await undici.request(TARGET, { dispatcher });
      assert.equal(((await body.json()) as Seen).alpn, 'h2');
    }
  });
});

describe('a large upload over HTTP/1.1 that is answered before it is read', () => {
  const size = 8 * 1024 * 1024;
  const bodies: [string, () => undici.Dispatcher.DispatchOptions['body']][] = [
    ['Buffer', () => Buffer.alloc(size)],
    ['string', () => 'x'.repeat(size)],
    ['ArrayBuffer', () => new ArrayBuffer(size) as never],
    ['stream', () => Readable.from([Buffer.alloc(size)])],
  ];
  for (const [name, body] of bodies) {
    it(`gets its answer, and the next call does not wait behind the rest of it (${name})`, async (t) => {
      const kedge = await startKedge(t, {
        alpn: ['http/1.1'],
        handler: ({ socket, url }, response) => {
          if (url !== '/early') {
            response.end('ok');
            return;
          }
          socket!.write('HTTP/1.1 413 Too Large\r\ncontent-length: 9\r\n\r\ntoo large');
          socket!.pause();
        },
      });
      const { dispatcher } = kedge.dialer({ http: { protocol: 'h1', connections: 1 } });
      for (let i = 0; i < 3; i += 1) {
        const upload = { dispatcher, method: 'POST', body: body(), headersTimeout: 3000 } as const;
        const early = await undici.request(`${TARGET}early`, upload);
        assert.equal(early.statusCode, 413);
        assert.equal(await early.body.text(), 'too large');
        const post = { dispatcher, method: 'POST', body: 'x', headersTimeout: 3000 } as const;
        const next = await undici.request(TARGET, post);
        assert.equal(await next.body.text(), 'ok');
      }
    });
  }

  it('has its length where it is read', async (t) => {
    const kedge = await startKedge(t, { alpn: ['http/1.1'] });
    const { dispatcher } = kedge.dialer();
    for (const body of [Buffer.alloc(size, 'b'), 'é'.repeat(100_000), Buffer.alloc(10)]) {
      for (const headers of [{}, { 'Content-Length': String(Buffer.byteLength(body)) }]) {
        const reply = await undici.request(TARGET, { dispatcher, method: 'POST', body, headers });
        const seen = (await reply.body.json()) as Seen & { bytes: number };
        assert.equal(seen.bytes, Buffer.byteLength(body));
        assert.equal(seen.headers['content-length'], String(seen.bytes));
      }
    }
    const wrong = undici.request(TARGET, {
      dispatcher,
      method: 'POST',
      body: Buffer.alloc(size),
      headers: { 'content-length': '5' },
    });
    await assert.rejects(wrong, { code: 'ERR_KEDGE_REQUEST' });
  });
});

describe('a request that expects 100 (Continue) over HTTP/2', () => {
  it('is sent after a second where the kedge never says so', async (t) => {
    const silent = http2.createServer();
    silent.on('stream', (stream, headers) => {
      let body = '';
      stream.on('data', (chunk) => {
        body += chunk;
      });
      stream.on('end', () => {
        stream.respond();
        stream.end(`${headers.expect} ${body}`);
      });
    });
    const kedge = await startKedge(t, { alpn: ['h2'], onH2: (socket) => silent.emit('connection', socket) });
    const { dispatcher } = kedge.dialer();
    const calls = ['a', 'b'].map(async (body) => {
      const reply = await undici.request(TARGET, {
        dispatcher,
        method: 'POST',
        body,
        expectContinue: true,
        headersTimeout: 5000,
      });
      return reply.body.text();
    });
    assert.deepEqual(await Promise.all(calls), ['100-continue a', '100-continue b']);
  });

  it('is sent as soon as the kedge says so, and once', async (t) => {
    const kedge = await startKedge(t, { alpn: ['h2'] });
    const { dispatcher } = kedge.dialer();
    const began = performance.now();
    const options = { dispatcher, method: 'POST', body: 'a', expectContinue: true } as const;
    const { body } = await undici.request(TARGET, options);
    assert.equal(((await body.json()) as { bytes: number }).bytes, 1);
    assert.ok(performance.now() - began < 900);
  });
});

describe('an HTTP/2 connection whose stream ids run out', () => {
  it('is replaced in time, and no call fails', async (t) => {
    const kedge = await startKedge(t);
    const { dispatcher } = kedge.dialer({ http: { protocol: 'h2', connections: 1 } });
    const sessions = new Set<http2.ClientHttp2Session>();
    const note = (message: unknown) => {
      const session = (message as { stream: http2.ClientHttp2Stream }).stream.session as http2.ClientHttp2Session;
      if (sessions.has(session)) return;
      sessions.add(session);
      // Node's types lack it.
      const { setNextStreamID } = session as unknown as { setNextStreamID(id: number): void };
      setImmediate(() => setNextStreamID.call(session, 2 ** 31 - 5));
    };
    subscribe('http2.client.stream.created', note);
    t.after(() => unsubscribe('http2.client.stream.created', note));
    for (let i = 0; i < 8; i += 1) {
      await (await undici.request(TARGET, { dispatcher })).body.dump();
      await sleep(20);
    }
    assert.ok(kedge.handshakes > 1);
  });
});
