import assert from 'node:assert/strict';
import { once } from 'node:events';
import net, { type AddressInfo } from 'node:net';
import { describe, it } from 'node:test';
import { inspect } from 'node:util';
import type * as grpc from '@grpc/grpc-js';
import { grpcDialer } from '../../src/grpc/index.ts';
import { createDialer, isKedgeError, single } from '../../src/index.ts';
import { echoClient, startEchoServer, startGrpcKedge, unary } from '../helpers/grpc-kedge.ts';
import { startKedge } from '../helpers/kedge.ts';
import { startProxy } from '../helpers/proxy.ts';

const EchoClient = echoClient();

describe('connect.proxy', () => {
  it('tunnels both wires, and lets the proxy look up the kedge', async (t) => {
    const [kedge, rpc] = await Promise.all([
      startKedge(t, { names: ['k.test'] }),
      startGrpcKedge(t, { names: ['k.test'] }),
    ]);
    const proxy = await startProxy(t, { 'k.test:443': kedge.port, 'k.test:444': rpc.port }, 'user:p@ss');
    const withUser = proxy.url.replace('//', '//user:p%40ss@');
    const dialer = kedge.dialer({ mapper: single('https://k.test'), connect: { proxy: withUser } });
    for (const protocol of ['h1', 'h2'] as const) {
      const own = kedge.dialer({
        mapper: single('https://k.test'),
        connect: { proxy: new URL(withUser) },
        http: { protocol },
      });
      assert.equal((await own.fetch('http://a.us1/')).status, 200);
      assert.equal(kedge.seen.at(-1)!.sni, 'k.test');
    }
    assert.equal((await dialer.fetch('http://a.us1/')).status, 200);
    const second = kedge.dialer({ mapper: single('https://k.test:444'), connect: { proxy: withUser } });
    assert.equal((await unary(new (grpcDialer(second).wrap(EchoClient))('b.us1:90'), 'hi')).authority, 'b.us1:90');
    assert.deepEqual(new Set(proxy.seen), new Set(['k.test:443', 'k.test:444']));
    assert.doesNotMatch(inspect(dialer, { depth: 9, showHidden: true }), /p@ss|p%40ss/);
  });

  it('takes interim answers, and any 2xx for a tunnel', async (t) => {
    const kedge = await startKedge(t, { names: ['k.test'] });
    for (const yes of [
      'HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 200 OK',
      'HTTP/1.1 204 Fine',
    ]) {
      const proxy = await startProxy(t, { 'k.test:443': kedge.port }, undefined, yes);
      const dialer = kedge.dialer({ mapper: single('https://k.test'), connect: { proxy: proxy.url } });
      assert.equal((await dialer.fetch('http://a.us1/')).status, 200);
    }
  });

  it('says what the proxy said, on both wires', async (t) => {
    const kedge = await startKedge(t);
    const proxy = await startProxy(t, {}, 'user:secret');
    const silent = net.createServer((socket) => socket.resume()).listen(0, '127.0.0.1');
    const chatty = net.createServer((socket) => socket.end('SSH-2.0 hello\r\n\r\n')).listen(0, '127.0.0.1');
    t.after(() => {
      silent.close();
      chatty.close();
    });
    await Promise.all([once(silent, 'listening'), once(chatty, 'listening')]);
    const at = (server: net.Server) => `http://127.0.0.1:${(server.address() as AddressInfo).port}`;
    for (const [url, message] of [
      [proxy.url, /proxy 127\.0\.0\.1:\d+: the proxy answered 407/],
      [proxy.url.replace('//', '//user:secret@'), /the proxy answered 502/],
      [at(silent), /no answer of the proxy within 200 ms/],
      [at(chatty), /the proxy answered no HTTP/],
      ['http://127.0.0.1:1', /TCP connection failed/],
    ] as const) {
      const dialer = kedge.dialer({ mapper: single('https://k.test'), connect: { proxy: url, timeoutMs: 200 } });
      const refused = (error: unknown) => {
        assert.ok(isKedgeError(error), String(error));
        assert.match(error.message, message);
        assert.match(error.code, /^ERR_KEDGE_CONNECT/);
        assert.doesNotMatch(error.message, /secret/);
        return true;
      };
      await assert.rejects(dialer.fetch('http://a.us1/'), (error: Error) => refused(error.cause));
      const call = unary(new (grpcDialer(dialer).wrap(EchoClient))('b.us1:90'), 'x', undefined, {
        deadline: Date.now() + 3000,
      });
      await assert.rejects(call, (error: grpc.ServiceError) => refused(error.cause));
    }
  });

  it('carries a plain kedge too, and is refused when it is no HTTP proxy', async (t) => {
    const rpc = await startEchoServer(t);
    const proxy = await startProxy(t, { 'plain.test:80': rpc.port });
    const dialer = createDialer({ mapper: single('http://plain.test'), connect: { proxy: proxy.url } });
    t.after(() => dialer.destroy());
    assert.equal((await unary(new (grpcDialer(dialer).wrap(EchoClient))('b.us1:90'), 'hi')).text, 'hi');
    for (const wrong of ['https://proxy.test', 'socks5://proxy.test', 'proxy.test:80', 1, '']) {
      const options = { mapper: single('https://k.test'), connect: { proxy: wrong as string } };
      assert.throws(() => createDialer(options), { code: 'ERR_KEDGE_OPTIONS' }, String(wrong));
    }
  });
});
