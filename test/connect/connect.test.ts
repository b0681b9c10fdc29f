import assert from 'node:assert/strict';
import http2 from 'node:http2';
import { describe, it, type TestContext } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import type { StringValue } from '@bufbuild/protobuf/wkt';
import { Code, ConnectError, type HandlerContext } from '@connectrpc/connect';
import { connectNodeAdapter, createConnectTransport, createGrpcTransport } from '@connectrpc/connect-node';
import { connectDialer } from '../../src/connect/index.ts';
import { type Dialer, type DialerOptions, isKedgeError, single, staticToken } from '../../src/index.ts';
import { greeterClient as client, Greeter, type Text } from '../helpers/greeter.ts';
import { startKedge, type TestKedge, type TestKedgeOptions } from '../helpers/kedge.ts';
import { rotating } from '../helpers/rotating.ts';

const BASE = 'http://greeter.us1:9090';
async function* stream(...values: string[]) {
  for (const value of values) yield { value };
}

async function collect(messages: AsyncIterable<Text>): Promise<string[]> {
  const values: string[] = [];
  for await (const { value } of messages) values.push(value);
  return values;
}

interface GreeterOptions extends Partial<TestKedgeOptions> {
  onResponse?: (response: http2.Http2ServerResponse) => void;
}

async function startGreeter(t: TestContext, { onResponse, ...options }: GreeterOptions = {}): Promise<TestKedge> {
  const handler = connectNodeAdapter({
    routes: (router) =>
      router.service(Greeter, {
        unary: async ({ value }: StringValue, { requestHeader, signal }: HandlerContext) => {
          if (value === 'fail') throw new ConnectError('as asked', Code.FailedPrecondition);
          if (value === 'slow') await new Promise((resolve) => signal.addEventListener('abort', resolve));
          if (value === 'pause') await new Promise((resolve) => setTimeout(resolve, 100));
          return { value: `${value} ${requestHeader.get('authorization')}` };
        },
        down: async function* ({ value }: StringValue, { signal }: HandlerContext) {
          while (value === 'endless' && !signal.aborted) {
            yield { value: 'more' };
            await sleep(5);
          }
          for (const letter of value) yield { value: letter };
        },
        up: async (requests: AsyncIterable<StringValue>) => ({ value: (await collect(requests)).join('') }),
        both: async function* (requests: AsyncIterable<StringValue>) {
          for await (const { value } of requests) yield { value };
        },
      } as never),
  });
  return startKedge(t, {
    handler: (request, response) => {
      onResponse?.(response as http2.Http2ServerResponse);
      handler(request as never, response as never);
    },
    ...options,
  });
}

const transports = {
  gRPC: (dialer: Dialer, baseUrl = BASE) =>
    createGrpcTransport({ baseUrl, sessionManager: connectDialer(dialer).sessionManager(baseUrl) }),
  Connect: (dialer: Dialer, baseUrl = BASE) =>
    createConnectTransport({
      baseUrl,
      httpVersion: '2',
      sessionManager: connectDialer(dialer).sessionManager(baseUrl),
    }),
};

for (const [protocol, transport] of Object.entries(transports)) {
  describe(`connect-es, ${protocol} protocol`, () => {
    it('makes calls of the four kinds with the authority, the certificate and the tokens of the route', async (t) => {
      const kedge = await startGreeter(t);
      const auth = { proxyAuth: staticToken('proxy'), backendAuth: staticToken('backend') };
      const greeter = client(transport(kedge.dialer({ mapper: single(kedge.route(auth)) })));
      assert.equal((await greeter.unary({ value: 'hi' })).value, 'hi Bearer backend');
      assert.deepEqual(await collect(greeter.down({ value: 'abc' })), ['a', 'b', 'c']);
      assert.equal((await greeter.up(stream('x', 'y'))).value, 'xy');
      assert.deepEqual(await collect(greeter.both(stream('1', '2'))), ['1', '2']);
      assert.equal(kedge.seen.length, 4);
      for (const { authority, headers, clientSubject, sni } of kedge.seen) {
        assert.equal(authority, 'greeter.us1:9090');
        assert.equal(headers['proxy-authorization'], 'Bearer proxy');
        assert.match(clientSubject, /pod/);
        assert.equal(sni, 'us1.kedge.test');
      }
      assert.equal(kedge.handshakes, 1);
    });

    it('shares a connection between services, and opens another when it is full', async (t) => {
      const kedge = await startGreeter(t);
      const dialer = kedge.dialer();
      const names = Array.from({ length: 20 }, (_, i) => `http://service-${i}.us1:80`);
      await Promise.all(names.map((name) => client(transport(dialer, name)).unary({ value: 'x' })));
      assert.equal(kedge.handshakes, 1);
      assert.equal(new Set(kedge.seen.map(({ authority }) => authority)).size, 20);
      const greeter = client(transport(dialer));
      await Promise.all(Array.from({ length: 250 }, () => greeter.unary({ value: 'pause' })));
      assert.equal(kedge.handshakes, 3);
    });

    it('hands on what the backend and the caller decide', async (t) => {
      const kedge = await startGreeter(t);
      const dialer = kedge.dialer();
      const greeter = client(transport(dialer));
      await assert.rejects(greeter.unary({ value: 'fail' }), (error: ConnectError) => {
        assert.equal(error.code, Code.FailedPrecondition);
        assert.equal(error.rawMessage, 'as asked');
        return true;
      });
      await assert.rejects(greeter.unary({ value: 'slow' }, { timeoutMs: 50 }), { code: Code.DeadlineExceeded });
      const abort = new AbortController();
      setTimeout(() => abort.abort(), 50);
      await assert.rejects(greeter.unary({ value: 'slow' }, { signal: abort.signal }), { code: Code.Canceled });
      for (let i = 0; i < 50 && dialer.stats().inFlight > 0; i += 1) await new Promise((r) => setTimeout(r, 10));
      assert.equal(dialer.stats().inFlight, 0);
      assert.equal(kedge.handshakes, 1);
    });

    it('moves to the next kedge, and says which one failed and why', async (t) => {
      const kedge = await startGreeter(t);
      const two = single(kedge.route({ kedge: ['https://127.0.0.1:1', kedge.url] }));
      assert.match((await client(transport(kedge.dialer({ mapper: two }))).unary({ value: 'x' })).value, /^x/);
      const dead = kedge.dialer({ mapper: single(kedge.route({ kedge: 'https://127.0.0.1:1' })) });
      await assert.rejects(client(transport(dead)).unary({ value: 'x' }), (error: ConnectError) => {
        assert.equal(error.code, Code.Unavailable);
        assert.ok(isKedgeError(error.cause) && error.cause.code === 'ERR_KEDGE_CONNECT');
        assert.match(error.message, /127\.0\.0\.1:1/);
        return true;
      });
      const mute = await startKedge(t, { onH2: () => {} });
      const silent = mute.dialer({ connect: { handshakeTimeoutMs: 200 } });
      await assert.rejects(client(transport(silent)).unary({ value: 'x' }), { code: Code.Unavailable });
    });

    it('lets no caller hurt another: hostile headers end their own call', async (t) => {
      const kedge = await startGreeter(t);
      const dialer = kedge.dialer({ mapper: single(kedge.route({ proxyAuth: staticToken('proxy') })) });
      const greeter = client(transport(dialer));
      const innocent = Array.from({ length: 20 }, () => greeter.unary({ value: 'pause' }));
      for (const headers of [
        { 'proxy-authorization': 'mine' },
        { connection: 'close' },
        { 'transfer-encoding': 'chunked' },
        { big: 'x'.repeat(100_000) },
      ]) {
        await assert.rejects(greeter.unary({ value: 'x' }, { headers }), { code: Code.InvalidArgument });
      }
      await Promise.all(innocent);
      assert.equal(kedge.handshakes, 1);
    });

    it('rotates while calls flow', async (t) => {
      const kedge = await startGreeter(t);
      const identity = rotating(kedge);
      const dialer = kedge.dialer({ identity });
      const greeter = client(transport(dialer));
      for (let i = 0; i < 5; i += 1) {
        const calls = Array.from({ length: 20 }, () => greeter.unary({ value: 'pause' }));
        await greeter.unary({ value: 'x' });
        await identity.rotate();
        await Promise.all([...calls, greeter.unary({ value: 'y' })]);
      }
      assert.equal(new Set(kedge.seen.map(({ clientSerial }) => clientSerial)).size, 6);
    });

    it('holds nothing of a call that is over, whatever its transport left unread', async (t) => {
      let status = 502;
      let type = 'text/plain';
      const kedge = await startKedge(t, {
        handler: (_request, response) => {
          (response as http2.Http2ServerResponse).writeHead(status, { 'content-type': type });
          response.end(Buffer.alloc(2000, 0xff));
        },
      });
      const dialer = kedge.dialer({ drainTimeoutMs: 30_000 });
      const greeter = client(transport(dialer));
      for ([status, type] of [
        [502, 'text/plain'],
        [404, 'text/html'],
        [200, 'text/html'],
        [200, protocol === 'gRPC' ? 'application/grpc' : 'application/proto'],
      ] as const) {
        for (let i = 0; i < 20; i += 1) await assert.rejects(greeter.unary({ value: 'x' }), ConnectError);
        await assert.rejects(collect(greeter.both(stream('1'))), ConnectError);
      }
      await sleep(50);
      assert.equal(dialer.stats().inFlight, 0);
      assert.equal(kedge.handshakes, 1);
      const began = performance.now();
      await dialer.close();
      assert.ok(performance.now() - began < 5_000);
    });

    it('holds nothing of a stream that its caller had enough of', async (t) => {
      const kedge = await startGreeter(t);
      const dialer = kedge.dialer({ drainTimeoutMs: 30_000 });
      const greeter = client(transport(dialer));
      for (let i = 0; i < 20; i += 1) {
        for await (const { value } of greeter.down({ value: 'abc' })) {
          assert.equal(value, 'a');
          break;
        }
      }
      await sleep(50);
      assert.equal(dialer.stats().inFlight, 0);
      const began = performance.now();
      await dialer.close();
      assert.ok(performance.now() - began < 5_000);
    });

    it('resets streams that go on when their signals abort, after their loops were left or within them', async (t) => {
      const open = new Set<object>();
      const kedge = await startGreeter(t, {
        onResponse: (response) => {
          open.add(response);
          response.once('close', () => open.delete(response));
        },
      });
      const dialer = kedge.dialer({ drainTimeoutMs: 30_000 });
      const greeter = client(transport(dialer));
      for (const isWithin of [false, true]) {
        const aborts = Array.from({ length: 10 }, () => new AbortController());
        const loop = async ({ signal }: AbortController) => {
          for await (const { value } of greeter.down({ value: 'endless' }, { signal })) {
            assert.equal(value, 'more');
            if (!isWithin) break;
          }
        };
        const loops = Promise.allSettled(aborts.map(loop));
        if (!isWithin) await loops;
        while (open.size < aborts.length) await sleep(5);
        for (const abort of aborts) abort.abort();
        for (let i = 0; i < 100 && open.size > 0; i += 1) await sleep(10);
        assert.deepEqual([open.size, dialer.stats().inFlight], [0, 0]);
        for (const { status } of await loops) assert.equal(status, isWithin ? 'rejected' : 'fulfilled');
      }
      assert.deepEqual(await collect(greeter.down({ value: 'abc' })), ['a', 'b', 'c']);
      assert.equal(kedge.handshakes, 1);
      await dialer.close();
    });

    it('resets an answer that goes on and that nobody reads', async (t) => {
      const { promise: over, resolve } = Promise.withResolvers<void>();
      const kedge = await startKedge(t, {
        handler: (_request, response) => {
          (response as http2.Http2ServerResponse).writeHead(503, { 'content-type': 'text/plain' });
          (response as http2.Http2ServerResponse).write('x');
          response.once('close', resolve);
        },
      });
      const dialer = kedge.dialer();
      await assert.rejects(client(transport(dialer)).unary({ value: 'x' }), { code: Code.Unavailable });
      await over;
      await sleep(20);
      assert.equal(dialer.stats().inFlight, 0);
    });

    it('says of a call that was lost on its way which kedge had it, and that it may be made again', async (t) => {
      const server = http2.createServer();
      server.on('session', (session) => session.on('error', () => {}));
      let dialer!: Dialer;
      const deeds: Record<string, [string, (stream: http2.ServerHttp2Stream) => void]> = {
        destroy: ['ERR_KEDGE_CLOSED', () => void dialer.destroy()],
        'late close': ['ERR_KEDGE_CLOSED', () => void dialer.close()],
        'angry goaway': ['ERR_KEDGE_CONNECTION', ({ session }) => session!.goaway(2, 2 ** 31 - 1)],
        cut: ['ERR_KEDGE_CONNECTION', ({ session }) => session!.socket.destroySoon()],
        refusal: ['ERR_KEDGE_CONNECTION', (stream) => stream.close(http2.constants.NGHTTP2_REFUSED_STREAM)],
      };
      let deed = '';
      server.on('stream', (stream) => {
        stream.on('error', () => {});
        setTimeout(() => deeds[deed]![1](stream), 20);
      });
      const kedge = await startKedge(t, { onH2: (socket) => server.emit('connection', socket) });
      for (deed of Object.keys(deeds)) {
        dialer = kedge.dialer({ drainTimeoutMs: 200 });
        await assert.rejects(client(transport(dialer)).unary({ value: 'x' }), (error: ConnectError) => {
          const { cause } = error;
          assert.ok(isKedgeError(cause), `${deed}: ${error.message}`);
          const { code, stage, target, kedge: name } = cause;
          const expected = [Code.Unavailable, deeds[deed]![0], 'kedge', 'greeter.us1:9090', `127.0.0.1:${kedge.port}`];
          assert.deepEqual([error.code, code, stage, target, name], expected, deed);
          return true;
        });
        assert.equal(dialer.stats().inFlight, 0, deed);
      }
    });

    it('refuses what no mapper knows, and everything once the dialer is closed', async (t) => {
      const kedge = await startGreeter(t);
      const options: Partial<DialerOptions> = { mapper: () => undefined };
      await assert.rejects(client(transport(kedge.dialer(options))).unary({ value: 'x' }), {
        code: Code.InvalidArgument,
      });
      const dialer = kedge.dialer();
      const greeter = client(transport(dialer));
      const last = greeter.unary({ value: 'pause' });
      await new Promise((resolve) => setTimeout(resolve, 50));
      await Promise.all([last, dialer.close()]);
      await assert.rejects(greeter.unary({ value: 'x' }), (error: ConnectError) => {
        assert.ok(isKedgeError(error.cause) && error.cause.code === 'ERR_KEDGE_CLOSED');
        return true;
      });
      for (let i = 0; i < 50 && kedge.sockets.size > 0; i += 1) await new Promise((r) => setTimeout(r, 10));
      assert.equal(kedge.sockets.size, 0);
      assert.equal(kedge.seen.length, 1);
    });
  });
}
