import assert from 'node:assert/strict';
import { once } from 'node:events';
import http2, { type ClientHttp2Stream } from 'node:http2';
import net from 'node:net';
import { describe, it, type TestContext } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import type { TLSSocket } from 'node:tls';
import { connectDialer } from '../../src/connectrpc/index.ts';
import { hostPorts, single, type TokenSource } from '../../src/index.ts';
import { startKedge, type TestKedge } from '../helpers/kedge.ts';
import { rotating } from '../helpers/rotating.ts';

const BASE = 'http://greeter.us1:9090';
const { NGHTTP2_ENHANCE_YOUR_CALM, NGHTTP2_REFUSED_STREAM } = http2.constants;
const GRPC = { 'content-type': 'application/grpc' };

/** A kedge on an HTTP/2 server of the test's own. */
async function startH2(t: TestContext, onStream: (stream: http2.ServerHttp2Stream) => void, settings = {}) {
  const server = http2.createServer({ settings });
  server.on('session', (session) => session.on('error', () => {}));
  server.on('stream', (stream) => {
    stream.on('error', () => {});
    onStream(stream);
  });
  const kedge = await startKedge(t, { onH2: (socket) => server.emit('connection', socket) });
  return Object.assign(kedge, { server });
}

const ok = (stream: http2.ServerHttp2Stream) => {
  if (stream.closed) return;
  stream.respond({ ':status': 200 });
  stream.end('ok');
};

async function bodyOf(stream: ClientHttp2Stream): Promise<string> {
  stream.end();
  let body = '';
  for await (const chunk of stream) body += chunk;
  return body;
}

const managerOf = (kedge: TestKedge, options = {}) => {
  const dialer = kedge.dialer(options);
  return { dialer, manager: connectDialer(dialer).sessionManager(BASE) };
};

/** SETTINGS, and in the same bytes a GOAWAY. */
function settingsAndGoaway(socket: TLSSocket): void {
  socket.write(Buffer.from('000000040000000000' + '000008070000000000' + '0000000000000000', 'hex'));
}

describe('a connect-es call that nobody waits for any more', () => {
  it('is not sent when it was aborted while it waited for a token', async (t) => {
    const kedge = await startH2(t, ok);
    const never: TokenSource = {
      name: 'never',
      peek: () => undefined,
      token: () => new Promise(() => {}),
    };
    const { dialer, manager } = managerOf(kedge, { mapper: single(kedge.route({ proxyAuth: never })) });
    const abort = new AbortController();
    const waiting = manager.request('POST', '/', GRPC, { signal: abort.signal });
    setTimeout(() => abort.abort(), 50);
    await assert.rejects(waiting, { name: 'ConnectError', code: 1 });
    await assert.rejects(manager.request('POST', '/', { ...GRPC, 'grpc-timeout': '50m' }, {}), { code: 4 });
    assert.equal(dialer.stats().inFlight, 0);
  });

  it('is not sent when it was aborted or late while it waited for a connection', async (t) => {
    let streams = 0;
    const kedge = await startKedge(t, { onH2: () => {} });
    const good = await startH2(t, (stream) => {
      streams += 1;
      ok(stream);
    });
    const { dialer, manager } = managerOf(good, {
      mapper: single(good.route({ kedge: [kedge.url, good.url] })),
      connect: { handshakeTimeoutMs: 400 },
    });
    const abort = new AbortController();
    const waiting = manager.request('POST', '/', GRPC, { signal: abort.signal });
    setTimeout(() => abort.abort(), 50);
    await assert.rejects(waiting, { code: 1 });
    await assert.rejects(manager.request('POST', '/', { ...GRPC, 'grpc-timeout': '50m' }, {}), { code: 4 });
    await assert.rejects(manager.request('POST', '/', { 'connect-timeout-ms': '50' }, {}), { code: 4 });
    assert.equal(dialer.stats().inFlight, 0);
    await sleep(500);
    assert.equal(streams, 0);
  });

  it('ends with the dialer, and dials no other kedge', async (t) => {
    const [mute, good] = await Promise.all([startKedge(t, { onH2: () => {} }), startH2(t, ok)]);
    const { dialer, manager } = managerOf(good, { mapper: single(good.route({ kedge: [mute.url, good.url] })) });
    const waiting = assert.rejects(manager.request('POST', '/', GRPC, {}), /destroyed/);
    while (mute.handshakes === 0) await sleep(10);
    await dialer.destroy();
    await waiting;
    await sleep(100);
    assert.equal(good.handshakes, 0);
    assert.equal(dialer.stats().inFlight, 0);
  });
});

describe('a kedge that ends a connect-es connection', () => {
  it('with its SETTINGS gets another, and then the next kedge has the call', async (t) => {
    const odd = await startKedge(t, { onH2: settingsAndGoaway });
    const good = await startH2(t, ok);
    const { dialer, manager } = managerOf(good, { mapper: single(good.route({ kedge: [odd.url, good.url] })) });
    for (let i = 0; i < 3; i += 1) assert.equal(await bodyOf(await manager.request('POST', '/', GRPC, {})), 'ok');
    await sleep(20);
    assert.equal(dialer.stats().inFlight, 0);
  });

  it('by a GOAWAY with an error says which calls it has not processed', async (t) => {
    const odd = await startKedge(t, {
      onH2: (socket) => {
        socket.write(Buffer.from('000000040000000000', 'hex'));
        socket.resume();
      },
    });
    const { manager } = managerOf(odd);
    const stream = await manager.request('POST', '/', GRPC, {});
    stream.on('error', () => {});
    await sleep(100);
    for (const socket of odd.sockets) socket.end(Buffer.from('00000807000000000000000000' + '0000000b', 'hex'));
    await new Promise((resolve) => stream.once('close', resolve));
    assert.equal(stream.rstCode, NGHTTP2_REFUSED_STREAM);
    assert.notEqual(stream.rstCode, NGHTTP2_ENHANCE_YOUR_CALM);
  });

  it('gracefully lets its calls finish, and is still found out when it freezes then', async (t) => {
    let frozen = false;
    let streams = 0;
    const kedge = await startH2(t, (stream) => {
      streams += 1;
      if (!frozen) setTimeout(() => ok(stream), 100);
      if (streams >= 5) stream.session!.goaway(0);
    });
    const sockets: net.Socket[] = [];
    const relay = net.createServer((socket) => {
      const onward = net.connect(kedge.port, '127.0.0.1');
      sockets.push(socket, onward);
      for (const each of [socket, onward]) each.on('error', () => {});
      socket.pipe(onward).pipe(socket);
    });
    t.after(() => {
      for (const socket of sockets) socket.destroy();
      relay.close();
    });
    relay.listen(0, '127.0.0.1');
    await once(relay, 'listening');
    const { port } = relay.address() as net.AddressInfo;
    const { dialer, manager } = managerOf(kedge, {
      mapper: single(kedge.route({ kedge: `https://127.0.0.1:${port}` })),
      grpc: { keepaliveTimeMs: 200, keepaliveTimeoutMs: 300 },
    });
    const all = Array.from({ length: 5 }, async () => bodyOf(await manager.request('POST', '/', GRPC, {})));
    assert.deepEqual(await Promise.all(all), Array(5).fill('ok'));
    frozen = true;
    const last = bodyOf(await manager.request('POST', '/', GRPC, {}));
    setTimeout(() => {
      for (const socket of sockets) socket.unpipe().pause();
    }, 100);
    await assert.rejects(last, /PING/);
    assert.equal(dialer.stats().inFlight, 0);
  });
});

describe('a connect-es connection', () => {
  it('outlives a pause of the whole process', async (t) => {
    const kedge = await startH2(t, (stream) => setTimeout(() => ok(stream), 1500));
    // The kedge is in this process, too: the answer to the PING leaves after the pause.
    kedge.server.on('session', (session) =>
      session.once('ping', () => Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, 900)),
    );
    const { manager } = managerOf(kedge, { grpc: { keepaliveTimeMs: 200, keepaliveTimeoutMs: 300 } });
    const calls = Array.from({ length: 10 }, async () => bodyOf(await manager.request('POST', '/', GRPC, {})));
    assert.deepEqual(new Set(await Promise.all(calls)), new Set(['ok']));
    assert.equal(kedge.handshakes, 1);
  });

  it("gathers no listeners, and headers stay the caller's", async (t) => {
    const kedge = await startH2(t, ok);
    const { manager } = managerOf(kedge);
    const headers = Object.freeze({ ...GRPC, 'x-many': ['1', '2'] });
    const first = await manager.request('POST', '/', headers, {});
    const session = first.session!;
    await bodyOf(first);
    const count = () => session.eventNames().reduce((sum, name) => sum + session.listenerCount(name), 0);
    const before = count();
    for (let i = 0; i < 50; i += 1) await bodyOf(await manager.request('POST', '/', headers, {}));
    assert.equal(count(), before);
    assert.deepEqual(Object.keys(headers), ['content-type', 'x-many']);
  });

  it('keeps what a slow reader has not read yet, wherever the connection is by then', async (t) => {
    const text = 'x'.repeat(50_000);
    const kedge = await startH2(t, (stream) => {
      stream.respond({ ':status': 200, ...GRPC });
      stream.end(text);
    });
    const identity = rotating(kedge);
    const { dialer, manager } = managerOf(kedge, { identity });
    const stream = await manager.request('POST', '/', GRPC, {});
    stream.end();
    await once(stream, 'response');
    while (!stream.closed) await sleep(10);
    await identity.rotate();
    await bodyOf(await manager.request('POST', '/', GRPC, {}));
    while (dialer.stats().kedges[0]!.connections > 1) await sleep(50);
    // Not as an iterator: Node takes a stream that has ended on the wire for one that was cut.
    let body = '';
    stream.on('data', (chunk) => {
      body += chunk;
    });
    await once(stream, 'end');
    assert.equal(body, text);
  });

  it("keeps port 80 of the base URL, whatever gRPC's default is", async (t) => {
    const kedge = await startH2(t, ok);
    const dialer = kedge.dialer({ mapper: hostPorts({ 'a.test:80': kedge.route() }) });
    const seen = once(kedge.server, 'stream');
    const stream = await connectDialer(dialer).sessionManager('http://a.test:80').request('POST', '/', GRPC, {});
    await bodyOf(stream);
    assert.equal((await seen)[1][':authority'], 'a.test:80');
  });

  it('makes its first kedge usable again when it was there all along', async (t) => {
    let refuses = false;
    const server = http2.createServer({ settings: { maxConcurrentStreams: 1 } });
    server.on('stream', (stream) => setTimeout(() => ok(stream), 30));
    let atFirst = 0;
    server.on('stream', () => {
      atFirst += 1;
    });
    const first = await startKedge(t, {
      onH2: (socket) => server.emit('connection', socket),
      onTcp: (socket) => {
        if (refuses) socket.resetAndDestroy();
        return refuses;
      },
    });
    const second = await startH2(t, ok);
    const { dialer, manager } = managerOf(first, {
      mapper: single(first.route({ kedge: [first.url, second.url] })),
      failover: { breaker: { failures: 1, backoffMs: 100, maxBackoffMs: 200 } },
    });
    const call = async () => bodyOf(await manager.request('POST', '/', GRPC, {}));
    await call();
    refuses = true;
    await Promise.all([call(), call()]);
    refuses = false;
    const before = atFirst;
    for (let i = 0; i < 100 && atFirst < before + 5; i += 1) await call().then(() => sleep(10));
    assert.ok(atFirst >= before + 5);
    assert.equal(dialer.stats().kedges[0]!.breaker, 'closed');
  });
});
