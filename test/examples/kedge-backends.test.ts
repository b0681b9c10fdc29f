import assert from 'node:assert/strict';
import { once } from 'node:events';
import http from 'node:http';
import http2 from 'node:http2';
import https from 'node:https';
import net, { type AddressInfo } from 'node:net';
import { describe, it, type TestContext } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import * as undici from 'undici';
import { bearerGate } from '../../examples/kedge/auth.ts';
import { readConfig } from '../../examples/kedge/config.ts';
import { routeGrpc, routeHttp } from '../../examples/kedge/director.ts';
import { grpcDialer } from '../../src/grpc/index.ts';
import { createDialer, pem, single } from '../../src/index.ts';
import { echoClient, unary } from '../helpers/grpc-kedge.ts';
import { authority, KEDGE_NAME } from '../helpers/kedge.ts';
import { startReferenceKedge } from '../helpers/reference-kedge.ts';

const at = (port: number) => ({ dns_name: '127.0.0.1', port });

async function listen(t: TestContext, server: net.Server): Promise<number> {
  server.listen(0, '127.0.0.1');
  await once(server, 'listening');
  t.after(() => {
    if (server instanceof http.Server) server.closeAllConnections();
    server.close();
  });
  return (server.address() as AddressInfo).port;
}

/** A kedge before one HTTP and one gRPC backend. */
async function setUp(t: TestContext, answer: http.RequestListener, rpcPort = 1, more: object = {}) {
  const backend = http.createServer({ maxHeaderSize: 131_072 }, answer);
  const port = await listen(t, backend);
  const kedge = await startReferenceKedge(t, {
    director: {
      http: {
        routes: [
          { backend_name: 'orders', host_matcher: 'orders.us1' },
          { backend_name: 'nowhere', host_matcher: 'nowhere.us1' },
        ],
      },
      grpc: { routes: [{ backend_name: 'rpc' }] },
    },
    backendPool: {
      http: {
        backends: [
          { name: 'orders', host: at(port) },
          { name: 'nowhere', host: { dns_name: 'name.invalid', port: 80 } },
        ],
      },
      grpc: { backends: [{ name: 'rpc', host: at(rpcPort) }] },
    },
    ...more,
  });
  return kedge;
}

describe('a backend of the reference kedge', () => {
  for (const protocol of ['h1', 'h2'] as const)
    for (const manner of ['reads on', 'resets'] as const)
      it(`answers 413 in the middle of an upload over ${protocol}, and ${manner}: the client hears it`, async (t) => {
        const backend = net.createServer((socket) => {
          socket.on('error', () => {});
          socket.once('data', async () => {
            socket.write('HTTP/1.1 413 Too Large\r\nconnection: close\r\ncontent-length: 9\r\n\r\ntoo large');
            await sleep(200);
            if (manner === 'resets') socket.resetAndDestroy();
            else socket.end();
          });
        });
        const port = await listen(t, backend);
        const { kedge, client, ca } = await startReferenceKedge(t, {
          director: { http: { routes: [{ backend_name: 'orders' }] } },
          backendPool: { http: { backends: [{ name: 'orders', host: at(port) }] } },
        });
        const tls = { cert: client.cert, key: client.key, ca, servername: KEDGE_NAME };
        const url = `https://127.0.0.1:${kedge.port}`;
        const upload = async (body: NodeJS.WritableStream) => {
          for (let i = 0; i < 40 && body.writable; i += 1) {
            body.write(Buffer.alloc(100_000));
            await sleep(5);
          }
          body.end();
        };
        for (let i = 0; i < 5; i += 1) {
          if (protocol === 'h1') {
            const request = https.request(url, {
              ...tls,
              method: 'PUT',
              agent: false,
              headers: { host: 'orders.us1' },
            });
            request.on('error', () => {});
            void upload(request);
            const [response] = (await once(request, 'response')) as [http.IncomingMessage];
            assert.deepEqual([response.statusCode, await response.setEncoding('utf8').toArray()], [413, ['too large']]);
            request.destroy();
          } else {
            const session = http2.connect(url, tls);
            session.on('error', () => {});
            const stream = session.request({ ':method': 'PUT', ':path': '/', ':authority': 'orders.us1' });
            stream.on('error', () => {});
            void upload(stream);
            const [headers] = (await once(stream, 'response')) as [http2.IncomingHttpHeaders];
            assert.deepEqual([headers[':status'], await stream.setEncoding('utf8').toArray()], [413, ['too large']]);
            session.destroy();
          }
        }
      });

  it('is connected to before its first request, and that connection serves it', async (t) => {
    const server = http.createServer((_request, response) => response.end('hi'));
    let connections = 0;
    server.on('connection', () => {
      connections += 1;
    });
    const port = await listen(t, server);
    const rpc = net.createServer((socket) => socket.on('error', () => {}).resume());
    const greeted = once(rpc, 'connection');
    const rpcPort = await listen(t, rpc);
    const { dialer } = await startReferenceKedge(t, {
      director: { http: { routes: [{ backend_name: 'orders' }] } },
      backendPool: {
        http: { backends: [{ name: 'orders', host: at(port) }] },
        grpc: { backends: [{ name: 'rpc', host: at(rpcPort) }] },
      },
    });
    const [socket] = (await greeted) as [net.Socket];
    socket.destroy();
    for (let i = 0; i < 100 && connections === 0; i += 1) await sleep(20);
    assert.equal(connections, 1);
    assert.equal(await (await dialer().fetch('http://orders.us1/')).text(), 'hi');
    assert.equal(connections, 1);
  });

  it('for gRPC gets another connection when one is full, and says so when there can be no more', async (t) => {
    const held: http2.ServerHttp2Stream[] = [];
    const server = http2.createServer({ settings: { maxConcurrentStreams: 2 } });
    server.on('session', (session) => session.on('error', () => {}));
    server.on('stream', (stream) => {
      stream.on('error', () => {});
      held.push(stream);
    });
    const rpcPort = await listen(t, server as never);
    const { dialer } = await setUp(t, (_request, response) => response.end(), rpcPort);
    const client = new (grpcDialer(dialer()).wrap(echoClient()))('any.us1:1');
    const calls = Array.from({ length: 10 }, () => unary(client, 'x').catch((error) => error.code as number));
    for (let i = 0; i < 150 && held.length < 10; i += 1) await sleep(20);
    assert.equal(held.length, 10, 'all calls reach the backend');
    const more = Array.from({ length: 60 }, () =>
      unary(client, 'x', undefined, { deadline: Date.now() + 15_000 }).catch((error) => error.code as number),
    );
    assert.equal(await Promise.race(more), 8, 'what is above a share is told so');
    for (const stream of held)
      stream.respond({ 'content-type': 'application/grpc', 'grpc-status': '9' }, { endStream: true });
    assert.deepEqual(new Set(await Promise.all(calls)), new Set([9]));
    client.close();
  });

  it('gets no header that others read as one of the kedge, nor the proxy authorization, with or without a gate', async (t) => {
    const seen: http.IncomingHttpHeaders[] = [];
    const { dialer } = await setUp(t, (request, response) => {
      seen.push(request.headers);
      response.end();
    });
    const headers = {
      x_kedge_client_subject: 'CN=root',
      proxy_authorization: 'Bearer x',
      'X-Forwarded_For': 'forged',
      'proxy-authorization': 'Bearer stays-here',
      x_own: 'kept',
      cookie: 'a=b',
    };
    for (const protocol of ['h1', 'h2'] as const)
      await (await dialer({ http: { protocol } }).fetch('http://orders.us1/', { headers })).text();
    assert.equal(seen.length, 2);
    for (const { x_own, cookie, ...rest } of seen) {
      assert.deepEqual([x_own, cookie], ['kept', 'a=b']);
      assert.doesNotMatch(JSON.stringify(rest), /root|forged|Bearer/);
      assert.equal(rest['x-kedge-client-subject'], 'CN=pod');
    }
  });

  it('is told of clients whose name is not in Latin', async (t) => {
    const { kedge, ca } = await setUp(t, (request, response) =>
      response.end(String(request.headers['x-kedge-client-subject'])),
    );
    const { cert, key } = await (await authority()).issue({ cn: 'Пётр' });
    const mapper = single({ kedge: `https://127.0.0.1:${kedge.port}`, serverName: KEDGE_NAME });
    const dialer = createDialer({ mapper, identity: pem({ cert, key, ca }) });
    t.after(() => dialer.destroy());
    const response = await dialer.fetch('http://orders.us1/');
    assert.equal(response.status, 200);
    assert.equal(decodeURIComponent(await response.text()), 'CN=Пётр');
  });

  it('takes large heads, and answers with them', async (t) => {
    const { kedge, client, ca } = await setUp(t, (request, response) => {
      response.setHeader('x-large', 'y'.repeat(30_000));
      response.end(String(Object.keys(request.headers).filter((name) => name.startsWith('x-n')).length));
    });
    const many = Object.fromEntries(Array.from({ length: 300 }, (_, i) => [`x-n${i}`, 'v'.repeat(100)]));
    const options = { ...client, ca, servername: KEDGE_NAME };
    const asked = https.get({
      ...options,
      host: '127.0.0.1',
      port: kedge.port,
      headers: { ...many, host: 'orders.us1' },
      maxHeaderSize: 131_072,
      agent: false,
    });
    const [h1] = (await once(asked, 'response')) as [http.IncomingMessage];
    assert.deepEqual([h1.statusCode, h1.headers['x-large']?.length], [200, 30_000]);
    assert.equal(String((await h1.toArray())[0]), '300');
    const session = http2.connect(`https://127.0.0.1:${kedge.port}`, options);
    t.after(() => session.destroy());
    const stream = session.request({ ...many, ':authority': 'orders.us1' });
    const [h2] = (await once(stream, 'response')) as [http2.IncomingHttpHeaders];
    assert.deepEqual([h2[':status'], h2['x-large']?.length], [200, 30_000]);
    assert.equal(String((await stream.toArray())[0]), '300');
  });

  it('is named in errors of the kedge, whose types are those of the original', async (t) => {
    const { dialer } = await setUp(t, (request) => request.socket.destroy());
    const { dispatcher } = dialer();
    for (const [url, type, name] of [
      ['http://orders.us1/', 'transport-unknown-error', 'orders'],
      ['http://nowhere.us1/', 'no-resolution-available', 'nowhere'],
    ] as const) {
      const { statusCode, headers, body } = await undici.request(url, { dispatcher });
      await body.dump();
      assert.deepEqual([statusCode, headers['x-kedge-error-type'], headers['x-kedge-backend-name']], [502, type, name]);
    }
  });

  it('sees a body that waits for 100-continue over HTTP/2', async (t) => {
    const { kedge, client, ca } = await setUp(t, (request, response) => request.pipe(response));
    const session = http2.connect(`https://127.0.0.1:${kedge.port}`, { ...client, ca, servername: KEDGE_NAME });
    t.after(() => session.destroy());
    const stream = session.request({ ':method': 'POST', ':authority': 'orders.us1', expect: '100-continue' });
    stream.once('continue', () => stream.end('body'));
    const [head] = (await once(stream, 'response')) as [http2.IncomingHttpHeaders];
    assert.equal(head[':status'], 200);
    stream.setEncoding('utf8');
    let text = '';
    for await (const chunk of stream) text += chunk;
    assert.equal(text, 'body');
  });

  it('keeps what is under way when the configuration drops it', async (t) => {
    const held = Promise.withResolvers<http.ServerResponse>();
    const backend = http.createServer((_request, response) => held.resolve(response));
    const port = await listen(t, backend);
    const pool = { http: { backends: [{ name: 'orders', host: at(port) }] } };
    const { HttpLine } = await import('../../examples/kedge/http-line.ts');
    const { dialOf } = await import('../../examples/kedge/dial.ts');
    const config = readConfig({ file: 'd', text: '{}' }, { file: 'p', text: JSON.stringify(pool) });
    const line = new HttpLine(
      { host: '127.0.0.1', port },
      dialOf('http', config.http.backends.get('orders')!, new Map()),
      false,
      16_384,
    );
    const ended = Promise.withResolvers<string>();
    let text = '';
    line.dispatch(
      { path: '/', method: 'GET' },
      {
        onRequestStart: () => {},
        onResponseStart: () => {},
        onResponseData: (_controller, chunk) => {
          text += chunk;
        },
        onResponseEnd: () => ended.resolve(text),
        onResponseError: (_controller, error) => ended.reject(error),
      },
    );
    const response = await held.promise;
    line.close();
    await sleep(100);
    response.end('whole');
    assert.equal(await ended.promise, 'whole');
  });
});

describe('the gate and the routes of the reference kedge', () => {
  it('take the authentication scheme in any case', async () => {
    const gate = bearerGate('right');
    for (const header of ['Bearer right', 'bearer right', 'BEARER right'])
      assert.equal(await gate.admits(header), true, header);
    for (const header of ['Bearerright', 'Basic right', 'bearer wrong', 'right', ''])
      assert.equal(await gate.admits(header), false, header);
  });

  it('are shown all values of a header: the first counts for HTTP, any for gRPC', () => {
    const backends = ['one', 'two'].map((name) => ({ name, host: at(1) }));
    const config = readConfig(
      {
        file: 'd',
        text: JSON.stringify({
          http: { routes: [{ backend_name: 'one', header_matcher: { 'X-Which': 'zero' } }, { backend_name: 'two' }] },
          grpc: { routes: [{ backend_name: 'one', metadata_matcher: { 'x-which': 'two' } }, { backend_name: 'two' }] },
        }),
      },
      { file: 'p', text: JSON.stringify({ http: { backends }, grpc: { backends } }) },
    );
    const target = (headers: Record<string, string[]>) => ({
      host: 'a',
      port: 80,
      path: '/',
      mode: 'REVERSE_PROXY' as const,
      headers,
    });
    assert.equal(routeHttp(config.http.routes, target({ 'x-which': ['zero', 'two'] }))?.backendName, 'one');
    assert.equal(routeHttp(config.http.routes, target({ 'x-which': ['two', 'zero'] }))?.backendName, 'two');
    const call = (metadata: Record<string, string[]>) => ({ method: 's/m', host: 'a', port: 80, metadata });
    assert.equal(routeGrpc(config.grpc.routes, call({ 'x-which': ['zero', 'two'] }))?.backendName, 'one');
    assert.equal(routeGrpc(config.grpc.routes, call({ 'x-which': ['zero'] }))?.backendName, 'two');
  });

  it('see each header on its own, as the client sent it', async (t) => {
    const ports = await twoBackends(t);
    const { kedge, client, ca } = await startReferenceKedge(t, {
      director: {
        http: { routes: [{ backend_name: 'one', header_matcher: { 'x-which': 'zero' } }, { backend_name: 'two' }] },
      },
      backendPool: {
        http: {
          backends: [
            { name: 'one', host: at(ports[0]!) },
            { name: 'two', host: at(ports[1]!) },
          ],
        },
      },
    });
    const session = http2.connect(`https://127.0.0.1:${kedge.port}`, { ...client, ca, servername: KEDGE_NAME });
    t.after(() => session.destroy());
    const name = async (values: string[]) => {
      const stream = session.request({ ':authority': 'a.us1', 'x-which': values });
      stream.resume();
      const [head] = (await once(stream, 'response')) as [http2.IncomingHttpHeaders];
      return head['x-kedge-backend-name'];
    };
    assert.equal(await name(['zero', 'two']), 'one');
    assert.equal(await name(['two', 'zero']), 'two');
  });

  it('have a default port of 80 for adhoc rules over HTTP and of 81 over gRPC, as the original', () => {
    const rules = [{ dns_name_matcher: '*' }, { dns_name_matcher: '*', port: { allowed: [1] } }];
    const config = readConfig(
      { file: 'd', text: JSON.stringify({ http: { adhoc_rules: rules }, grpc: { adhoc_rules: rules } }) },
      { file: 'p', text: '{}' },
    );
    assert.deepEqual(
      config.http.adhocRules.map(({ port }) => port.default),
      [80, 80],
    );
    assert.deepEqual(
      config.grpc.adhocRules.map(({ port }) => port.default),
      [81, 81],
    );
  });
});

async function twoBackends(t: TestContext) {
  const servers = [0, 1].map(() => http.createServer((_request, response) => response.end()));
  return Promise.all(servers.map((server) => listen(t, server)));
}

describe('a bearer token whose scheme is in lower case', () => {
  it('is let in over HTTP/1.1 and HTTP/2, and a wrong one is not', async (t) => {
    const { kedge, client, ca } = await setUp(t, (_request, response) => response.end('in'), 1, {
      bearerToken: 'right',
    });
    const tls = { ...client, ca, servername: KEDGE_NAME };
    const session = http2.connect(`https://127.0.0.1:${kedge.port}`, tls);
    t.after(() => session.destroy());
    for (const [token, status] of [
      ['bearer right', 200],
      ['bearer wrong', 401],
    ] as const) {
      const headers = { 'proxy-authorization': token };
      const to = { host: '127.0.0.1', port: kedge.port, agent: false };
      const asked = https.get({ ...tls, ...to, headers: { ...headers, host: 'orders.us1' } });
      const [h1] = (await once(asked, 'response')) as [http.IncomingMessage];
      h1.resume();
      const stream = session.request({ ...headers, ':authority': 'orders.us1' }).resume();
      const [h2] = (await once(stream, 'response')) as [http2.IncomingHttpHeaders];
      assert.deepEqual([h1.statusCode, h2[':status']], [status, status], token);
    }
  });
});

describe('an upgrade without a token', () => {
  it('is refused as every other request', async (t) => {
    const { kedge, client, ca } = await setUp(t, (_request, response) => response.end(), 1, { bearerToken: 'right' });
    const headers = { connection: 'upgrade', upgrade: 'websocket', host: 'orders.us1' };
    const asked = https.request({
      host: '127.0.0.1',
      port: kedge.port,
      ...client,
      ca,
      servername: KEDGE_NAME,
      headers,
      agent: false,
    });
    asked.end();
    const [response] = (await once(asked, 'response')) as [http.IncomingMessage];
    response.resume();
    assert.deepEqual([response.statusCode, response.headers['x-kedge-error-type']], [401, 'unauthorized']);
  });
});

describe('an upgrade that the backend refuses', () => {
  it('is that refusal, whole and as it was: its status, its headers and its chunks without their framing', async (t) => {
    for (const [how, bytes] of [
      ['in chunks', 'transfer-encoding: chunked\r\n\r\n2\r\nno\r\n0\r\n\r\n'],
      ['in more of them', 'transfer-encoding: chunked\r\n\r\n1\r\nn\r\n1\r\no\r\n0\r\n\r\n'],
      ['with a length', 'content-length: 2\r\n\r\nno'],
      ['until it closes', 'connection: close\r\n\r\nno'],
    ] as const) {
      const backend = net.createServer((socket) => {
        socket.on('error', () => {});
        socket.once('data', () => socket.end(`HTTP/1.1 403 Forbidden\r\nx-own: kept\r\n${bytes}`));
      });
      const port = await listen(t, backend);
      const { kedge, client, ca } = await startReferenceKedge(t, {
        director: { http: { routes: [{ backend_name: 'orders', host_matcher: 'orders.us1' }] } },
        backendPool: { http: { backends: [{ name: 'orders', host: { dns_name: '127.0.0.1', port } }] } },
      });
      const headers = { connection: 'upgrade', upgrade: 'websocket', host: 'orders.us1' };
      const to = { host: '127.0.0.1', port: kedge.port, servername: KEDGE_NAME, agent: false };
      const asked = https.request({ ...to, ...client, ca, headers }).end();
      const [response] = (await once(asked, 'response')) as [http.IncomingMessage];
      const body = Buffer.concat(await response.toArray()).toString();
      assert.deepEqual([response.statusCode, response.headers['x-own'], body], [403, 'kept', 'no'], how);
      assert.equal(response.complete, true, how);
    }
  });
});
