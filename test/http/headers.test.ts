import assert from 'node:assert/strict';
import { describe, it } from 'node:test';
import * as undici from 'undici';
import { type KedgeError, single, staticToken } from '../../src/index.ts';
import { startKedge } from '../helpers/kedge.ts';

const ORIGIN = 'http://orders.us1:8080';
type Headers = undici.Dispatcher.DispatchOptions['headers'];

describe('the headers of a mapped request', () => {
  it('may come in every form, and are never changed', async (t) => {
    const kedge = await startKedge(t);
    const mapper = single(kedge.route({ proxyAuth: staticToken('proxy'), backendAuth: staticToken('backend') }));
    const { dispatcher } = kedge.dialer({ mapper });
    const object = Object.freeze({
      'X-Own': 'value',
      'x-list': Object.freeze(['a', 'b']) as string[],
      Host: 'ORDERS.us1:8080',
    });
    const flat = Object.freeze([
      'X-Own',
      'value',
      'x-list',
      'a',
      'x-list',
      'b',
      'host',
      'orders.us1.:8080',
    ]) as string[];
    const pairs: [string, string][] = [
      ['X-Own', 'value'],
      ['x-list', 'a'],
      ['x-list', 'b'],
    ];
    const forms: Record<string, Headers> = {
      object,
      'null prototype': Object.assign(Object.create(null), object),
      flat,
      Headers: new undici.Headers(pairs),
      Map: new Map<string, string | string[]>([
        ['X-Own', 'value'],
        ['x-list', ['a', 'b']],
      ]) as unknown as Headers,
      generator: (function* () {
        yield* pairs;
      })(),
    };
    for (const [form, headers] of Object.entries(forms)) {
      await undici.request(ORIGIN, { dispatcher, headers });
      const seen = kedge.seen.at(-1)!;
      assert.equal(seen.authority, 'orders.us1:8080', form);
      assert.equal(seen.headers['x-own'], 'value', form);
      assert.equal(seen.headers['x-list'], 'a, b', form);
      assert.equal(seen.headers.authorization, 'Bearer backend', form);
      assert.equal(seen.headers['proxy-authorization'], 'Bearer proxy', form);
    }
    await undici.request(ORIGIN, { dispatcher, headers: null });
    assert.deepEqual(object, { 'X-Own': 'value', 'x-list': ['a', 'b'], Host: 'ORDERS.us1:8080' });
  });

  it('let the caller win, or the route where it says so', async (t) => {
    const kedge = await startKedge(t);
    const backendAuth = staticToken('backend');
    const own = kedge.dialer({ mapper: single(kedge.route({ backendAuth })) }).dispatcher;
    const overriding = kedge.dialer({
      mapper: single(kedge.route({ backendAuth, overrideAuthorization: true })),
    }).dispatcher;
    const without = kedge.dialer({ http: { requestId: false } }).dispatcher;
    const headers = { Authorization: 'Basic own', 'X-Kedge-Request-ID': 'mine', connection: 'close' };
    await undici.request(ORIGIN, { dispatcher: own, headers });
    assert.equal(kedge.seen.at(-1)!.headers.authorization, 'Basic own');
    assert.equal(kedge.seen.at(-1)!.headers['x-kedge-request-id'], 'mine');
    await undici.request(ORIGIN, { dispatcher: overriding, headers });
    assert.equal(kedge.seen.at(-1)!.headers.authorization, 'Bearer backend');
    await undici.request(ORIGIN, { dispatcher: without, headers: { 'proxy-authorization': 'Basic own' } });
    assert.equal(kedge.seen.at(-1)!.headers['x-kedge-request-id'], undefined);
    assert.equal(kedge.seen.at(-1)!.headers['proxy-authorization'], 'Basic own');
  });

  const hostile: [string, unknown][] = [
    ['another host', { host: 'evil' }],
    ['another port', { host: 'orders.us1' }],
    ['an empty host', { host: '' }],
    ['a host with a space', { host: 'a b' }],
    ['a latin1 host', { host: 'é' }],
    ['a host list', { host: ['orders.us1:8080', 'evil'] }],
    ['proxy-authorization', { 'Proxy-Authorization': 'x' }],
    ['proxy-authorization in an array', ['PROXY-AUTHORIZATION', 'x']],
    ['proxy-authorization in an iterator', new Map([['proxy-Authorization', 'x']])],
    ['two authorizations', ['authorization', 'a', 'Authorization', 'b']],
    ['an authorization list', { authorization: ['a', 'b'] }],
    ['transfer-encoding', { 'transfer-encoding': 'chunked' }],
    ['keep-alive', { 'keep-alive': 'timeout=5' }],
    ['a connection header that names others', { connection: 'close, x-own' }],
    ['te other than trailers', { te: 'gzip' }],
    ['te with more than trailers', { TE: 'trailers, deflate' }],
    ['te as a list', { te: ['trailers', 'deflate'] }],
    ['proxy-connection', { 'Proxy-Connection': 'keep-alive' }],
    ['http2-settings', ['HTTP2-Settings', 'AAMAAABkAAQAoAAAAAIAAAAA']],
    ['an upgrade header', { upgrade: 'h2c' }],
    ['content-lengths that disagree', ['content-length', '3', 'content-length', '4']],
    ['content-lengths that disagree in one', { 'content-length': '3, 4' }],
    ['a content-length that is none', { 'content-length': '+3' }],
    ['expect', { expect: '100-continue' }],
    ['an odd array', ['x-own']],
    ['a name that is none', { 'a b': 'x' }],
    ['a value with a newline', { 'x-own': 'a\r\nb: c' }],
    ['a value that is an object', { 'x-own': {} }],
    ['a string', 'x: y'],
    ['pairs that are none', new Set(['ab'])],
  ];
  it('are refused where they could mean two things, before anything is sent', async (t) => {
    const kedge = await startKedge(t);
    const { dispatcher } = kedge.dialer({ mapper: single(kedge.route({ proxyAuth: staticToken('proxy') })) });
    for (const [what, headers] of hostile) {
      const options = { dispatcher, headers: headers as Headers, method: 'POST' as const, body: 'abc' };
      await assert.rejects(undici.request(ORIGIN, options), (error: KedgeError) => {
        assert.equal(error.code, 'ERR_KEDGE_REQUEST', what);
        assert.equal(error.target, 'orders.us1:8080', what);
        return true;
      });
    }
    const paths = ['http://169.254.169.254/', 'no-slash', '/a b', '/a\rb', '/a\nb', '/\0', '/ü€', ''];
    for (const path of paths) {
      const outcome = await new Promise<unknown>((resolve) => {
        dispatcher.dispatch(
          { origin: ORIGIN, path, method: 'GET' },
          {
            onRequestStart() {},
            onResponseStart: () => resolve('sent'),
            onResponseError: (_controller, error) => resolve((error as KedgeError).code),
          },
        );
      });
      assert.equal(outcome, 'ERR_KEDGE_REQUEST', path);
    }
    assert.equal(kedge.seen.length, 0);
  });

  it('stop nothing but their own request where undici turns them down', async (t) => {
    for (const protocol of ['h2', 'h1'] as const) {
      const kedge = await startKedge(t);
      const { dispatcher } = kedge.dialer({ http: { protocol, connections: 1 } });
      for (let round = 0; round < 3; round += 1) {
        const calls = Array.from({ length: 20 }, (_, i) => {
          const headers = i % 2 ? { 'x-good': 'value' } : { 'x-bad': 'a\nb' };
          return undici.request(ORIGIN, { dispatcher, headers }).then(
            async ({ body }) => {
              await body.dump();
              return 'good';
            },
            ({ code }) => code,
          );
        });
        const outcomes = await Promise.all(calls);
        assert.deepEqual(
          outcomes,
          outcomes.map((_, i) => (i % 2 ? 'good' : 'ERR_KEDGE_REQUEST')),
        );
      }
    }
  });

  const ending: [string, Headers][] = [
    ['te', { te: 'gzip' }],
    ['te twice', ['te', 'trailers', 'TE', 'trailers']],
    ['proxy-connection', { 'proxy-connection': 'close' }],
    ['http2-settings', { 'http2-settings': 'AAMAAABk' }],
    ['one name in two spellings', ['User-Agent', 'a', 'user-agent', 'b']],
    ['one name in two spellings, the odd one last', ['content-type', 'a/b', 'cONTENT-TYPE', 'c/d']],
    ['one name in two spellings, as an object', { Range: 'bytes=0-1', RANGE: 'bytes=1-2' }],
  ];
  it('cannot end the connection, and with it the calls of others', async (t) => {
    const gate = Promise.withResolvers<void>();
    const kedge = await startKedge(t, {
      alpn: ['h2'],
      handler: (request, response) => {
        if (request.url === '/slow') gate.promise.then(() => response.end('slow'));
        else response.end(JSON.stringify(request.headers));
      },
    });
    const { dispatcher } = kedge.dialer({ http: { connections: 1 } });
    const slow = undici.request(`${ORIGIN}/slow`, { dispatcher, method: 'POST', body: 'x' });
    while (kedge.seen.length === 0) await new Promise(setImmediate);
    for (const [what, headers] of ending) {
      const outcome = await undici.request(ORIGIN, { dispatcher, headers }).then(
        ({ body }) => body.json(),
        ({ code }) => code,
      );
      assert.ok(outcome === 'ERR_KEDGE_REQUEST' || typeof outcome === 'object', `${what}: ${outcome}`);
    }
    gate.resolve();
    assert.equal(await (await slow).body.text(), 'slow');
    assert.equal(kedge.handshakes, 1);
    const twice = { 'X-Own': 'a', 'x-own': 'b', TE: 'Trailers', te: 'trailers' };
    const { body } = await undici.request(ORIGIN, { dispatcher, headers: twice });
    const seen = (await body.json()) as Record<string, string>;
    assert.deepEqual([seen['x-own'], seen.te], ['a, b', 'trailers']);
  });

  it('keep the path as it is', async (t) => {
    const kedge = await startKedge(t);
    const { dispatcher } = kedge.dialer();
    for (const path of ['//evil/x', '/../x', '/%2e%2e/x', '/a?b=//c#']) {
      await dispatcher.request({ origin: ORIGIN, path, method: 'GET' });
      assert.equal(kedge.seen.at(-1)!.path, path);
    }
    await dispatcher.request({ origin: ORIGIN, path: '/q', method: 'GET', query: { a: 1 } });
    assert.equal(kedge.seen.at(-1)!.path, '/q?a=1');
  });
});
