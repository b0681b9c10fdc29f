import assert from 'node:assert/strict';
import type http2 from 'node:http2';
import { Readable, Stream } from 'node:stream';
import { describe, it } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import * as undici from 'undici';
import { type KedgeError, kedgeErrorOf, pem, single, staticToken, type TokenSource } from '../../src/index.ts';
import { Breaker } from '../../src/kedge/breaker.ts';
import { type KedgeHandler, startKedge, type TestKedge } from '../helpers/kedge.ts';

const TARGET = 'http://orders.us1:8080/';

/** Answers with its name and the body, once the body is there. */
function named(name: string): KedgeHandler {
  return (request, response) => {
    let body = '';
    request.on('data', (chunk) => {
      body += chunk;
    });
    request.on('error', () => {});
    request.on('end', () => response.end(`${name}:${body}`));
  };
}

function both(one: TestKedge, two: TestKedge, options = {}) {
  const mapper = single(one.route({ kedge: [one.url, two.url] }));
  return one.dialer({ mapper, ...options });
}

async function post(dispatcher: undici.Dispatcher, body: string | Buffer | Readable, method = 'POST'): Promise<string> {
  const { body: reply } = await undici.request(TARGET, { dispatcher, method: method as 'POST', body });
  return reply.text();
}

describe('a request that its kedge refuses unprocessed', () => {
  for (const body of ['text', 'stream']) {
    it(`moves to the next kedge, with any method (${body})`, async (t) => {
      const one = await startKedge(t, {
        handler: (request) => (request as http2.Http2ServerRequest).stream.close(7 /* REFUSED_STREAM */),
      });
      const two = await startKedge(t, { handler: named('two') });
      const { dispatcher } = both(one, two);
      const calls = Array.from({ length: 20 }, (_, i) =>
        post(dispatcher, body === 'text' ? `n${i}` : Readable.from([`n${i}`])),
      );
      assert.deepEqual(
        await Promise.all(calls),
        calls.map((_, i) => `two:n${i}`),
      );
    });
  }

  it('survives a graceful GOAWAY every few requests on its only kedge, with bodies that can be read once', async (t) => {
    let served = 0;
    const kedge = await startKedge(t, {
      handler: (request, response, seen) => {
        served += 1;
        if (served % 20 === 0) (request as http2.Http2ServerRequest).stream.session!.close();
        named('one')(request, response, seen);
      },
    });
    const { dispatcher } = kedge.dialer({ http: { connections: 1 } });
    for (let round = 0; round < 5; round += 1) {
      const calls = Array.from({ length: 50 }, (_, i) =>
        fetch(TARGET, { dispatcher, method: 'POST', body: `n${i}` }).then((reply) => reply.text()),
      );
      assert.deepEqual(
        await Promise.all(calls),
        calls.map((_, i) => `one:n${i}`),
      );
    }
    assert.equal(served, 250, 'each was executed once');
  });
});

describe('a body that is a stream of the oldest kind', () => {
  /** Emits by itself, and knows neither `read()` nor iteration. */
  class OldStream extends Stream {
    readable = true;
    private parts = ['a', 'b', 'c'];
    private paused = false;
    constructor() {
      super();
      setImmediate(() => this.flow());
    }
    pause() {
      this.paused = true;
    }
    resume() {
      this.paused = false;
      setImmediate(() => this.flow());
    }
    destroy() {
      this.parts = [];
    }
    private flow() {
      while (!this.paused && this.readable) {
        const part = this.parts.shift();
        if (part === undefined) {
          this.readable = false;
          this.emit('end');
        } else {
          this.emit('data', Buffer.from(part));
        }
      }
    }
  }

  it('is sent again whole, or not at all', async (t) => {
    const one = await startKedge(t, {
      handler: (request, response) => {
        response.statusCode = 503;
        request.resume().on('end', () => response.end());
      },
    });
    const two = await startKedge(t, { handler: named('two') });
    for (const protocol of ['h1', 'h2'] as const) {
      const kept = both(one, two, { http: { protocol }, failover: { statuses: [503] } }).dispatcher;
      assert.equal(await post(kept, new OldStream() as never, 'PUT'), 'two:abc');
      const unkept = both(one, two, { http: { protocol }, failover: { statuses: [503], replayBytes: 0 } }).dispatcher;
      assert.equal(await post(unkept, new OldStream() as never, 'PUT'), '');
    }
    assert.equal(two.seen.length, 2);
  });
});

describe('a request that may have been processed', () => {
  it('is sent again when it is idempotent, and only then', async (t) => {
    let executed = 0;
    const one = await startKedge(t, {
      handler: () => {
        executed += 1;
        one.reset();
      },
    });
    const two = await startKedge(t, { handler: named('two') });
    for (const protocol of ['h2', 'h1'] as const) {
      // A reset may come before the kedge's greeting was read, and so look like a failed dial.
      const { dispatcher } = both(one, two, { http: { protocol }, failover: { breaker: { failures: 100 } } });
      assert.equal(await post(dispatcher, 'x', 'PUT'), 'two:x');
      await assert.rejects(post(dispatcher, 'x', 'POST'), { code: 'ERR_KEDGE_CONNECTION' });
      assert.equal(await post(dispatcher, Readable.from(['a', 'b']), 'PUT'), 'two:ab');
      const large = Readable.from([Buffer.alloc(60_000), Buffer.alloc(60_000)]);
      await assert.rejects(post(dispatcher, large, 'PUT'), { code: /ERR_KEDGE_CONNECTION/ });
    }
    assert.equal(executed, 8);
  });

  it('is never spliced: a body that breaks off is an error', async (t) => {
    const one = await startKedge(t, {
      handler: (_request, response) => {
        (response as NodeJS.WritableStream).write('part');
        setTimeout(() => one.reset(), 20);
      },
    });
    const two = await startKedge(t, { handler: named('two') });
    const { body } = await undici.request(TARGET, { dispatcher: both(one, two).dispatcher });
    await assert.rejects(body.text(), { code: 'ERR_KEDGE_CONNECTION' });
    assert.equal(two.seen.length, 0);
  });

  it('stays within the retry budget', async (t) => {
    const busy: KedgeHandler = (_request, response) => {
      response.statusCode = 503;
      response.end();
    };
    const [one, two] = await Promise.all([startKedge(t, { handler: busy }), startKedge(t, { handler: busy })]);
    const { dispatcher } = both(one, two, { failover: { statuses: [503], retryBudget: 0.2 } });
    for (let i = 0; i < 200; i += 1) {
      const { statusCode, body } = await undici.request(TARGET, { dispatcher });
      assert.equal(statusCode, 503);
      await body.dump();
    }
    assert.equal(one.seen.length, 200);
    assert.ok(two.seen.length >= 20 && two.seen.length <= 52, `${two.seen.length} extra requests`);
  });
});

describe('a route with a kedge that cannot be used', () => {
  it('fails the call, and does not leave it waiting', async (t) => {
    const one = await startKedge(t, { handler: () => one.reset() });
    let asked = 0;
    const identity = pem({ cert: one.client.cert, key: one.client.key, ca: one.ca.cert }).current();
    const failing = {
      current: () => {
        asked += 1;
        if (asked > 1) throw new Error('no certificate yet');
        return identity;
      },
      subscribe: () => () => {},
    };
    const two = await startKedge(t, { handler: named('two') });
    const { dispatcher } = both(one, two, { identity: failing });
    for (const method of ['GET', 'PUT']) {
      await assert.rejects(undici.request(TARGET, { dispatcher, method: method as 'GET' }), {
        code: 'ERR_KEDGE_IDENTITY',
      });
    }
  });
});

describe('the breaker', () => {
  it('opens, lets one probe through, and closes again', () => {
    const breaker = new Breaker({ failures: 2, backoffMs: 100, maxBackoffMs: 300 });
    breaker.failed(0);
    assert.equal(breaker.name, 'closed');
    breaker.failed(0);
    assert.equal(breaker.name, 'open');
    assert.equal(breaker.admit(49), false);
    assert.equal(breaker.admit(101), true);
    assert.equal(breaker.admit(101), false, 'one probe at a time');
    breaker.failed(101);
    assert.equal(breaker.admit(101 + 99), false, 'the backoff has doubled');
    assert.equal(breaker.admit(101 + 201), true);
    breaker.succeeded();
    assert.equal(breaker.isClosed, true);
    for (let i = 0; i < 20; i += 1) {
      breaker.failed(i * 1000);
      breaker.admit(i * 1000 + 999);
    }
    breaker.failed(20_000);
    assert.equal(breaker.admit(20_301), true, 'never longer than the maximum');
  });

  it('spares all but one request the dead kedge, and goes back when it returns', async (t) => {
    let alive = false;
    let dials = 0;
    const one = await startKedge(t, {
      handler: named('one'),
      onTcp: (socket) => {
        dials += 1;
        if (!alive) socket.destroy();
        return !alive;
      },
    });
    const two = await startKedge(t, { handler: named('two') });
    const dialer = both(one, two, { failover: { breaker: { backoffMs: 2000 } } });
    for (let i = 0; i < 20; i += 1) assert.equal(await post(dialer.dispatcher, 'x'), 'two:x');
    assert.equal(dials, 1);
    assert.equal(dialer.stats().kedges.find(({ kedge }) => one.url.endsWith(kedge))!.breaker, 'open');
    alive = true;
    await sleep(2020);
    assert.equal(await post(dialer.dispatcher, 'x'), 'one:x');
    assert.equal(dials, 2);
  });

  it('does not keep a call from the kedges of which none is known to live', async (t) => {
    let alive = false;
    const kedges = await Promise.all(
      ['one', 'two'].map((name) =>
        startKedge(t, { handler: named(name), onTcp: (socket) => !alive && Boolean(socket.destroy()) }),
      ),
    );
    const { dispatcher } = both(kedges[0]!, kedges[1]!, {
      failover: { breaker: { backoffMs: 60_000, maxBackoffMs: 60_000 } },
    });
    await assert.rejects(post(dispatcher, 'x'), { code: 'ERR_KEDGE_TLS' });
    alive = true;
    assert.equal(await post(dispatcher, 'x'), 'one:x');
  });
});

describe('a token that the kedge refuses', () => {
  const rotating = () => {
    let version = 1;
    let cached: string | undefined = 'token-1';
    const source: TokenSource & { asked: number } = {
      name: 'rotating',
      asked: 0,
      peek: () => cached,
      token: async () => {
        source.asked += 1;
        version += 1;
        cached = `token-${version}`;
        return cached;
      },
      invalidate: () => {
        cached = undefined;
      },
    };
    return source;
  };
  const accepting =
    (good: string | undefined): KedgeHandler =>
    (request, response, seen) => {
      if (request.headers['proxy-authorization'] === `Bearer ${good}`) {
        named('one')(request, response, seen);
        return;
      }
      response.statusCode = 407;
      response.setHeader('x-kedge-error', 'unauthorized');
      response.setHeader('x-kedge-error-type', 'unauthorized');
      response.end();
    };

  it('is fetched anew and the request sent again, once', async (t) => {
    const kedge = await startKedge(t, { handler: accepting('token-2') });
    const source = rotating();
    const { dispatcher } = kedge.dialer({ mapper: single(kedge.route({ proxyAuth: source })) });
    assert.equal(await post(dispatcher, Readable.from(['a', 'b'])), 'one:ab');
    assert.equal(source.asked, 1);
    assert.equal(kedge.seen.length, 2);
  });

  it('is an error when the fresh one is refused too, without a loop', async (t) => {
    const kedge = await startKedge(t, { handler: accepting(undefined) });
    const source = rotating();
    const { dispatcher } = kedge.dialer({ mapper: single(kedge.route({ proxyAuth: source })) });
    await assert.rejects(post(dispatcher, 'x'), (error: KedgeError) => {
      assert.equal(error.code, 'ERR_KEDGE_UNAUTHORIZED');
      assert.match((error.cause as Error).message, /unauthorized/);
      return true;
    });
    assert.ok(kedge.seen.length <= 3, `${kedge.seen.length} requests`);
  });

  it("of the backend's is forgotten, and its answer passed on", async (t) => {
    const kedge = await startKedge(t, {
      handler: (_request, response) => {
        response.statusCode = 401;
        response.end('who?');
      },
    });
    const source = rotating();
    const { dispatcher } = kedge.dialer({ mapper: single(kedge.route({ backendAuth: source })) });
    assert.equal(await post(dispatcher, 'x'), 'who?');
    assert.equal(source.peek(), undefined);
    assert.equal(kedge.seen.length, 1);
  });
});

describe('a refusal that is not about the token of the route', () => {
  const answering =
    (statusCode: number): KedgeHandler =>
    (_request, response) => {
      response.statusCode = statusCode;
      response.end('who?');
    };
  const counting = () => {
    const source = {
      name: 'counting',
      refused: 0,
      peek: () => 'token',
      token: async () => 'token',
      invalidate: () => {},
    };
    source.invalidate = () => {
      source.refused += 1;
    };
    return source;
  };

  it('401 to an Authorization of the caller leaves the token of the route alone', async (t) => {
    const kedge = await startKedge(t, { handler: answering(401) });
    const backendAuth = counting();
    const { dispatcher } = kedge.dialer({ mapper: single(kedge.route({ backendAuth })) });
    const own = await undici.request(TARGET, { dispatcher, headers: { authorization: 'Basic own' } });
    assert.deepEqual([own.statusCode, await own.body.text(), backendAuth.refused], [401, 'who?', 0]);
    const theirs = await undici.request(TARGET, { dispatcher });
    assert.deepEqual([theirs.statusCode, backendAuth.refused], [401, 1]);
  });

  it('407 passes where the route has no proxyAuth', async (t) => {
    const kedge = await startKedge(t, { handler: answering(407) });
    for (const more of [{}, { backendAuth: staticToken('backend') }]) {
      const { dispatcher } = kedge.dialer({ mapper: single(kedge.route(more)) });
      const { statusCode, body } = await undici.request(TARGET, { dispatcher, method: 'POST', body: 'x' });
      assert.deepEqual([statusCode, await body.text()], [407, 'who?']);
    }
    const { dispatcher } = kedge.dialer({ mapper: single(kedge.route({ proxyAuth: staticToken('t') })) });
    await assert.rejects(undici.request(TARGET, { dispatcher }), { code: 'ERR_KEDGE_UNAUTHORIZED' });
  });

  it('407 while the body is still on its way is answered with a fresh token and the whole body', async (t) => {
    for (const protocol of ['h1', 'h2'] as const) {
      const bodies: string[] = [];
      const kedge = await startKedge(t, {
        handler: (request, response, seen) => {
          request.on('error', () => {});
          if (!String(request.headers['proxy-authorization']).startsWith('Bearer new')) {
            response.statusCode = 407;
            // Three ways of not reading the rest.
            if (seen.path === '/close' && protocol === 'h1') response.setHeader('connection', 'close');
            (response as NodeJS.WritableStream).end('no');
            if (seen.path === '/cut') setTimeout(() => request.socket.destroy(), 3);
            return;
          }
          let body = '';
          request.on('data', (chunk) => {
            body += chunk;
          });
          request.on('end', () => {
            bodies.push(body);
            response.end(body);
          });
        },
      });
      let round = 0;
      let cached: string | undefined;
      const proxyAuth: TokenSource = {
        name: 'changing',
        peek: () => cached,
        token: async () => {
          await sleep(20);
          return `new-${round}`;
        },
        invalidate: () => {
          cached = undefined;
        },
      };
      const { dispatcher } = kedge.dialer({ http: { protocol }, mapper: single(kedge.route({ proxyAuth })) });
      for (; round < 6; round += 1) {
        const path = ['/', '/close', '/cut'][round % 3]!;
        cached = `old-${round}`;
        const slow = async function* () {
          for (const part of ['a', 'b', 'c', 'd', 'e']) {
            yield part;
            await sleep(8);
          }
        };
        const body = await new Promise<string>((resolve, reject) => {
          let text = '';
          const legacy = {
            onConnect: () => {},
            onHeaders: () => true,
            onData: (chunk: Buffer) => {
              text += chunk;
              return true;
            },
            onComplete: () => resolve(text),
            onError: reject,
          };
          const options = { origin: TARGET, path, method: 'POST' as const, body: Readable.from(slow()) };
          dispatcher.dispatch(options, legacy as never);
        });
        assert.equal(body, 'abcde');
      }
      assert.deepEqual(bodies, Array(6).fill('abcde'), protocol);
    }
  });
});

describe('an error that the kedge reports', () => {
  it('is read from the answer, or raised', async (t) => {
    const kedge = await startKedge(t, {
      handler: (_request, response) => {
        response.statusCode = 502;
        response.setHeader('x-kedge-error', 'unknown route to service');
        response.setHeader('x-kedge-error-type', 'no-route');
        response.end('kedge: unknown route to service');
      },
    });
    const { dispatcher } = kedge.dialer();
    for (const response of [await fetch(TARGET, { dispatcher }), await undici.request(TARGET, { dispatcher })]) {
      const error = kedgeErrorOf(response)!;
      assert.deepEqual([error.code, error.stage], ['ERR_KEDGE_REPORTED', 'kedge']);
      assert.match(error.message, /no-route: unknown route to service/);
    }
    const raising = kedge.dialer({ http: { throwOnKedgeError: true } }).dispatcher;
    await assert.rejects(undici.request(TARGET, { dispatcher: raising }), (error: KedgeError) => {
      assert.equal(error.code, 'ERR_KEDGE_REPORTED');
      assert.equal(error.target, 'orders.us1:8080');
      assert.equal(kedgeErrorOf(new TypeError('fetch failed', { cause: error })), error);
      return true;
    });
    for (const other of [
      undefined,
      null,
      5,
      'x',
      {},
      new Error('x'),
      new Response('x'),
      { code: 12, details: 'no such method' },
    ]) {
      assert.equal(kedgeErrorOf(other), undefined);
    }
    assert.equal(kedgeErrorOf({ code: 12, details: 'unknown backend' })!.stage, 'backend');
    assert.equal(
      kedgeErrorOf(Object.assign(new Error('x'), { code: 12, details: 'unknown route to service' }))!.stage,
      'kedge',
    );
  });
});
