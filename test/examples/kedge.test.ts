import assert from 'node:assert/strict';
import { once } from 'node:events';
import http from 'node:http';
import type { AddressInfo } from 'node:net';
import { describe, it, type TestContext } from 'node:test';
import tls from 'node:tls';
import * as grpc from '@grpc/grpc-js';
import * as undici from 'undici';
import { grpcDialer } from '../../src/grpc/index.ts';
import { type Echo, echoClient, startEchoServer, unary } from '../helpers/grpc-kedge.ts';
import { KEDGE_NAME, sha256 } from '../helpers/kedge.ts';
import { type ReferenceKedge, startReferenceKedge } from '../helpers/reference-kedge.ts';

const ORDERS = 'http://orders.us1:8080';
const GREETER = 'greeter.us1:9090';

/** The reference kedge with an HTTP and a gRPC backend. */
async function setUp(
  t: TestContext,
  answer: http.RequestListener,
  grpcPort = 1,
  bearerToken = '',
): Promise<ReferenceKedge> {
  const backend = http.createServer(answer).listen(0, '127.0.0.1');
  await once(backend, 'listening');
  const at = (port: number) => ({ dns_name: '127.0.0.1', port });
  const director = {
    http: {
      routes: [
        { backend_name: 'orders', host_matcher: 'orders.us1', port_matcher: 8080 },
        { backend_name: 'gone', host_matcher: 'gone.us1' },
      ],
    },
    grpc: {
      routes: [
        { backend_name: 'greeter', authority_host_matcher: 'greeter.us1' },
        { backend_name: 'gone', authority_host_matcher: 'gone.us1' },
      ],
    },
  };
  const pool = {
    http: {
      backends: [
        { name: 'orders', host: at((backend.address() as AddressInfo).port) },
        { name: 'gone', host: at(1) },
      ],
    },
    grpc: {
      backends: [
        { name: 'greeter', host: at(grpcPort) },
        { name: 'gone', host: at(1) },
      ],
    },
  };
  t.after(() => {
    backend.closeAllConnections();
    backend.close();
  });
  return startReferenceKedge(t, { director, backendPool: pool, bearerToken });
}

for (const protocol of ['h2', 'h1'] as const) {
  describe(`the reference kedge over ${protocol}`, () => {
    it('streams bodies both ways, and says who calls', async (t) => {
      const seen: http.IncomingMessage[] = [];
      const { dialer } = await setUp(t, (request, response) => {
        seen.push(request);
        response.setHeader('x-kedge-error', 'forged');
        response.setHeader('x-winch-error-type', 'forged');
        response.setHeader('x-own', 'value');
        request.pipe(response);
      });
      const body = Buffer.alloc(5_000_000, 'z');
      const response = await dialer({ http: { protocol } }).fetch(`${ORDERS}/a/../b?c=d`, {
        method: 'POST',
        body: ReadableStream.from([body, body]),
        duplex: 'half',
        headers: { 'x-forwarded-for': 'forged', 'x-kedge-client-subject': 'CN=forged', via: '9.9 forged' },
      } as RequestInit);
      assert.equal(response.status, 200);
      assert.equal(sha256(Buffer.from(await response.arrayBuffer())), sha256(Buffer.concat([body, body])));
      assert.equal(response.headers.get('x-own'), 'value');
      assert.equal(response.headers.get('x-kedge-backend-name'), 'orders');
      for (const name of ['x-kedge-error', 'x-winch-error-type']) assert.equal(response.headers.get(name), null);
      const { headers, url } = seen[0]!;
      assert.equal(url, '/b?c=d');
      assert.equal(headers.host, 'orders.us1:8080');
      assert.equal(headers['x-kedge-client-subject'], 'CN=pod');
      assert.equal(headers['x-forwarded-for'], '127.0.0.1');
      assert.equal(headers.via, `${protocol === 'h2' ? '2.0' : '1.1'} kedge`);
    });

    it('says why it cannot serve', async (t) => {
      const { dialer } = await setUp(t, (request, response) => {
        if (request.url === '/before') request.socket.destroy();
        else {
          response.writeHead(200, { 'content-length': '100' });
          response.write('part');
          setTimeout(() => request.socket.destroy(), 50);
        }
      });
      const { dispatcher } = dialer({ http: { protocol } });
      const errors: [string, number, string][] = [
        ['http://nobody.us1/', 502, 'no-route'],
        ['http://orders.us1/', 502, 'no-route'],
        ['http://gone.us1/', 502, 'no-connection-to-all-resolved-addresses'],
        [`${ORDERS}/before`, 502, 'transport-unknown-error'],
      ];
      for (const [url, status, type] of errors) {
        const { statusCode, headers, body } = await undici.request(url, { dispatcher });
        await body.dump();
        assert.deepEqual([statusCode, headers['x-kedge-error-type']], [status, type], url);
      }
      const { body } = await undici.request(`${ORDERS}/mid`, { dispatcher });
      await assert.rejects(body.text());
    });

    it('ends the request at the backend when the client goes away', async (t) => {
      const closed = Promise.withResolvers<void>();
      const arrived = Promise.withResolvers<void>();
      const { dialer } = await setUp(t, (_request, response) => {
        arrived.resolve();
        response.on('close', () => closed.resolve());
      });
      const abort = new AbortController();
      const call = dialer({ http: { protocol } }).fetch(ORDERS, { signal: abort.signal });
      await arrived.promise;
      abort.abort();
      await assert.rejects(call);
      await closed.promise;
    });

    it('asks for its bearer token and keeps it from the backend', async (t) => {
      const seen: http.IncomingHttpHeaders[] = [];
      const answer: http.RequestListener = (request, response) => {
        seen.push(request.headers);
        response.end();
      };
      const { dialer } = await setUp(t, answer, 1, 'right');
      for (const [token, status] of [
        ['right', 200],
        ['wrong', 401],
        [undefined, 401],
      ] as const) {
        const { statusCode, headers } = await undici.request(ORDERS, {
          dispatcher: dialer({ http: { protocol } }, token).dispatcher,
        });
        assert.equal(statusCode, status);
        assert.equal(headers['x-kedge-error-type'], status === 401 ? 'unauthorized' : undefined);
      }
      assert.equal(seen.length, 1);
      assert.equal(seen[0]!['proxy-authorization'], undefined);
    });

    it('drains: what is under way finishes', async (t) => {
      const release = Promise.withResolvers<void>();
      const arrived = Promise.withResolvers<void>();
      const { dialer, kedge } = await setUp(t, async (_request, response) => {
        arrived.resolve();
        await release.promise;
        response.end('whole');
      });
      const call = dialer({ http: { protocol } }).fetch(ORDERS);
      await arrived.promise;
      const closed = kedge.close(5000);
      release.resolve();
      assert.equal(await (await call).text(), 'whole');
      await closed;
    });
  });
}

describe('the reference kedge and gRPC', () => {
  const unused: http.RequestListener = (_request, response) => response.end();

  it('proxies the four kinds, binary metadata, details and large messages', async (t) => {
    const server = await startEchoServer(t, {
      unary: (call, callback) => {
        if (call.request.text === 'fail') {
          const metadata = new grpc.Metadata();
          metadata.set('detail-bin', Buffer.from([0, 255]));
          callback({ code: grpc.status.FAILED_PRECONDITION, details: 'not today', metadata });
        } else {
          callback(null, {
            text: call.request.text,
            authority: String(call.metadata.get('x-kedge-client-subject')[0]),
          });
        }
      },
    });
    const { dialer } = await setUp(t, unused, server.port);
    const client = new (grpcDialer(dialer()).wrap(echoClient()))(GREETER, undefined, {
      'grpc.max_receive_message_length': -1,
    });
    assert.deepEqual(await unary(client, 'hi'), { text: 'hi', authority: 'CN=pod' });
    await assert.rejects(unary(client, 'fail'), (error: grpc.ServiceError) => {
      assert.equal(error.code, grpc.status.FAILED_PRECONDITION);
      assert.deepEqual(error.metadata.get('detail-bin'), [Buffer.from([0, 255])]);
      return true;
    });
    const large = 'x'.repeat(4 * 1024 * 1024 - 100);
    assert.equal((await unary(client, large)).text.length, large.length);
    const joined = await new Promise<Echo>((resolve, reject) => {
      const call = client.clientStream(new grpc.Metadata(), (error, reply) =>
        error ? reject(error) : resolve(reply!),
      );
      for (const text of ['a', 'b', 'c']) call.write({ text });
      call.end();
    });
    assert.deepEqual(joined, { text: 'abc', authority: GREETER });
    const texts: string[] = [];
    for await (const { text } of client.serverStream({ text: 'xyz' }) as AsyncIterable<Echo>) texts.push(text);
    assert.deepEqual(texts, ['x', 'y', 'z']);
    const bidi = client.bidi();
    bidi.write({ text: 'ping' });
    const [reply] = (await once(bidi, 'data')) as [Echo];
    assert.equal(reply.text, 'ping');
    bidi.end();
    const [status] = (await once(bidi, 'status')) as [grpc.StatusObject];
    assert.equal(status.code, grpc.status.OK);
  });

  it('passes deadlines and cancellation on, and says why it cannot serve', async (t) => {
    const cancelled = Promise.withResolvers<void>();
    const server = await startEchoServer(t, { unary: (call) => call.on('cancelled', () => cancelled.resolve()) });
    const { dialer } = await setUp(t, unused, server.port, 'right');
    const { wrap } = grpcDialer(dialer({}, 'right'));
    const client = new (wrap(echoClient()))(GREETER);
    const call = client.unary({ text: 'x' }, () => {});
    const status = once(call, 'status');
    setTimeout(() => call.cancel(), 100);
    assert.equal(((await status) as [grpc.StatusObject])[0].code, grpc.status.CANCELLED);
    await cancelled.promise;
    await assert.rejects(unary(client, 'x', undefined, { deadline: Date.now() + 100 }), {
      code: grpc.status.DEADLINE_EXCEEDED,
    });
    await assert.rejects(unary(new (wrap(echoClient()))('nobody.us1:1'), 'x'), {
      code: grpc.status.UNIMPLEMENTED,
      details: 'unknown route to service',
    });
    await assert.rejects(unary(new (wrap(echoClient()))('gone.us1:1'), 'x'), { code: grpc.status.UNAVAILABLE });
    const stranger = new (grpcDialer(dialer({}, 'wrong')).wrap(echoClient()))(GREETER);
    await assert.rejects(unary(stranger, 'x'), { code: grpc.status.UNAUTHENTICATED });
  });
});

describe('the reference kedge and hostile clients', () => {
  it('answers 400 to requests whose host nobody can tell', async (t) => {
    let served = 0;
    const { kedge, client, ca } = await setUp(t, (_request, response) => {
      served += 1;
      response.end();
    });
    const raw = (lines: string) =>
      new Promise<string>((resolve, reject) => {
        const socket = tls.connect({
          port: kedge.port,
          host: '127.0.0.1',
          servername: KEDGE_NAME,
          ca,
          cert: client.cert,
          key: client.key,
          ALPNProtocols: ['http/1.1'],
        });
        let answer = '';
        socket.on('data', (chunk) => {
          answer += chunk;
          socket.end();
        });
        socket.on('close', () => resolve(answer));
        socket.on('error', reject);
        socket.write(lines);
      });
    const heads = [
      'GET / HTTP/1.1\r\nHost: orders.us1:8080\r\nHost: orders.us1:8080\r\n\r\n',
      'GET / HTTP/1.1\r\n\r\n',
      'GET / HTTP/1.0\r\n\r\n',
      'GET / HTTP/1.1\r\nHost:\r\n\r\n',
      'GET / HTTP/1.1\r\nHost: a,b\r\n\r\n',
      'GET / HTTP/1.1\r\nHost: u@a\r\n\r\n',
      'GET / HTTP/1.1\r\nHost: a/b\r\n\r\n',
      'GET http://orders.us1:8080/ HTTP/1.1\r\nHost: evil\r\n\r\n',
      'POST / HTTP/1.1\r\nHost: orders.us1:8080\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n',
      'POST / HTTP/1.1\r\nHost: orders.us1:8080\r\nContent-Length: +1\r\n\r\nx',
    ];
    for (const head of heads) assert.match(await raw(head), /^HTTP\/1\.1 400 /, head);
    assert.equal(served, 0);
    assert.match(
      await raw('CONNECT orders.us1:8080 HTTP/1.1\r\nHost: orders.us1:8080\r\n\r\n'),
      /^HTTP\/1\.1 405 .*\r\nallow: GET, [\s\S]*\r\n\r\nkedge: CONNECT is not served.*\n$/,
    );
    assert.match(
      await raw('GET http://orders.us1:8080/ HTTP/1.1\r\nHost: orders.us1:8080\r\n\r\n'),
      /^HTTP\/1\.1 200 /,
    );
  });
});
