import assert from 'node:assert/strict';
import http2 from 'node:http2';
import { describe, it } from 'node:test';
import * as grpc from '@grpc/grpc-js';
import { grpcDialer } from '../../src/grpc/index.ts';
import { isKedgeError, single, staticToken, type TokenSource } from '../../src/index.ts';
import { echoClient, type GrpcKedge, startEchoServer, startGrpcKedge, unary } from '../helpers/grpc-kedge.ts';

const ADDRESS = 'greeter.us1:9090';
const EchoClient = echoClient();

/** Calls that are under way on the same connection while `attack` runs; none of them may notice. */
async function unharmed(kedge: GrpcKedge, client: InstanceType<typeof EchoClient>, attack: () => Promise<void>) {
  const before = kedge.calls.length;
  const innocent = Array.from({ length: 20 }, () => unary(client, 'innocent'));
  while (kedge.calls.length < before + innocent.length) await new Promise(setImmediate);
  try {
    await attack();
  } finally {
    await Promise.all(innocent);
  }
  assert.equal(kedge.handshakes, 1, 'the connection was lost');
}

const slowForInnocents: grpc.handleUnaryCall<{ text: string }, { text: string; authority: string }> = (call, done) => {
  const reply = { text: call.request.text, authority: call.getHost() };
  setTimeout(() => done(null, reply), call.request.text === 'innocent' ? 300 : 0);
};

const refused = (error: grpc.ServiceError) => {
  assert.equal(error.code, grpc.status.INVALID_ARGUMENT, error.message);
  assert.ok(isKedgeError(error.cause) && error.cause.code === 'ERR_KEDGE_REQUEST');
  return true;
};

const generator = (name: string, value: string) =>
  grpc.credentials.createFromMetadataGenerator((_options, callback) => {
    const metadata = new grpc.Metadata();
    metadata.set(name, value);
    callback(null, metadata);
  });

describe('what a caller puts into its metadata', () => {
  it('costs nobody the connection, whatever HTTP header it is, once or twice', async (t) => {
    const kedge = await startGrpcKedge(t, { unary: slowForInnocents });
    const client = new (grpcDialer(kedge.dialer()).wrap(EchoClient))(ADDRESS);
    const names = Object.entries(http2.constants)
      .filter(([constant, name]) => constant.startsWith('HTTP2_HEADER_') && typeof name === 'string')
      .map(([, name]) => String(name));
    assert.ok(names.length > 70);
    await unharmed(kedge, client, async () => {
      for (const name of names) {
        for (const times of [1, 2]) {
          const metadata = new grpc.Metadata();
          for (let i = 0; i < times; i += 1) metadata.add(name, '1');
          await unary(client, 'x', metadata, { deadline: Date.now() + 2000 }).then(
            () => {},
            (error: grpc.ServiceError) => refused(error),
          );
        }
      }
    });
  });

  it('costs nobody the connection, however much it is', async (t) => {
    const kedge = await startGrpcKedge(t, { unary: slowForInnocents });
    const client = new (grpcDialer(kedge.dialer()).wrap(EchoClient))(ADDRESS);
    await unharmed(kedge, client, async () => {
      const fits = new grpc.Metadata();
      fits.set('big', 'x'.repeat(50_000));
      await unary(client, 'x', fits);
      for (const size of [70_000, 300_000]) {
        const metadata = new grpc.Metadata();
        metadata.set('big', 'x'.repeat(size));
        await assert.rejects(unary(client, 'x', metadata), refused);
        const binary = new grpc.Metadata();
        binary.set('big-bin', Buffer.alloc(size));
        await assert.rejects(unary(client, 'x', binary), refused);
      }
      const many = new grpc.Metadata();
      for (let i = 0; i < 5000; i += 1) many.set(`k${i}`, 'x');
      await assert.rejects(unary(client, 'x', many), refused);
    });
  });

  it('costs nobody the connection when metadata and credentials give the same header', async (t) => {
    const kedge = await startGrpcKedge(t, { unary: slowForInnocents });
    const client = new (grpcDialer(kedge.dialer()).wrap(EchoClient))(ADDRESS);
    await unharmed(kedge, client, async () => {
      for (const name of ['proxy-authorization', 'date', 'range']) {
        const metadata = new grpc.Metadata();
        metadata.set(name, 'mine');
        const call = unary(client, 'x', metadata, { credentials: generator(name, 'its'), deadline: Date.now() + 2000 });
        await assert.rejects(call, (error: grpc.ServiceError) => {
          assert.equal(error.code, grpc.status.UNAUTHENTICATED);
          assert.ok(isKedgeError(error.cause) && error.cause.code === 'ERR_KEDGE_REQUEST');
          return true;
        });
      }
    });
  });

  it('is not needed: credentials that give nothing useful end their call', async (t) => {
    const kedge = await startGrpcKedge(t);
    const client = new (grpcDialer(kedge.dialer()).wrap(EchoClient))(ADDRESS);
    for (const given of [undefined, null, {}, 'Bearer x']) {
      const credentials = grpc.credentials.createFromMetadataGenerator((_options, callback) =>
        callback(null, given as never),
      );
      const call = unary(client, 'x', undefined, { credentials, deadline: Date.now() + 2000 });
      await assert.rejects(call, { code: grpc.status.UNAUTHENTICATED }, String(given));
    }
  });
});

describe('tokens', () => {
  it('that were refused are asked for again, by the next call', async (t) => {
    let current = 'old';
    const source: TokenSource = {
      name: 'rotating',
      peek: () => current,
      token: async () => current,
      invalidate: () => {
        current = 'new';
      },
    };
    const kedge = await startGrpcKedge(t, {
      unary: (call, callback) => {
        const authorized = call.metadata.get('authorization')[0] === 'Bearer new';
        if (authorized) callback(null, { text: 'in', authority: '' });
        else callback({ code: grpc.status.UNAUTHENTICATED, details: 'who?' });
      },
    });
    const dialer = kedge.dialer({ mapper: single(kedge.route({ backendAuth: source })) });
    const client = new (grpcDialer(dialer).wrap(EchoClient))(ADDRESS);
    await assert.rejects(unary(client, 'x'), { code: grpc.status.UNAUTHENTICATED });
    assert.equal(kedge.calls.length, 1, 'nothing is sent again of its own accord');
    assert.equal((await unary(client, 'x')).text, 'in');
  });

  it('of the caller never go over plain http', async (t) => {
    const { port, calls } = await startEchoServer(t);
    const kedge = await startGrpcKedge(t);
    const dialer = kedge.dialer({ mapper: single(`http://127.0.0.1:${port}`) });
    const client = new (grpcDialer(dialer).wrap(EchoClient))(ADDRESS);
    assert.equal((await unary(client, 'plain')).authority, ADDRESS);
    await assert.rejects(unary(client, 'x', undefined, { credentials: generator('authorization', 'secret') }), refused);
    const composed = grpc.credentials.combineChannelCredentials(
      grpc.credentials.createSsl(),
      generator('authorization', 'secret'),
    );
    const other = new (grpcDialer(dialer).wrap(EchoClient))(ADDRESS, composed);
    await assert.rejects(unary(other, 'x'), refused);
    assert.equal(calls.length, 1);
  });
});

describe('the cause of a failed call', () => {
  it('survives interceptors and streams', async (t) => {
    const kedge = await startGrpcKedge(t);
    const dialer = kedge.dialer({ mapper: single(kedge.route({ proxyAuth: staticToken('proxy') })) });
    const passing: grpc.Interceptor = (options, nextCall) =>
      new grpc.InterceptingCall(nextCall(options), {
        start: (metadata, _listener, next) =>
          next(metadata, { onReceiveStatus: (status, forward) => forward({ ...status }) }),
      });
    const client = new (grpcDialer(dialer).wrap(EchoClient))(ADDRESS, undefined, { interceptors: [passing] });
    const metadata = new grpc.Metadata();
    metadata.set('proxy-authorization', 'mine');
    await assert.rejects(unary(client, 'x', metadata), refused);
    for (const open of [() => client.serverStream({ text: 'x' }, metadata), () => client.bidi(metadata)]) {
      const stream = open();
      refused(await new Promise<grpc.ServiceError>((resolve) => stream.once('error', resolve as never)));
    }
  });

  it('reaches a call that an interceptor starts after its client was closed', async (t) => {
    const kedge = await startGrpcKedge(t);
    const dialer = kedge.dialer();
    const late: grpc.Interceptor = (options, nextCall) =>
      new grpc.InterceptingCall(nextCall(options), {
        start: (metadata, listener, next) => void setTimeout(next, 50, metadata, listener),
      });
    const client = new (grpcDialer(dialer).wrap(EchoClient))(ADDRESS, undefined, { interceptors: [late] });
    client.close();
    await assert.rejects(
      unary(client, 'x'),
      (error: grpc.ServiceError) => isKedgeError(error.cause) && error.cause.code === 'ERR_KEDGE_CLOSED',
    );
    assert.equal(kedge.calls.length, 0);
    assert.equal(dialer.stats().inFlight, 0);
    await dialer.close();
  });
});
