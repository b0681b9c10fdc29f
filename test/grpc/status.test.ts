import assert from 'node:assert/strict';
import { once } from 'node:events';
import http2 from 'node:http2';
import { describe, it, type TestContext } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import * as grpc from '@grpc/grpc-js';
import { grpcDialer } from '../../src/grpc/index.ts';
import { type Dialer, isKedgeError, kedgeErrorOf, single, type TokenSource } from '../../src/index.ts';
import { echoClient, startGrpcKedge, unary } from '../helpers/grpc-kedge.ts';
import { startKedge, type TestKedge } from '../helpers/kedge.ts';

const ADDRESS = 'greeter.us1:9090';
const Client = echoClient();
const { status } = grpc;

/** A kedge that answers every call by hand. */
async function startAnswering(t: TestContext, answer: (stream: http2.ServerHttp2Stream) => void | Promise<void>) {
  const server = http2.createServer();
  server.on('session', (session) => session.on('error', () => {}));
  server.on('stream', (stream) => {
    stream.on('error', () => {});
    void answer(stream);
  });
  const kedge = await startKedge(t, { onH2: (socket) => server.emit('connection', socket) });
  const dialer = kedge.dialer();
  return { kedge, dialer, client: new (grpcDialer(dialer).wrap(Client))(ADDRESS) };
}

const failure = (call: Promise<unknown>) =>
  call.then(
    () => assert.fail('it did not fail'),
    (error: grpc.ServiceError) => error,
  );

describe('what a caller gives a gRPC call', () => {
  const wrong = {
    deadline: [new Date().toISOString(), 10n, {}, null, Number.NaN, new Date('never')],
    method: [undefined, 7, {}],
  };

  it('of the wrong type is a TypeError at the call, connected or not, and holds nothing', async (t) => {
    const silent = await startKedge(t, { onTcp: () => true });
    const kedge = await startGrpcKedge(t);
    for (const dialer of [silent.dialer(), kedge.dialer()]) {
      const channel = grpcDialer(dialer).channel(ADDRESS);
      for (let i = 0; i < 2; i += 1) {
        for (const deadline of wrong.deadline) {
          assert.throws(() => channel.createCall('/a/b', deadline as never, null, null, null), TypeError);
        }
        for (const method of wrong.method) {
          assert.throws(
            () => channel.createCall(method as never, Number.POSITIVE_INFINITY, null, null, null),
            TypeError,
          );
        }
        if (dialer !== silent.dialer()) await new Promise(setImmediate);
      }
      assert.equal(dialer.stats().inFlight, 0);
    }
    const dialer = kedge.dialer();
    const client = new (grpcDialer(dialer).wrap(Client))(ADDRESS);
    for (let i = 0; i < 2; i += 1) {
      assert.throws(() => client.unary({ text: 'x' }, new grpc.Metadata(), { deadline: '2030' as never }, () => {}), {
        name: 'TypeError',
        message: 'Channel#createCall: deadline must be a number or Date',
      });
      assert.equal((await unary(client, 'x')).text, 'x');
    }
    assert.equal(dialer.stats().inFlight, 0);
    await dialer.close();
  });

  it('may be a deadline that is further away than grpc-js can say', async (t) => {
    const kedge = await startGrpcKedge(t);
    const client = new (grpcDialer(kedge.dialer()).wrap(Client))(ADDRESS);
    for (const deadline of [new Date(8.64e15), Number.MAX_VALUE]) {
      assert.equal((await unary(client, 'x', undefined, { deadline })).text, 'x');
    }
  });

  it('ends that call only, where grpc-js refuses it', async (t) => {
    const kedge = await startGrpcKedge(t);
    const dialer = kedge.dialer();
    const client = new (grpcDialer(dialer).wrap(Client))(ADDRESS);
    // Its parent's deadline is asked for when grpc-js makes its call.
    const parent = {
      on: () => {},
      removeListener: () => {},
      getDeadline: () => {
        throw new Error('not here');
      },
    };
    const before = unary(client, 'before');
    const call = failure(unary(client, 'x', undefined, { parent: parent as never }));
    const after = unary(client, 'after');
    assert.equal((await before).text, 'before');
    assert.equal((await after).text, 'after');
    assert.ok(isKedgeError((await call).cause));
    assert.equal(dialer.stats().inFlight, 0);
  });
});

describe("a method's timeout in the service config", () => {
  const options = (timeout: unknown): grpc.ClientOptions => ({
    'grpc.service_config': JSON.stringify({ methodConfig: [{ name: [{ service: 'test.Echo' }], timeout }] }),
  });

  it('counts from the start of the call, while it waits for a connection or a token, too', async (t) => {
    const kedge = await startGrpcKedge(t, { unary: () => {} });
    const silent = await startKedge(t, { onTcp: () => true });
    const slow: TokenSource = { name: 'slow', peek: () => undefined, token: () => sleep(700, 'late') };
    const never: TokenSource = { name: 'never', peek: () => undefined, token: () => new Promise(() => {}) };
    const dialers = [
      silent.dialer(),
      kedge.dialer({ mapper: single(kedge.route({ proxyAuth: never })) }),
      kedge.dialer({ mapper: single(kedge.route({ proxyAuth: slow })) }),
    ];
    for (const timeout of ['1s', { seconds: 1, nanos: 0 }]) {
      for (const dialer of dialers) {
        const client = new (grpcDialer(dialer).wrap(Client))(ADDRESS, undefined, options(timeout));
        const began = performance.now();
        const error = await failure(unary(client, 'x', new grpc.Metadata({ waitForReady: true })));
        assert.equal(error.code, status.DEADLINE_EXCEEDED, error.message);
        const took = performance.now() - began;
        assert.ok(took > 900 && took < 1600, `${took.toFixed(0)} ms`);
        assert.equal(dialer.stats().inFlight, 0);
      }
    }
    const client = new (grpcDialer(silent.dialer()).wrap(Client))(ADDRESS, undefined, options('1s'));
    const error = await failure(unary(client, 'x', undefined, { deadline: Date.now() + 100 }));
    assert.equal(error.code, status.DEADLINE_EXCEEDED);
  });
});

describe('a token source whose invalidate() throws', () => {
  it('keeps no call from its end', async (t) => {
    const source: TokenSource = {
      name: 'read-only',
      peek: () => 'token',
      token: async () => 'token',
      invalidate: () => {
        throw new Error('EROFS');
      },
    };
    const kedge = await startGrpcKedge(t, { unary: (_call, done) => done({ code: status.UNAUTHENTICATED }) });
    const dialer = kedge.dialer({ mapper: single(kedge.route({ proxyAuth: source, backendAuth: source })) });
    const client = new (grpcDialer(dialer).wrap(Client))(ADDRESS);
    for (let i = 0; i < 2; i += 1) assert.equal((await failure(unary(client, 'x'))).code, status.UNAUTHENTICATED);
    assert.equal(dialer.stats().inFlight, 0);
  });
});

describe('a status after headers', () => {
  const details = ['Connection dropped', 'Failed to connect to the database', 'read ECONNRESET'];

  it('is what the backend says, in its own words', async (t) => {
    for (const said of details) {
      const { client } = await startAnswering(t, (stream) => {
        stream.respond({ ':status': 200, 'content-type': 'application/grpc' }, { waitForTrailers: true });
        stream.on('wantTrailers', () => stream.sendTrailers({ 'grpc-status': '14', 'grpc-message': said }));
        stream.end();
      });
      const error = await failure(unary(client, 'x'));
      assert.equal(error.details, said);
      assert.equal(error.cause, undefined);
      assert.equal(kedgeErrorOf(error), undefined);
    }
  });

  it('is of the connection when that is lost', async (t) => {
    for (const cut of ['reset', 'close'] as const) {
      const { client, kedge } = await startAnswering(t, (stream) => {
        stream.respond({ ':status': 200, 'content-type': 'application/grpc' });
        setTimeout(() => kedge[cut](), 50);
      });
      const error = await failure(unary(client, 'x'));
      assert.equal(error.code, status.UNAVAILABLE);
      assert.equal((error.cause as { code?: string } | undefined)?.code, 'ERR_KEDGE_CONNECTION', cut);
    }
  });
});

describe('a call that the kedge resets', () => {
  const CODES = [0, 1, 2, 3, 4, 5, 6, 9, 10, 11, 12, 13, 14, 77];

  /** Resets with any code, after headers or without. */
  async function startResetting(t: TestContext) {
    const next = { code: 0, hasHeaders: false };
    const { client, kedge } = await startAnswering(t, async (stream) => {
      const { code, hasHeaders } = next;
      if (hasHeaders) {
        stream.respond({ ':status': 200, 'content-type': 'application/grpc' });
        await sleep(20);
      }
      stream.close(code);
    });
    const reset = async (code: number, hasHeaders: boolean) => {
      Object.assign(next, { code, hasHeaders });
      // Not half-closed, for Node's server ends a stream before it resets it.
      const call = client.bidi();
      call.resume();
      const [error] = (await once(call, 'error')) as [grpc.ServiceError];
      return error;
    };
    return { reset, name: `127.0.0.1:${kedge.port}` };
  }

  it('has its status and its text from the code, and says which kedge that was', async (t) => {
    const statuses: Record<number, grpc.status> = { 11: status.RESOURCE_EXHAUSTED, 12: status.PERMISSION_DENIED };
    const { reset, name } = await startResetting(t);
    for (const code of CODES) {
      for (const hasHeaders of [false, true]) {
        const error = await reset(code, hasHeaders);
        assert.equal(error.code, statuses[code] ?? status.INTERNAL, `code ${code}: ${error.details}`);
        assert.ok(!error.details.includes('kedge'), "the text is grpc-js's");
        const { cause } = error;
        assert.ok(isKedgeError(cause), `code ${code}`);
        assert.equal(kedgeErrorOf(error), cause);
        assert.deepEqual([cause.code, cause.target, cause.kedge], ['ERR_KEDGE_CONNECTION', ADDRESS, name]);
      }
    }
  });

  it("is the backend's affair where it was cancelled, for a kedge passes that on", async (t) => {
    const { reset } = await startResetting(t);
    for (const hasHeaders of [false, true]) {
      const error = await reset(http2.constants.NGHTTP2_CANCEL, hasHeaders);
      assert.equal(error.code, status.CANCELLED);
      assert.equal(kedgeErrorOf(error), undefined);
    }
  });

  it('with all others, by a GOAWAY with an error, says which kedge that was', async (t) => {
    for (const code of [2, 8, 11]) {
      const { client, kedge } = await startAnswering(t, (stream) => stream.session!.goaway(code));
      const error = await failure(unary(client, 'x'));
      assert.ok(isKedgeError(error.cause), `code ${code}: ${error.details}`);
      assert.deepEqual([error.cause.code, error.cause.kedge], ['ERR_KEDGE_CONNECTION', `127.0.0.1:${kedge.port}`]);
      assert.match(error.cause.message, new RegExp(`the kedge ended the connection with error code ${code}$`));
    }
  });

  it('is told from one that the dialer ends, which names its kedge as well', async (t) => {
    const endings = [(dialer: Dialer) => dialer.destroy(), (dialer: Dialer) => dialer.close()];
    for (const end of endings) {
      const kedge = await startGrpcKedge(t, { unary: () => {} });
      const dialer = kedge.dialer({ drainTimeoutMs: 50 });
      const call = failure(unary(new (grpcDialer(dialer).wrap(Client))(ADDRESS), 'x'));
      while (kedge.calls.length === 0) await new Promise(setImmediate);
      await end(dialer);
      const { cause } = await call;
      assert.ok(isKedgeError(cause));
      const { code, stage, target, kedge: name } = cause;
      assert.deepEqual([code, stage, target, name], ['ERR_KEDGE_CLOSED', 'kedge', ADDRESS, `127.0.0.1:${kedge.port}`]);
    }
  });
});

describe('a connection that ends after the last message and an OK', () => {
  const COUNT = 30;
  const message = () => {
    const json = Buffer.from('{"text":"x","authority":""}');
    return Buffer.concat([Buffer.from([0, 0, 0, 0, json.length]), json]);
  };

  /** What a caller gets that reads on when the connection is gone. */
  async function readLate(
    t: TestContext,
    end: (kedge: TestKedge, dialer: Dialer) => void,
    pauseMs: number | undefined,
  ) {
    const answered = Promise.withResolvers<void>();
    const { client, kedge, dialer } = await startAnswering(t, async (stream) => {
      stream.respond({ ':status': 200, 'content-type': 'application/grpc' }, { waitForTrailers: true });
      stream.on('wantTrailers', () => {
        stream.sendTrailers({ 'grpc-status': '0' });
        setTimeout(answered.resolve, 300);
      });
      if (pauseMs === undefined) stream.write(Buffer.concat(Array.from({ length: COUNT }, message)));
      else {
        for (let i = 0; i < COUNT; i += 1) {
          stream.write(message());
          await sleep(pauseMs);
        }
      }
      stream.end();
    });
    const call = client.serverStream({ text: '' });
    const ended = new Promise<grpc.ServiceError | undefined>((resolve) => {
      call.on('error', (error) => resolve(error as grpc.ServiceError));
      call.on('end', () => resolve(undefined));
    });
    // It asks for the first, which has some more read ahead, and then for no more.
    await once(call, 'readable');
    await answered.promise;
    end(kedge, dialer);
    await sleep(50);
    let got = 0;
    call.on('data', () => {
      got += 1;
    });
    const late = sleep(3000, 'the call never ended', { ref: false });
    const error = await Promise.race([ended, late]);
    assert.ok(typeof error !== 'string', error);
    assert.equal(dialer.stats().inFlight, 0);
    return { error, got };
  }

  const ends: Record<string, (kedge: TestKedge, dialer: Dialer) => void> = {
    'in order': (kedge) => {
      for (const socket of kedge.sockets) socket.end();
    },
    'by a reset': (kedge) => kedge.reset(),
    'by destroy()': (_kedge, dialer) => void dialer.destroy(),
  };
  for (const [name, end] of Object.entries(ends)) {
    it(`${name} takes nothing from a slow reader that has arrived`, async (t) => {
      assert.deepEqual(await readLate(t, end, undefined), { error: undefined, got: COUNT });
    });

    it(`${name} is the end of a call whose reader was too slow`, async (t) => {
      const { error, got } = await readLate(t, end, 5);
      assert.equal(error?.code, status.UNAVAILABLE);
      assert.ok(isKedgeError(error?.cause));
      assert.ok(got < COUNT);
    });
  }
});

describe('kedgeErrorOf() on gRPC', () => {
  const trailersOnly = (stream: http2.ServerHttp2Stream, code: number, message: string, more = {}) => {
    const head = { ':status': 200, 'content-type': 'application/grpc', 'grpc-status': `${code}`, ...more };
    stream.respond({ ...head, 'grpc-message': encodeURI(message) }, { endStream: true });
  };

  it('knows what a kedge says and no backend has reason to', async (t) => {
    const said = [
      [12, 'unknown route to service', 'kedge'],
      [12, 'unknown backend', 'backend'],
      [14, 'grpc: the connection is unavailable', 'backend'],
      [14, 'the backend cannot be reached', 'backend'],
      [16, 'Request unauthenticated. No proxy-authorization header', 'kedge'],
    ] as const;
    for (const [code, message, stage] of said) {
      const { client } = await startAnswering(t, (stream) => trailersOnly(stream, code, message));
      const error = await failure(unary(client, 'x'));
      assert.equal(error.code, code);
      assert.equal(error.details, message);
      const reported = kedgeErrorOf(error)!;
      assert.deepEqual([reported.code, reported.stage], ['ERR_KEDGE_REPORTED', stage], message);
    }
  });

  it("takes no backend's answer for the kedge's", async (t) => {
    const said = [
      [14, 'no connection to the database'],
      [16, 'unauthorized'],
      [12, 'the backend cannot be reached'],
    ] as const;
    for (const [code, message] of said) {
      const { client } = await startAnswering(t, (stream) => trailersOnly(stream, code, message));
      assert.equal(kedgeErrorOf(await failure(unary(client, 'x'))), undefined, message);
    }
    // A kedge sends headers and status at once.
    const { client } = await startAnswering(t, (stream) => {
      stream.respond({ ':status': 200, 'content-type': 'application/grpc' }, { waitForTrailers: true });
      const trailers = { 'grpc-status': '14', 'grpc-message': 'the backend cannot be reached' };
      stream.on('wantTrailers', () => stream.sendTrailers(trailers));
      stream.end();
    });
    assert.equal(kedgeErrorOf(await failure(unary(client, 'x'))), undefined);
  });

  it('knows what a kedge or gateway says in its headers, with a body and without', async (t) => {
    const headers = { 'x-kedge-error': 'who are you', 'x-kedge-error-type': 'unauthorized' };
    const codes = { 421: status.UNKNOWN, 502: status.UNAVAILABLE, 503: status.UNAVAILABLE };
    for (const [http, code] of Object.entries(codes)) {
      for (const body of ['', 'an HTML page', 'x'.repeat(100_000)]) {
        const { client, kedge } = await startAnswering(t, (stream) => {
          stream.respond(
            { ':status': Number(http), 'content-type': 'text/html', ...headers },
            { endStream: body === '' },
          );
          if (body !== '') stream.end(body);
        });
        const error = await failure(unary(client, 'x'));
        assert.equal(error.code, code);
        const reported = kedgeErrorOf(error)!;
        assert.equal(reported.code, 'ERR_KEDGE_REPORTED');
        assert.match(reported.message, /unauthorized: who are you/);
        assert.deepEqual([reported.target, reported.kedge], [ADDRESS, `127.0.0.1:${kedge.port}`]);
      }
    }
    const { client } = await startAnswering(t, (stream) => trailersOnly(stream, 16, 'unauthorized', headers));
    const error = await failure(unary(client, 'x'));
    assert.equal(error.code, status.UNAUTHENTICATED);
    assert.equal(kedgeErrorOf(error)!.stage, 'kedge');
    // Also from a status or an error that did not come through us.
    const { code, details, metadata } = error;
    assert.equal(kedgeErrorOf({ code, details, metadata })!.stage, 'kedge');
    const ok = await startAnswering(t, (stream) => {
      stream.respond({ ':status': 200, 'content-type': 'application/grpc', ...headers }, { waitForTrailers: true });
      stream.on('wantTrailers', () => stream.sendTrailers({ 'grpc-status': '0' }));
      const json = Buffer.from('{"text":"fine","authority":""}');
      stream.end(Buffer.concat([Buffer.from([0, 0, 0, 0, json.length]), json]));
    });
    assert.equal((await unary(ok.client, 'x')).text, 'fine');
  });
});
