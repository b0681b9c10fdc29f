import assert from 'node:assert/strict';
import { createReadStream } from 'node:fs';
import type http2 from 'node:http2';
import { Readable, type Writable } from 'node:stream';
import { describe, it, type TestContext } from 'node:test';
import * as undici from 'undici';
import {
  createDialer,
  type DialerOptions,
  isKedgeError,
  type KedgeError,
  pem,
  route,
  single,
  staticToken,
  type TokenSource,
} from '../../src/index.ts';
import { startKedge, type TestKedge } from '../helpers/kedge.ts';

const TARGET = 'http://orders.us1:8080/';

interface Expected {
  code: string;
  stage: string;
  message?: RegExp;
}

/** The same failure through built-in fetch, undici's fetch and undici's request. */
async function fails(t: TestContext, options: DialerOptions, expected: Expected): Promise<void> {
  const dialer = createDialer(options);
  t.after(() => dialer.destroy());
  const { dispatcher } = dialer;
  const calls = {
    fetch: fetch(TARGET, { dispatcher }).catch((error) => error.cause),
    'undici fetch': undici.fetch(TARGET, { dispatcher }).catch((error) => error.cause),
    request: undici.request(TARGET, { dispatcher, method: 'POST', body: 'x' }).catch((error) => error),
  };
  for (const [caller, call] of Object.entries(calls)) {
    const error: unknown = await call;
    assert.ok(isKedgeError(error), `${caller}: ${error}`);
    assert.equal(error.code, expected.code, caller);
    assert.equal(error.stage, expected.stage, caller);
    assert.equal(error.target, 'orders.us1:8080', caller);
    assert.match(error.message, /orders\.us1:8080/, caller);
    if (!['map', 'token'].includes(expected.stage)) assert.ok(error.message.includes(`kedge ${error.kedge}`), caller);
    if (expected.message !== undefined) assert.match(error.message, expected.message, caller);
  }
}

describe('a call that cannot be made', () => {
  const identityOf = (kedge: TestKedge) => pem({ cert: kedge.client.cert, key: kedge.client.key, ca: kedge.ca.cert });

  for (const protocol of ['auto', 'h1'] as const) {
    it(`says which kedge, which stage and why (${protocol})`, async (t) => {
      const http = { protocol };
      const kedge = await startKedge(t);
      const identity = identityOf(kedge);
      const connect = { timeoutMs: 1000, handshakeTimeoutMs: 200 };
      await fails(
        t,
        { http, mapper: single('https://127.0.0.1:1') },
        { code: 'ERR_KEDGE_CONNECT', stage: 'connect', message: /ECONNREFUSED/ },
      );
      await fails(
        t,
        { http, mapper: single('https://kedge.invalid') },
        { code: 'ERR_KEDGE_DNS', stage: 'dns', message: /kedge\.invalid/ },
      );
      await fails(
        t,
        { http, identity, mapper: single(kedge.url) },
        { code: 'ERR_KEDGE_CERTIFICATE', stage: 'tls', message: /altnames/ },
      );
      await fails(
        t,
        { http, mapper: single(kedge.route()) },
        { code: 'ERR_KEDGE_CERTIFICATE', stage: 'tls', message: /self-signed|unable to/ },
      );
      const silent = await startKedge(t, { onTcp: () => true });
      await fails(
        t,
        { http, connect, identity, mapper: single(silent.route()) },
        { code: 'ERR_KEDGE_TLS_TIMEOUT', stage: 'tls', message: /200 ms/ },
      );
      const closing = await startKedge(t, { onTcp: (socket) => Boolean(socket.destroy()) });
      await fails(t, { http, identity, mapper: single(closing.route()) }, { code: 'ERR_KEDGE_TLS', stage: 'tls' });
      const pinned = kedge.route({ peer: { spkiPins: [`${'A'.repeat(43)}=`] } });
      await fails(
        t,
        { http, identity, mapper: single(pinned) },
        { code: 'ERR_KEDGE_CERTIFICATE', stage: 'tls', message: /not pinned/ },
      );
      const spiffe = kedge.route({ peer: { spiffeId: 'spiffe://other/kedge' } });
      await fails(
        t,
        { http, identity, mapper: single(spiffe) },
        { code: 'ERR_KEDGE_CERTIFICATE', stage: 'tls', message: /spiffe/ },
      );
    });
  }

  it('says that the kedge refused our certificate', async (t) => {
    const kedge = await startKedge(t);
    for (const protocol of ['h2', 'h1'] as const) {
      const mapper = single(kedge.route({ peer: { dangerouslySkipVerification: true } }));
      const { dispatcher } = kedge.dialer({ http: { protocol }, identity: undefined, mapper, onWarning: () => {} });
      const codes = new Set<string>();
      for (let i = 0; i < 20; i += 1) {
        await assert.rejects(undici.request(TARGET, { dispatcher }), (error: KedgeError) =>
          Boolean(codes.add(error.code)),
        );
      }
      assert.deepEqual([...codes], ['ERR_KEDGE_CLIENT_CERTIFICATE']);
    }
  });

  it('refuses an expired identity before dialling', async (t) => {
    const kedge = await startKedge(t);
    const notAfter = new Date(Date.now() - 1000);
    const { cert, key } = await kedge.ca.issue({ cn: 'pod', notBefore: new Date(0), notAfter });
    const identity = pem({ cert, key, ca: kedge.ca.cert });
    const message = new RegExp(notAfter.toISOString().slice(0, 19));
    await fails(
      t,
      { identity, mapper: single(kedge.route()) },
      { code: 'ERR_KEDGE_IDENTITY_EXPIRED', stage: 'tls', message },
    );
    assert.equal(kedge.handshakes, 0);
  });

  it('fails 1,000 queued calls together when the handshake stalls', async (t) => {
    const silent = await startKedge(t, { onTcp: () => true });
    const { dispatcher } = silent.dialer({ connect: { handshakeTimeoutMs: 300 } });
    const begin = performance.now();
    const calls = Array.from({ length: 1000 }, () =>
      undici.request(TARGET, { dispatcher }).then(
        () => 'ok',
        (error) => error.code,
      ),
    );
    assert.deepEqual(new Set(await Promise.all(calls)), new Set(['ERR_KEDGE_TLS_TIMEOUT']));
    // One after another they would take five minutes.
    assert.ok(performance.now() - begin < 10_000);
  });

  it('goes to the next kedge when no connection can be made, with any method and body', async (t) => {
    const kedge = await startKedge(t);
    const silent = await startKedge(t, { onTcp: () => true });
    const kedges = ['https://127.0.0.1:1', silent.url, kedge.url];
    const { dispatcher } = kedge.dialer({
      connect: { handshakeTimeoutMs: 200 },
      mapper: single(kedge.route({ kedge: kedges })),
    });
    const body = ReadableStream.from([Buffer.from('one'), Buffer.from('shot')]);
    const response = await fetch(TARGET, { dispatcher, method: 'POST', body, duplex: 'half' });
    assert.equal(((await response.json()) as { bytes: number }).bytes, 7);
  });

  it('breaks off when the connection is lost', async (t) => {
    const kedge = await startKedge(t, {
      handler: (request, response) => {
        if (request.url === '/never') return;
        if (request.url === '/before') {
          for (const socket of kedge.sockets) socket.destroy();
        } else {
          (response as Writable).write('part');
          setTimeout(() => {
            for (const socket of kedge.sockets) socket.destroy();
          }, 50);
        }
      },
    });
    for (const protocol of ['h2', 'h1'] as const) {
      const { dispatcher } = kedge.dialer({ http: { protocol } });
      await assert.rejects(undici.request(`${TARGET}before`, { dispatcher }), (error: KedgeError) => {
        assert.deepEqual([error.code, error.stage, error.target], ['ERR_KEDGE_CONNECTION', 'kedge', 'orders.us1:8080']);
        assert.ok(error.cause instanceof Error);
        return true;
      });
      const { body } = await undici.request(`${TARGET}mid`, { dispatcher });
      await assert.rejects(body.text(), { code: 'ERR_KEDGE_CONNECTION' });
      await assert.rejects(undici.request(`${TARGET}never`, { dispatcher, headersTimeout: 100 }), {
        code: 'ERR_KEDGE_TIMEOUT',
      });
    }
  });
});

describe('a call that breaks by itself', () => {
  it('is told its own error, not that the connection was lost', async (t) => {
    const kedge = await startKedge(t, { handler: (request) => request.resume() });
    for (const protocol of ['h2', 'h1'] as const) {
      const { dispatcher } = kedge.dialer({ http: { protocol } });
      const denied = Object.assign(new Error('denied'), { code: 'EACCES' });
      const broken = async function* (error = denied) {
        yield 'a';
        throw error;
      };
      const own: [undici.Dispatcher.DispatchOptions['body'], unknown][] = [
        [createReadStream('/no/such/file'), { code: 'ENOENT', syscall: 'open' }],
        [Readable.from(broken()), denied],
        [broken() as never, denied],
        [Readable.from(broken(Object.assign(new Error('gone'), { code: 'ERR_STREAM_X' }))), { code: 'ERR_STREAM_X' }],
      ];
      for (const [body, expected] of own) {
        await assert.rejects(
          undici.request(TARGET, { dispatcher, method: 'POST', body: body as Readable }),
          expected as Error,
        );
      }
      const failed = await fetch(TARGET, {
        dispatcher,
        method: 'POST',
        body: ReadableStream.from(broken()) as ReadableStream,
        duplex: 'half',
      }).catch((error) => error);
      assert.ok(failed === denied || failed.cause === denied, `${failed}`);
    }
  });

  it('is told what its own handler threw, wherever that was', async (t) => {
    const kedge = await startKedge(t);
    for (const protocol of ['h2', 'h1'] as const) {
      const { dispatcher } = kedge.dialer({ http: { protocol } });
      for (const where of ['onRequestStart', 'onResponseStart', 'onResponseData'] as const) {
        const thrown = Object.assign(new Error(where), { code: 'ECONNRESET' });
        const ends: unknown[] = [];
        await new Promise<void>((resolve) => {
          dispatcher.dispatch(
            { origin: TARGET, path: '/', method: 'GET' },
            {
              onRequestStart() {},
              onResponseStart() {},
              onResponseData() {},
              onResponseEnd: () => ends.push('end'),
              onResponseError: (_controller, error) => {
                ends.push(error);
                resolve();
              },
              [where]: () => {
                throw thrown;
              },
            },
          );
        });
        await new Promise((resolve) => setTimeout(resolve, 20));
        assert.deepEqual(ends, [thrown], where);
      }
    }
  });
});

describe('a stream that the kedge resets', () => {
  it('is not called a lost connection', async (t) => {
    const kedge = await startKedge(t, {
      alpn: ['h2'],
      handler: (request) => (request as http2.Http2ServerRequest).stream.close(Number(request.url!.slice(1))),
    });
    const { dispatcher } = kedge.dialer();
    const said: Record<number, RegExp> = {
      0: /ended the stream/,
      1: /reset the stream: PROTOCOL_ERROR/,
      2: /reset the stream: INTERNAL_ERROR/,
      8: /ended the stream/,
      11: /reset the stream: ENHANCE_YOUR_CALM/,
      255: /reset the stream: code 255/,
    };
    for (const [code, message] of Object.entries(said)) {
      const call = undici.request(new URL(code, TARGET), { dispatcher, method: 'POST', body: 'x' });
      await assert.rejects(call, (error: KedgeError) => {
        assert.deepEqual([error.code, error.stage], ['ERR_KEDGE_CONNECTION', 'kedge']);
        assert.match(error.message, message);
        assert.doesNotMatch(error.reason, /connection/);
        return true;
      });
    }
    assert.equal(kedge.handshakes, 1);
  });
});

describe('tokens', () => {
  it('are waited for, abortably, and never sent when they are not tokens', async (t) => {
    const kedge = await startKedge(t);
    const gate = Promise.withResolvers<string>();
    let cached: string | undefined;
    let asked = 0;
    const slow: TokenSource = {
      name: 'slow',
      peek: () => cached,
      token: () => {
        asked += 1;
        return gate.promise;
      },
    };
    const { dispatcher } = kedge.dialer({ mapper: single(kedge.route({ proxyAuth: slow })) });
    const abort = new AbortController();
    const aborted = undici.request(TARGET, { dispatcher, signal: abort.signal });
    const waiting = fetch(TARGET, { dispatcher, method: 'POST', body: 'x' });
    abort.abort(new Error('changed my mind'));
    await assert.rejects(aborted, /changed my mind/);
    gate.resolve('slow-token');
    const seen = (await (await waiting).json()) as { headers: Record<string, string> };
    assert.equal(seen.headers['proxy-authorization'], 'Bearer slow-token');
    assert.equal(asked, 2);
    cached = 'cached';
    await undici.request(TARGET, { dispatcher });
    assert.equal(asked, 2);

    const sources: [string, unknown, string][] = [
      ['newline', () => Promise.resolve('secret\n'), 'ERR_KEDGE_TOKEN'],
      ['empty', () => Promise.resolve(''), 'ERR_KEDGE_TOKEN'],
      ['blank', () => Promise.resolve('secret secret'), 'ERR_KEDGE_TOKEN'],
      ['number', () => Promise.resolve(5), 'ERR_KEDGE_TOKEN'],
      ['latin1', () => Promise.resolve('sécret'), 'ERR_KEDGE_TOKEN'],
      ['huge', () => Promise.resolve('secret'.repeat(5000)), 'ERR_KEDGE_TOKEN'],
      [
        'throws',
        () => {
          throw new Error('secret');
        },
        'ERR_KEDGE_TOKEN_UNAVAILABLE',
      ],
      ['rejects', () => Promise.reject('secret'), 'ERR_KEDGE_TOKEN_UNAVAILABLE'],
    ];
    for (const [name, token, code] of sources) {
      const source = { name, peek: () => undefined, token } as TokenSource;
      const before = kedge.seen.length;
      const dialer = kedge.dialer({ mapper: single(kedge.route({ backendAuth: source })) });
      await assert.rejects(undici.request(TARGET, { dispatcher: dialer.dispatcher }), (error: KedgeError) => {
        assert.equal(error.code, code, name);
        assert.equal(error.stage, 'token');
        assert.equal(error.target, 'orders.us1:8080');
        assert.match(error.message, new RegExp(`token source ${name}`));
        assert.doesNotMatch(`${error.message} ${error.stack}`, /s[eé]cret/);
        return true;
      });
      assert.equal(kedge.seen.length, before);
    }
    for (const token of ['', 'a b', 'a\n', 'é', 'x'.repeat(20_000), 5]) {
      assert.throws(
        () => staticToken(token as string),
        (error: KedgeError) => error.code === 'ERR_KEDGE_TOKEN' && !error.message.includes('x'.repeat(10)),
      );
    }
  });

  it('notice a body that fails while they are fetched', async (t) => {
    const kedge = await startKedge(t);
    const never: TokenSource = { name: 'never', peek: () => undefined, token: () => new Promise(() => {}) };
    const dialer = kedge.dialer({ mapper: single(kedge.route({ proxyAuth: never })) });
    const body = new Readable({ read() {} });
    const call = undici.request(TARGET, { dispatcher: dialer.dispatcher, method: 'POST', body });
    setImmediate(() => body.destroy(new Error('the disk is gone')));
    await assert.rejects(call, /the disk is gone/);
    const held = undici.request(TARGET, { dispatcher: dialer.dispatcher });
    held.catch(() => {});
    await dialer.destroy();
    await assert.rejects(held, { code: 'ERR_KEDGE_CLOSED' });
  });
});

describe('createDialer', () => {
  const mapper = single('https://kedge.example.com');
  const wrong: [unknown, RegExp][] = [
    [undefined, /takes an object/],
    [{}, /`mapper` is required/],
    [{ mapper: {} }, /`mapper` is a function/],
    [{ mapper, maper: 1 }, /unknown option `maper`; did you mean `mapper`\?/],
    [{ mapper, http: { protocol: 'h3' } }, /`http\.protocol` is "auto" or "h1" or "h2"/],
    [{ mapper, http: { conections: 1 } }, /unknown option `http\.conections`; did you mean `http\.connections`\?/],
    [{ mapper, http: [] }, /`http` is an object/],
    [{ mapper, http: { connections: 0 } }, /`http\.connections` is a whole number/],
    [{ mapper, grpc: { maxConnections: 1.5 } }, /`grpc\.maxConnections`/],
    [{ mapper, connect: { timeoutMs: '5s' } }, /`connect\.timeoutMs`/],
    [{ mapper, maxTargets: Number.NaN }, /`maxTargets`/],
    [{ mapper, identity: {} }, /`identity` is an identity/],
    [{ mapper, unmapped: 'drop' }, /`unmapped` is "direct" or "reject"/],
    [{ mapper, fallback: {} }, /`fallback` is an undici Dispatcher/],
    [
      { mapper, peer: { rejectUnauthorized: false } },
      /unknown option `peer\.rejectUnauthorized`; there are `spiffeId`/,
    ],
    [JSON.parse('{"mapper": 1, "__proto__": {"mapper": 1}}'), /`mapper`/],
  ];
  for (const [options, message] of wrong) {
    it(`refuses ${JSON.stringify(options)}`, () => {
      assert.throws(
        () => createDialer(options as DialerOptions),
        (error: KedgeError) => {
          assert.equal(error.code, 'ERR_KEDGE_OPTIONS');
          assert.equal(error.stage, 'config');
          assert.match(error.message, message);
          return true;
        },
      );
    });
  }

  it('warns at every start without verification, and refuses tokens then', async (t) => {
    const warnings: Error[] = [];
    const peer = { dangerouslySkipVerification: true };
    const options = { peer, onWarning: (warning: Error) => warnings.push(warning) };
    createDialer({ mapper, ...options });
    assert.equal(warnings.length, 1);
    const tokens = single({ kedge: 'https://127.0.0.1:1', proxyAuth: staticToken('t') });
    await fails(t, { mapper: tokens, ...options }, { code: 'ERR_KEDGE_ROUTE', stage: 'map', message: /verified/ });
  });

  it('refuses what a mapper of the user got wrong, naming the target', async (t) => {
    const broken: Record<string, unknown> = {
      throws: () => {
        throw new Error('no database');
      },
      promise: async () => undefined,
      garbage: () => 5,
      plain: () => ({ kedge: 'http://a.example', proxyAuth: staticToken('t') }),
    };
    for (const mapper of Object.values(broken)) {
      await fails(t, { mapper: mapper as never }, { code: 'ERR_KEDGE_ROUTE', stage: 'map' });
    }
    const plain = createDialer({ mapper: () => route('http://a.example') });
    await assert.rejects(undici.request('https://b.us1', { dispatcher: plain.dispatcher }), {
      code: 'ERR_KEDGE_ROUTE',
    });
  });
});
