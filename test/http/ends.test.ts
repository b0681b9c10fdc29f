import assert from 'node:assert/strict';
import type { IncomingMessage, ServerResponse } from 'node:http';
import type { Http2ServerResponse } from 'node:http2';
import type { Socket } from 'node:net';
import { PassThrough, Readable, Writable } from 'node:stream';
import { finished, pipeline } from 'node:stream/promises';
import { describe, it, type TestContext } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import type * as undici from 'undici';
import type { KedgeDispatcher } from '../../src/index.ts';
import { type KedgeHandler, startKedge } from '../helpers/kedge.ts';

const ORIGIN = 'http://orders.us1:8080';
const POST = { origin: ORIGIN, path: '/', method: 'POST' } as const;
const LIMIT_MS = 1000;

type Dispatch = undici.Dispatcher['dispatch'];

/** Counts what each call's handler is told of its end, between undici's API and the dialer. */
function counted(dispatcher: KedgeDispatcher) {
  const ends: number[] = [];
  const count = (dispatch: Dispatch): Dispatch => {
    return (options, handler) => {
      const call = ends.push(0) - 1;
      const end = () => {
        ends[call]! += 1;
      };
      return dispatch(options, {
        onRequestStart: (controller, context) => handler.onRequestStart?.(controller, context),
        onRequestUpgrade: (...args) => {
          end();
          handler.onRequestUpgrade?.(...args);
        },
        onResponseStart: (...args) => handler.onResponseStart?.(...args),
        onResponseData: (...args) => handler.onResponseData?.(...args),
        onResponseEnd: (...args) => {
          end();
          handler.onResponseEnd?.(...args);
        },
        onResponseError: (...args) => {
          end();
          handler.onResponseError?.(...args);
        },
      });
    };
  };
  return { calls: dispatcher.compose(count), ends };
}

/** How a promise ended, within a limit. */
async function ended(promise: Promise<unknown>): Promise<string> {
  const late = new AbortController();
  const limit = sleep(LIMIT_MS, 'NEVER', { signal: late.signal }).catch(() => '');
  const end = await Promise.race([
    promise.then(
      () => 'ok',
      (error) => String(error.code ?? error.name),
    ),
    limit,
  ]);
  late.abort();
  return end;
}

const destroy = (response: ServerResponse | Http2ServerResponse) => {
  if ('stream' in response) response.stream.session!.destroy();
  else (response as ServerResponse).socket!.destroy();
};

/** What a kedge may do with a call, by path. */
const misbehave: KedgeHandler = (request, response) => {
  const stream = response as unknown as Writable;
  request.on('error', () => {});
  stream.on('error', () => {});
  switch (request.url) {
    case '/at-once':
      destroy(response as ServerResponse);
      break;
    case '/after-headers':
      stream.write('x'.repeat(1000));
      setTimeout(() => destroy(response as ServerResponse), 50);
      break;
    case '/early':
      response.statusCode = 413;
      response.end('too much');
      break;
    case '/half':
      request.once('data', () => {
        stream.write('half');
        setTimeout(() => destroy(response as ServerResponse), 50);
      });
      break;
    default:
      (request as IncomingMessage).pipe(stream);
  }
};

for (const protocol of ['h1', 'h2'] as const) {
  describe(`a call of undici's streaming APIs that goes wrong, over ${protocol}`, () => {
    const setup = async (t: TestContext) => {
      const kedge = await startKedge(t, { handler: misbehave });
      const dialer = kedge.dialer({ http: { protocol } });
      return { kedge, dialer, ...counted(dialer.dispatcher) };
    };

    for (const path of ['/at-once', '/after-headers', '/half', '/early']) {
      for (const size of ['ended', 'endless'] as const) {
        // With an answer that is whole it goes on for as long as its writer does, as undici's own.
        const isWhole = path === '/early' && size === 'endless';
        it(`pipeline() of an ${size} body hears of its end once: ${path}`, async (t) => {
          const { calls, ends, dialer } = await setup(t);
          const duplex = calls.pipeline({ ...POST, path }, ({ body }) => body);
          const source = new PassThrough();
          source.write('some');
          if (size === 'ended') source.end();
          const sink = new Writable({ write: (_chunk, _encoding, done) => done() });
          const end = await ended(pipeline(source, duplex, sink));
          assert.equal(end, isWhole ? 'NEVER' : path === '/early' ? 'ok' : 'ERR_KEDGE_CONNECTION');
          await sleep(50);
          assert.deepEqual(ends, [1]);
          assert.equal(dialer.stats().inFlight, 0);
        });

        it(`stream() of an ${size} body hears of its end once: ${path}`, async (t) => {
          const { calls, ends, dialer } = await setup(t);
          const body = new PassThrough();
          body.write('some');
          if (size === 'ended') body.end();
          const sink = new Writable({ write: (_chunk, _encoding, done) => done() });
          sink.on('error', () => {});
          const end = await ended(calls.stream({ ...POST, path, body, opaque: 1 }, () => sink));
          assert.equal(end, path === '/early' ? 'ok' : 'ERR_KEDGE_CONNECTION');
          await sleep(50);
          assert.deepEqual(ends, [1]);
          assert.equal(dialer.stats().inFlight, 0);
          assert.ok(body.destroyed || body.readableEnded, 'the body is let go');
        });
      }
    }
    it('pipeline() whose handler throws, whose reader leaves, and whose writer breaks', async (t) => {
      const { calls, ends, dialer } = await setup(t);
      const throwing = calls.pipeline(POST, () => {
        throw new Error('thrown by the handler');
      });
      throwing.end('x');
      throwing.resume();
      await assert.rejects(finished(throwing), /thrown by the handler/);
      const left = calls.pipeline(POST, ({ body }) => body);
      left.write('x');
      left.once('data', () => left.destroy());
      await assert.rejects(finished(left), { code: 'UND_ERR_ABORTED' });
      const broken = calls.pipeline(POST, ({ body }) => body);
      broken.resume();
      const source = Readable.from(
        (async function* () {
          yield 'x';
          await sleep(20);
          throw new Error('the source broke');
        })(),
      );
      await assert.rejects(pipeline(source, broken, new PassThrough().resume()), /the source broke/);
      await sleep(50);
      assert.deepEqual(ends, [1, 1, 1]);
      assert.equal(dialer.stats().inFlight, 0);
    });
  });
}

describe('an upgrade', () => {
  it('ends once however it ends', async (t) => {
    const sockets: Socket[] = [];
    const kedge = await startKedge(t, {
      onUpgrade: (request, socket) => {
        sockets.push(socket);
        const answer = 'HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: x\r\n\r\n';
        socket.on('data', () => {});
        if (request.url === '/refused') socket.end('HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n');
        else if (request.url === '/closed') socket.destroy();
        else if (request.url === '/silent') return;
        else socket.write(answer);
      },
    });
    const dialer = kedge.dialer();
    const { calls, ends } = counted(dialer.dispatcher);
    const options = { origin: ORIGIN, protocol: 'x' };
    await assert.rejects(calls.upgrade({ ...options, path: '/refused' }), /bad upgrade/);
    await assert.rejects(calls.upgrade({ ...options, path: '/closed' }), { code: 'ERR_KEDGE_CONNECTION' });
    await assert.rejects(calls.upgrade({ ...options, path: '/silent', signal: AbortSignal.timeout(100) }), {
      name: 'TimeoutError',
    });
    await assert.rejects(calls.upgrade({ ...options, path: '/fine', signal: AbortSignal.abort() }), {
      code: 'UND_ERR_ABORTED',
    });
    for (const wait of [0, 1, 2, 5, 10]) {
      const during = new AbortController();
      const call = calls.upgrade({ ...options, path: '/fine', signal: during.signal });
      setTimeout(() => during.abort(), wait);
      await call.then(
        ({ socket }) => socket.destroy(),
        ({ name }) => assert.equal(name, 'AbortError'),
      );
    }
    const before = kedge.handshakes;
    await assert.rejects(calls.upgrade({ ...options, protocol: 'x\r\ny: z', path: '/fine' }), {
      code: 'ERR_KEDGE_REQUEST',
    });
    assert.equal(kedge.handshakes, before);
    const late = new AbortController();
    const { socket } = await calls.upgrade({ ...options, path: '/fine', signal: late.signal });
    late.abort();
    await sleep(50);
    assert.equal(socket.destroyed, false, 'the answer has been given');
    assert.equal(dialer.stats().inFlight, 0);
    socket.destroy();
    await sleep(50);
    assert.deepEqual(
      ends,
      ends.map(() => 1),
    );
    assert.ok(
      sockets.every(({ destroyed }) => destroyed),
      'no upgraded connection is left',
    );
    assert.equal(dialer.stats().inFlight, 0);
  });
});
