import assert from 'node:assert/strict';
import { once } from 'node:events';
import http from 'node:http';
import type { AddressInfo, Socket } from 'node:net';
import { Readable, Writable } from 'node:stream';
import { pipeline } from 'node:stream/promises';
import { describe, it, type TestContext } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { gzipSync } from 'node:zlib';
import * as undici from 'undici';
import { WebSocketServer } from 'ws';
import type { Dialer } from '../../src/index.ts';
import { sha256, startKedge } from '../helpers/kedge.ts';
import { startReferenceKedge } from '../helpers/reference-kedge.ts';

const ORIGIN = 'http://orders.us1:8080';

for (const protocol of ['h2', 'h1'] as const) {
  describe(`undici's other APIs over ${protocol}`, () => {
    it('pipeline, stream and the dispatcher itself', async (t) => {
      const kedge = await startKedge(t, {
        handler: (request, response) => void request.pipe(response as unknown as Writable),
      });
      const { dispatcher } = kedge.dialer({ http: { protocol } });
      const body = Buffer.alloc(2_000_000, 'p');
      const chunks: Buffer[] = [];
      const sink = new Writable({ write: (chunk, _encoding, done) => done(void chunks.push(chunk)) });
      const duplex = dispatcher.pipeline({ origin: ORIGIN, path: '/', method: 'POST' }, ({ body: reply }) => reply);
      await pipeline(Readable.from([body]), duplex, sink);
      assert.equal(sha256(Buffer.concat(chunks)), sha256(body));
      const { body: reply } = await dispatcher.request({ origin: ORIGIN, path: '/', method: 'PUT', body: 'direct' });
      assert.equal(await reply.text(), 'direct');
    });

    it("undici's own interceptors above the dialer", async (t) => {
      let answers = 0;
      const kedge = await startKedge(t, {
        handler: (_request, response) => {
          answers += 1;
          response.statusCode = answers % 2 ? 503 : 200;
          response.setHeader('cache-control', 'max-age=60');
          response.end(`answer ${answers}`);
        },
      });
      const { dispatcher } = kedge.dialer({ http: { protocol } });
      const { retry, dump, cache, responseError } = undici.interceptors;
      const retrying = dispatcher.compose(retry({ minTimeout: 1, maxTimeout: 5 }));
      assert.equal(
        await (await retrying.request({ origin: ORIGIN, path: '/retry', method: 'GET' })).body.text(),
        'answer 2',
      );
      const caching = dispatcher.compose(cache(), retry({ minTimeout: 1 }));
      for (let i = 0; i < 3; i += 1) {
        const { body } = await caching.request({ origin: ORIGIN, path: '/cache', method: 'GET' });
        assert.equal(await body.text(), 'answer 4');
      }
      await assert.rejects(dispatcher.compose(responseError()).request({ origin: ORIGIN, path: '/', method: 'GET' }), {
        statusCode: 503,
      });
      const dumped = await dispatcher.compose(dump()).request({ origin: ORIGIN, path: '/', method: 'GET' });
      assert.equal(await dumped.body.text(), '');
      await retrying.close();
      await assert.rejects(dispatcher.request({ origin: ORIGIN, path: '/', method: 'GET' }), {
        code: 'ERR_KEDGE_CLOSED',
      });
    });

    it('decompress', async (t) => {
      const kedge = await startKedge(t, {
        handler: (_request, response) => {
          response.setHeader('content-encoding', 'gzip');
          response.end(gzipSync('unpacked'));
        },
      });
      const { dispatcher } = kedge.dialer({ http: { protocol } });
      const decompressing = dispatcher.compose(undici.interceptors.decompress());
      const { body } = await decompressing.request({ origin: ORIGIN, path: '/', method: 'GET' });
      assert.equal(await body.text(), 'unpacked');
    });

    it('takes headers up to the limit, and refuses more', async (t) => {
      const kedge = await startKedge(t, {
        handler: (request, response) => {
          response.setHeader('x-long', 'x'.repeat(Number(/\d+/.exec(request.url!)![0])));
          response.end();
        },
      });
      const { dispatcher } = kedge.dialer({ http: { protocol } });
      const long = await dispatcher.request({ origin: ORIGIN, path: '/12000', method: 'GET' });
      assert.equal(String(long.headers['x-long']).length, 12_000);
      await long.body.dump();
      await assert.rejects(dispatcher.request({ origin: ORIGIN, path: '/200000', method: 'GET' }), {
        code: /ERR_KEDGE_(RESPONSE|CONNECTION)/,
      });
      assert.equal((await dispatcher.request({ origin: ORIGIN, path: '/1', method: 'GET' })).statusCode, 200);
    });

    it('EventSource', async (t) => {
      const kedge = await startKedge(t, {
        handler: async (_request, response) => {
          response.setHeader('content-type', 'text/event-stream');
          const stream = response as unknown as Writable;
          for (let i = 0; i < 5; i += 1) {
            stream.write(`data: ${i}\n\n`);
            await sleep(20);
          }
          stream.write('event: done\ndata: x\n\n');
        },
      });
      const { dispatcher } = kedge.dialer({ http: { protocol } });
      const source = new undici.EventSource(`${ORIGIN}/events`, { dispatcher });
      const seen: string[] = [];
      source.addEventListener('message', ({ data }) => seen.push(data));
      await once(source, 'done');
      source.close();
      assert.deepEqual(seen, ['0', '1', '2', '3', '4']);
    });

    it('a stream of events for 10 s', { concurrency: true }, async (t) => {
      const kedge = await startKedge(t, {
        handler: (request, response) => {
          const stream = response as unknown as Writable;
          const timer = setInterval(() => stream.write('data: tick\n\n'), 100);
          request.on('close', () => clearInterval(timer));
          response.on('close', () => clearInterval(timer));
        },
      });
      const { body } = await undici.request(ORIGIN, { dispatcher: kedge.dialer({ http: { protocol } }).dispatcher });
      const begin = performance.now();
      let events = 0;
      for await (const _ of body) {
        events += 1;
        if (performance.now() - begin > 10_000) break;
      }
      assert.ok(events > 50, `${events} events`);
    });

    it('HEAD, 204, 304, 1xx and trailers', async (t) => {
      const kedge = await startKedge(t, {
        handler: (request, response) => {
          if (request.url === '/early') response.writeEarlyHints({ link: '</style.css>; rel=preload' });
          if (request.url === '/trailers') {
            response.setHeader('trailer', 'x-sum');
            (response as unknown as Writable).write('body');
            response.addTrailers({ 'x-sum': '42' });
          } else {
            response.statusCode = Number(/\d+/.exec(request.url!)?.[0] ?? 200);
          }
          response.end();
        },
      });
      const { dispatcher } = kedge.dialer({ http: { protocol } });
      for (const [method, path, status] of [
        ['HEAD', '/200', 200],
        ['GET', '/204', 204],
        ['GET', '/304', 304],
      ] as const) {
        const { statusCode, body } = await dispatcher.request({ origin: ORIGIN, path, method });
        assert.equal(statusCode, status);
        assert.equal(await body.text(), '');
      }
      const hints: number[] = [];
      const onInfo = ({ statusCode }: { statusCode: number }) => hints.push(statusCode);
      const early = await dispatcher.request({ origin: ORIGIN, path: '/early', method: 'GET', onInfo });
      assert.equal(early.statusCode, 200);
      await early.body.dump();
      if (protocol === 'h1') assert.deepEqual(hints, [103]);
      const { body, trailers } = await dispatcher.request({ origin: ORIGIN, path: '/trailers', method: 'GET' });
      assert.equal(await body.text(), 'body');
      assert.equal(trailers['x-sum'], '42');
    });
  });
}

/** A WebSocket echo behind the reference kedge, and a dialer to it. */
async function webSockets(
  t: TestContext,
  protocol: 'auto' | 'h1' = 'auto',
): Promise<{ dialer: Dialer; headers: http.IncomingHttpHeaders[] }> {
  const headers: http.IncomingHttpHeaders[] = [];
  const echo = new WebSocketServer({ noServer: true });
  const backend = http.createServer((_request, response) => response.end('plain')).listen(0, '127.0.0.1');
  backend.on('upgrade', (request, socket: Socket, head) => {
    headers.push(request.headers);
    echo.handleUpgrade(request, socket, head, (client) =>
      client.on('message', (data, binary) => client.send(data, { binary })),
    );
  });
  await once(backend, 'listening');
  const host = { dns_name: '127.0.0.1', port: (backend.address() as AddressInfo).port };
  const { dialer } = await startReferenceKedge(t, {
    director: { http: { routes: [{ backend_name: 'echo', host_matcher: 'echo.us1' }] } },
    backendPool: { http: { backends: [{ name: 'echo', host }] } },
  });
  t.after(() => {
    for (const each of echo.clients) each.terminate();
    backend.closeAllConnections();
    backend.close();
  });
  return { dialer: dialer({ http: { protocol } }), headers };
}

describe('WebSocket through the reference kedge, which prefers HTTP/2', () => {
  for (const [name, WebSocketClass, protocol] of [
    ["undici's", undici.WebSocket, 'auto'],
    ['the built-in', globalThis.WebSocket, 'auto'],
    ["undici's", undici.WebSocket, 'h1'],
    ['the built-in', globalThis.WebSocket, 'h1'],
  ] as const) {
    it(`${name} echoes (${protocol})`, async (t) => {
      const { dialer, headers } = await webSockets(t, protocol);
      // The pool speaks its protocol by now.
      assert.equal(await (await dialer.fetch('http://echo.us1/')).text(), 'plain');
      const socket = new WebSocketClass('ws://echo.us1/chat', { dispatcher: dialer.dispatcher } as never);
      await once(socket, 'open');
      for (const text of ['one', 'x'.repeat(70_000)]) {
        socket.send(text);
        const [{ data }] = (await once(socket, 'message')) as [MessageEvent];
        assert.equal(data, text);
      }
      assert.equal(headers[0]!.host, 'echo.us1');
      assert.equal(headers[0]!['x-kedge-client-subject'], 'CN=pod');
      assert.equal(dialer.stats().kedges[0]!.inFlight, 1, 'an open WebSocket is a call under way');
      const closed = dialer.close();
      socket.send('still here');
      const [{ data }] = (await once(socket, 'message')) as [MessageEvent];
      assert.equal(data, 'still here');
      socket.close();
      await closed;
    });
  }

  it('upgrade() works, and CONNECT is refused by the kedge', async (t) => {
    const { dialer } = await webSockets(t);
    const { dispatcher } = dialer;
    const upgraded = await dispatcher.upgrade({
      origin: 'http://echo.us1',
      path: '/',
      protocol: 'websocket',
      headers: { 'sec-websocket-key': 'dGhlIHNhbXBsZSBub25jZQ==', 'sec-websocket-version': '13' },
    } as never);
    assert.equal(upgraded.headers.upgrade, 'websocket');
    upgraded.socket.destroy();
    const { statusCode, socket } = await dispatcher.connect({ origin: 'http://echo.us1', path: 'echo.us1:80' });
    assert.equal(statusCode, 405);
    socket.destroy();
  });
});
