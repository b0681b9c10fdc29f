import assert from 'node:assert/strict';
import type http2 from 'node:http2';
import type { Socket } from 'node:net';
import { Readable } from 'node:stream';
import { describe, it, type TestContext } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import type tls from 'node:tls';
import * as undici from 'undici';
import { type DialerOptions, type KedgeError, single } from '../../src/index.ts';
import { type KedgeHandler, startKedge, type TestKedge } from '../helpers/kedge.ts';
import { frame, goaway, onFrames, SETTINGS, startRawKedge } from '../helpers/raw-kedge.ts';
import { rotating } from '../helpers/rotating.ts';

const TARGET = 'http://orders.us1:8080/';

const bodies: Record<string, () => string | Readable | null> = {
  'no body': () => null,
  'a string': () => 'pay 100',
  'a stream': () => Readable.from(['pay ', '100']),
};

/** Writes down each request as soon as its body is there, then leaves it to `then`. */
async function ledger(t: TestContext, then: KedgeHandler, options = {}) {
  const executed: string[] = [];
  const kedge = await startKedge(t, {
    ...options,
    handler: (request, response, seen) => {
      request.on('error', () => {});
      request.resume().on('end', () => {
        executed.push(`${request.method} ${request.url}`);
        then(request, response, seen);
      });
    },
  });
  return { kedge, executed };
}

const ok: KedgeHandler = (_request, response) => response.end('ok');

function via(kedges: { url: string }[], by: TestKedge, options: Partial<DialerOptions> = {}) {
  const mapper = single(by.route({ kedge: kedges.map(({ url }) => url) }));
  return by.dialer({ mapper, ...options }).dispatcher as undici.Dispatcher;
}

async function send(dispatcher: undici.Dispatcher, method: string, body: string | Readable | null): Promise<string> {
  const reply = await undici.request(TARGET, { dispatcher, method: method as 'POST', body });
  return reply.body.text();
}

const refuse =
  (afterMs: number): KedgeHandler =>
  (request) => {
    setTimeout(() => (request as http2.Http2ServerRequest).stream.close(7 /* REFUSED_STREAM */), afterMs);
  };

describe('a request that is answered with REFUSED_STREAM', () => {
  for (const [name, body] of Object.entries(bodies)) {
    it(`is sent once more and no more, to the same kedge: ${name}`, async (t) => {
      const { kedge, executed } = await ledger(t, refuse(0));
      await assert.rejects(send(via([kedge], kedge), 'PUT', body()), (error: KedgeError) => {
        assert.equal(error.code, 'ERR_KEDGE_CONNECTION');
        assert.match(error.message, /reset the stream: REFUSED_STREAM/);
        return true;
      });
      assert.equal(executed.length, 2);
    });

    it(`is sent once more and no more, to another kedge: ${name}`, async (t) => {
      const [one, two, three] = [await ledger(t, refuse(0)), await ledger(t, refuse(0)), await ledger(t, ok)];
      const dispatcher = via([one.kedge, two.kedge, three.kedge], one.kedge);
      await assert.rejects(send(dispatcher, 'PUT', body()), { code: 'ERR_KEDGE_CONNECTION' });
      assert.deepEqual([one.executed.length, two.executed.length, three.executed.length], [1, 1, 0]);
    });

    it(`is not sent again where it is not idempotent and the kedge took its time: ${name}`, async (t) => {
      const [one, two] = [await ledger(t, refuse(400)), await ledger(t, ok)];
      for (const kedges of [[one.kedge], [one.kedge, two.kedge]]) {
        one.executed.length = 0;
        await assert.rejects(send(via(kedges, one.kedge), 'POST', body()), { code: 'ERR_KEDGE_CONNECTION' });
        assert.deepEqual([one.executed, two.executed], [['POST /'], []]);
      }
    });
  }

  for (const [name, body] of Object.entries(bodies)) {
    it(`is not sent again where other connections end meanwhile: POST, ${name}`, async (t) => {
      const { kedge, executed } = await ledger(t, (request, response, seen) => {
        if (request.url === '/h1') response.end('ok');
        else refuse(400)(request, response, seen);
      });
      const { dispatcher } = kedge.dialer();
      const call = send(dispatcher as undici.Dispatcher, 'POST', body());
      call.catch(() => {});
      while (executed.length === 0) await sleep(2);
      await new Promise<void>((resolve, reject) => {
        const options = { origin: TARGET, path: '/h1', method: 'GET' as const, allowH2: false };
        dispatcher.dispatch(options as undici.Dispatcher.DispatchOptions, {
          onRequestStart: () => {},
          onResponseStart: () => {},
          onResponseData: () => {},
          onResponseEnd: () => resolve(),
          onResponseError: (_controller, error) => reject(error),
        });
      });
      for (const socket of kedge.sockets) if (socket.alpnProtocol !== 'h2') socket.end();
      await assert.rejects(call, { code: 'ERR_KEDGE_CONNECTION' });
      await sleep(100);
      assert.deepEqual(executed, ['POST /', 'GET /h1']);
    });

    it(`is not sent again where its connection has said goodbye: POST, ${name}`, async (t) => {
      const { kedge, executed } = await ledger(t, (request, response, seen) => {
        (request as http2.Http2ServerRequest).stream.session!.goaway(0, 2 ** 31 - 1);
        refuse(400)(request, response, seen);
      });
      const { dispatcher } = kedge.dialer();
      await assert.rejects(send(dispatcher as undici.Dispatcher, 'POST', body()), { code: 'ERR_KEDGE_CONNECTION' });
      await sleep(100);
      assert.deepEqual(executed, ['POST /']);
    });
  }

  it('that comes at once moves to the next kedge with any method', async (t) => {
    const [one, two] = [await ledger(t, refuse(0)), await ledger(t, ok)];
    const dispatcher = via([one.kedge, two.kedge], one.kedge);
    for (const body of Object.values(bodies)) assert.equal(await send(dispatcher, 'POST', body()), 'ok');
    assert.deepEqual([one.executed.length, two.executed.length], [3, 3]);
  });
});

describe('a connection that ends without a byte', () => {
  const fin = (socket: tls.TLSSocket) => socket.end();

  it('of HTTP/2 has processed nothing: any method goes to the next kedge', async (t) => {
    const good = await ledger(t, ok);
    const bad = await startRawKedge(t, 'h2', fin);
    const dispatcher = via([bad, good.kedge], good.kedge);
    for (let i = 0; i < 5; i += 1) {
      for (const body of Object.values(bodies)) assert.equal(await send(dispatcher, 'POST', body()), 'ok');
    }
    assert.equal(good.executed.length, 15);
  });

  it('of HTTP/2 is tried once more where there is no other kedge', async (t) => {
    const good = await ledger(t, ok);
    const bad = await startRawKedge(t, 'h2', fin);
    await assert.rejects(send(via([bad], good.kedge), 'POST', 'x'), /other side closed/);
    assert.equal(bad.connections, 2);
  });

  it('of HTTP/1.1 may have: only what is idempotent goes to the next kedge', async (t) => {
    const good = await ledger(t, ok);
    const bad = await startRawKedge(t, 'http/1.1', fin);
    const dispatcher = via([bad, good.kedge], good.kedge);
    assert.equal(await send(dispatcher, 'PUT', 'x'), 'ok');
    await assert.rejects(send(dispatcher, 'POST', 'x'), { code: 'ERR_KEDGE_CONNECTION' });
  });
});

describe('a connection of HTTP/1.1 that ends', () => {
  const whole = 'HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok';
  const cases = [
    { what: 'within the head of its first answer', answers: ['HTTP/1.1 200 OK\r\ncontent-le'], stale: false },
    { what: 'within the head of its second answer', answers: [whole, 'HTTP/1.1 200 OK\r\ncontent-le'], stale: false },
    { what: 'with the first letter of its second answer', answers: [whole, 'H'], stale: false },
    { what: 'after an interim answer', answers: [whole, 'HTTP/1.1 103 Early Hints\r\n\r\n'], stale: false },
    { what: 'without a byte of its second answer', answers: [whole, ''], stale: true },
  ];
  for (const { what, answers, stale } of cases) {
    for (const how of ['end', 'resetAndDestroy'] as const) {
      for (const method of ['GET', 'POST']) {
        const isResent = stale && method === 'GET';
        it(`${what} (${how}) ${isResent ? 'is stale: its request goes to the same kedge' : 'is lost: nothing is sent to that kedge again'}: ${method}`, async (t) => {
          const good = await ledger(t, ok);
          let requests = 0;
          const raw = await startRawKedge(t, 'http/1.1', (socket, tcp) => {
            const left = raw.connections === 1 ? [...answers] : [];
            socket.on('data', (chunk) => {
              if (!chunk.toString().startsWith(method)) return;
              requests += 1;
              const answer = left.length === 0 ? whole : left.shift()!;
              socket.write(answer);
              if (answer === whole) return;
              if (how === 'end') socket.end();
              else setTimeout(() => tcp.resetAndDestroy(), 20);
            });
          });
          const one = via([raw], good.kedge, { http: { protocol: 'h1', connections: 1 } });
          for (const answer of answers) {
            const sent = send(one, method, method === 'GET' ? null : 'pay 100');
            if (answer === whole || isResent) assert.equal(await sent, 'ok');
            else await assert.rejects(sent, { code: 'ERR_KEDGE_CONNECTION' });
          }
          assert.equal(requests, answers.length + (isResent ? 1 : 0));
        });
      }
    }
  }

  it('within its answer lets what is idempotent go to the next kedge, and nothing else', async (t) => {
    const good = await ledger(t, ok);
    const raw = await startRawKedge(t, 'http/1.1', (socket) => socket.once('data', () => socket.end('HTTP/1.1 200 ')));
    const two = via([raw, good.kedge], good.kedge, { http: { protocol: 'h1' } });
    await assert.rejects(send(two, 'POST', 'pay 100'), { code: 'ERR_KEDGE_CONNECTION' });
    assert.equal(await send(two, 'GET', null), 'ok');
    assert.deepEqual(good.executed, ['GET /']);
  });
});

describe('a GOAWAY', () => {
  for (const code of [0, 2, 11]) {
    it(`with code ${code} leaves the streams above its last one unprocessed`, async (t) => {
      const good = await ledger(t, ok);
      const bad = await startRawKedge(t, 'h2', (socket) => {
        socket.write(SETTINGS);
        onFrames(socket, (type) => {
          if (type === 1) socket.end(goaway(0, code));
        });
      });
      const dispatcher = via([bad, good.kedge], good.kedge);
      for (let i = 0; i < 5; i += 1) {
        for (const body of Object.values(bodies)) assert.equal(await send(dispatcher, 'POST', body()), 'ok');
      }
      assert.equal(good.executed.length, 15);
    });
  }

  for (const code of [0, 1, 7, 11]) {
    it(`that announces one with code ${code} leaves unprocessed what the second does`, async (t) => {
      const good = await ledger(t, ok);
      let requests = 0;
      const bad = await startRawKedge(t, 'h2', (socket) => {
        socket.write(SETTINGS);
        onFrames(socket, (type) => {
          if (type !== 1) return;
          requests += 1;
          socket.write(goaway(2 ** 31 - 1, 0));
          setTimeout(() => socket.write(goaway(0, code)), 300);
        });
      });
      const dispatcher = via([bad, good.kedge], good.kedge);
      const calls = Object.values(bodies).map((body) => send(dispatcher, 'POST', body()));
      assert.deepEqual(await Promise.all(calls), ['ok', 'ok', 'ok']);
      assert.equal(good.executed.length, 3, 'each was executed once');
      assert.ok(requests > 0);
    });
  }

  it('that is followed by another fails what that one covers, and only that', async (t) => {
    const good = await ledger(t, ok);
    const bad = await startRawKedge(t, 'h2', (socket) => {
      socket.write(SETTINGS);
      let requests = 0;
      onFrames(socket, (type) => {
        if (type !== 1) return;
        requests += 1;
        if (requests === 2) socket.write(Buffer.concat([goaway(2 ** 31 - 1, 0), goaway(1, 2)]));
      });
    });
    const dispatcher = via([bad, good.kedge], good.kedge, { http: { protocol: 'h2', connections: 1 } });
    const calls = [send(dispatcher, 'POST', 'one'), send(dispatcher, 'POST', 'two')];
    const ends = await Promise.all(calls.map((call) => call.catch(({ code }) => code)));
    assert.deepEqual(ends, ['ERR_KEDGE_CONNECTION', 'ok']);
    assert.equal(good.executed.length, 1);
  });

  it('that is read in the turn in which a request is dispatched costs no request, with any body', async (t) => {
    const { kedge, executed } = await ledger(t, ok, { alpn: ['h2'] });
    const dialer = kedge.dialer({ http: { connections: 1 } });
    let sent = 0;
    for (let round = 0; round < 20; round += 1) {
      await (await dialer.fetch(TARGET)).text();
      for (const session of kedge.sessions) session.goaway(0, 2 ** 31 - 1);
      // Then it is written, and unread on our side until this turn is over.
      await new Promise(setImmediate);
      const calls = [
        dialer.fetch(TARGET, { method: 'POST', body: 'one' }).then((reply) => reply.text()),
        send(dialer.dispatcher, 'POST', Readable.from(['two'])),
        send(dialer.dispatcher, 'POST', 'three'),
      ];
      assert.deepEqual(await Promise.all(calls), ['ok', 'ok', 'ok']);
      sent += 4;
    }
    assert.equal(executed.length, sent, 'each was executed once');
  });
});

describe('an HTTP/2 answer that is reset before its end', () => {
  const data = (stream: number, flags: number) => frame(0, flags, stream, Buffer.from('half'));
  // From HPACK's static table: `:status: 200`.
  const head = (stream: number, flags = 0) => frame(1, 4 | flags, stream, Buffer.from([0x88]));
  const length = (stream: number) => frame(1, 4, stream, Buffer.from([0x88, 0x0f, 0x0d, 2, 0x31, 0x30]));
  const reset = (stream: number, code: number) => frame(3, 0, stream, Buffer.from([0, 0, 0, code]));
  const serve = (t: TestContext, answer: (socket: tls.TLSSocket, stream: number) => void) =>
    startRawKedge(t, 'h2', (socket) => {
      socket.write(SETTINGS);
      onFrames(socket, (type, stream, flags) => {
        if (type <= 1 && (flags & 1) === 1) answer(socket, stream);
      });
    });

  for (const [code, name] of ['NO_ERROR', 'CANCEL'].entries()) {
    for (const [form, begin] of Object.entries({ 'of no length': head, 'with a length': length })) {
      for (const afterMs of [0, 50]) {
        it(`with ${name} is not taken for a whole one, ${form}, after ${afterMs} ms`, async (t) => {
          const by = await startKedge(t);
          const bad = await serve(t, (socket, stream) => {
            const cut = reset(stream, code * 8);
            if (afterMs === 0) socket.write(Buffer.concat([begin(stream), data(stream, 0), cut]));
            else {
              socket.write(Buffer.concat([begin(stream), data(stream, 0)]));
              setTimeout(() => socket.write(cut), afterMs);
            }
          });
          const dispatcher = via([bad], by);
          for (const method of ['GET', 'POST']) {
            const call = send(dispatcher, method, method === 'GET' ? null : 'x');
            await assert.rejects(call, { code: 'ERR_KEDGE_CONNECTION' });
          }
          assert.equal(bad.connections, 1, 'the connection stays');
        });
      }
    }

    it(`with ${name} and had not begun is sent again where it is idempotent`, async (t) => {
      const good = await ledger(t, ok);
      const bad = await serve(t, (socket, stream) => socket.write(reset(stream, code * 8)));
      const dispatcher = via([bad, good.kedge], good.kedge);
      assert.equal(await send(dispatcher, 'GET', null), 'ok');
      await assert.rejects(send(dispatcher, 'POST', 'x'), { code: 'ERR_KEDGE_CONNECTION' });
    });

    it(`with ${name} behind its end is whole, also where it is read late`, async (t) => {
      const by = await startKedge(t);
      const bad = await serve(t, (socket, stream) => {
        socket.write(Buffer.concat([head(stream), data(stream, 1), reset(stream, code * 8)]));
      });
      const dispatcher = via([bad], by);
      for (const method of ['GET', 'POST'] as const) {
        const { body } = await undici.request(TARGET, { dispatcher, method });
        await sleep(50);
        assert.equal(await body.text(), 'half');
      }
    });
  }
});

describe('an HTTP/1.1 connection that was used before and ends without an answer', () => {
  for (const end of ['FIN', 'RST'] as const) {
    it(`is followed by one more attempt of what is idempotent (${end})`, async (t) => {
      const requests: string[] = [];
      let answers = 1;
      const kedge = await startRawKedge(t, 'http/1.1', (socket, tcp: Socket) => {
        let served = 0;
        socket.on('data', (data: Buffer) => {
          requests.push(data.toString('latin1').split(' ', 1)[0]!);
          served += 1;
          if (served <= answers) socket.write('HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok');
          else if (end === 'FIN') socket.end();
          else tcp.resetAndDestroy();
        });
      });
      const by = await startKedge(t);
      const dispatcher = via([kedge], by, { http: { connections: 1 } });
      assert.equal(await send(dispatcher, 'GET', null), 'ok');
      assert.equal(await send(dispatcher, 'GET', null), 'ok', 'on a new connection');
      await assert.rejects(send(dispatcher, 'POST', 'x'), { code: 'ERR_KEDGE_CONNECTION' });
      assert.deepEqual(requests, ['GET', 'GET', 'GET', 'POST']);
      requests.length = 0;
      assert.equal(await send(dispatcher, 'GET', null), 'ok');
      answers = 0;
      await assert.rejects(send(dispatcher, 'PUT', 'x'), { code: 'ERR_KEDGE_CONNECTION' });
      assert.deepEqual(requests, ['GET', 'PUT', 'PUT'], 'the new connection had served nobody');
    });
  }
});

describe('a POST', () => {
  it('is not executed again when the certificate of its connection runs out', async (t) => {
    const one = await ledger(t, () => {});
    const two = await ledger(t, ok);
    const short = await one.kedge.ca.issue({ cn: 'pod', notAfter: new Date(Date.now() + 1500) });
    const identity = rotating({ ca: one.kedge.ca, client: short });
    const mapper = single(one.kedge.route({ kedge: [one.kedge.url, two.kedge.url] }));
    const { dispatcher } = one.kedge.dialer({ identity, mapper, onWarning: () => {} });
    const call = send(dispatcher, 'POST', 'pay 100');
    call.catch(() => {});
    while (one.executed.length === 0) await sleep(2);
    // The new certificate is for new connections: the call's own still has the old one.
    await identity.rotate();
    await assert.rejects(call, { code: 'ERR_KEDGE_IDENTITY_EXPIRED' });
    await sleep(50);
    assert.deepEqual([one.executed, two.executed], [['POST /'], []]);
  });
});

describe('an HTTP/1.1 answer that is not HTTP', () => {
  const answers = {
    'no status line': 'hello world\r\n\r\n',
    'a false chunk': 'HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\nhello\r\n',
    'a false header': 'HTTP/1.1 200 OK\r\nx y: z\r\ncontent-length: 0\r\n\r\n',
  };
  for (const [name, answer] of Object.entries(answers)) {
    it(`is said to be one, and not asked for again: ${name}`, async (t) => {
      const by = await startKedge(t);
      let requests = 0;
      const bad = await startRawKedge(t, 'http/1.1', (socket) => {
        socket.on('data', () => {
          requests += 1;
          socket.write(answer);
        });
      });
      const dispatcher = via([bad], by);
      for (let sent = 1; sent <= 2; sent += 1) {
        await assert.rejects(send(dispatcher, 'GET', null), { name: 'KedgeError', code: 'ERR_KEDGE_RESPONSE' });
        await sleep(30);
        assert.equal(requests, sent);
      }
    });
  }
});
