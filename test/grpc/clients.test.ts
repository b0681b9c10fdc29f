import assert from 'node:assert/strict';
import { describe, it } from 'node:test';
import { promisify } from 'node:util';
import * as grpc from '@grpc/grpc-js';
import { createClient } from 'nice-grpc';
import { grpcDialer } from '../../src/grpc/index.ts';
import { single, staticToken } from '../../src/index.ts';
import { type Echo, echoClient, echoService, startGrpcKedge, unary } from '../helpers/grpc-kedge.ts';
import {
  GreeterClient,
  type GreeterServer,
  GreeterService,
  type GreetReply,
  type GreetRequest,
} from './generated/greeter.ts';

const ADDRESS = 'greeter.us1:9090';

/** As grpc-js plugins of protobuf-ts and ts-proto generate it: a class with a service definition and typed methods. */
class GeneratedClient extends grpc.Client {
  static readonly serviceName = 'test.Echo';
  static readonly service = echoService('test.Echo');

  constructor(address: string, credentials: grpc.ChannelCredentials, options: Partial<grpc.ClientOptions> = {}) {
    super(address, credentials, options);
  }

  unary(request: { text: string }, callback: grpc.requestCallback<Echo>): grpc.ClientUnaryCall {
    const { path, requestSerialize, responseDeserialize } = GeneratedClient.service.unary;
    return this.makeUnaryRequest(path, requestSerialize, responseDeserialize, request, callback);
  }
}

describe('clients of others', () => {
  it('what ts-proto generates makes the four kinds of calls', async (t) => {
    const kedge = await startGrpcKedge(t, {
      addServices: (server) =>
        server.addService(GreeterService, {
          greet: (call, done) => done(null, { text: `hello ${call.request.name}` }),
          greetMany: (call) => {
            for (const letter of call.request.name) call.write({ text: letter });
            call.end();
          },
          greetAll: (call, done) => {
            let text = '';
            call.on('data', ({ name }) => {
              text += name;
            });
            call.on('end', () => done(null, { text }));
          },
          chat: (call) => {
            call.on('data', ({ name }) => call.write({ text: name }));
            call.on('end', () => call.end());
          },
        } satisfies GreeterServer),
    });
    const dialer = grpcDialer(kedge.dialer());
    const collect = async (replies: AsyncIterable<GreetReply>) => {
      let all = '';
      for await (const { text } of replies) all += text;
      return all;
    };
    const Wrapped = dialer.wrap(GreeterClient);
    assert.equal(Wrapped.serviceName, 'test.greeter.Greeter');
    const overridden = { channelOverride: dialer.channel(ADDRESS) };
    for (const client of [
      new Wrapped(ADDRESS),
      new GreeterClient(ADDRESS, grpc.credentials.createInsecure(), overridden),
    ]) {
      const greet = promisify<GreetRequest, GreetReply>(client.greet.bind(client) as never);
      assert.equal((await greet({ name: 'you' })).text, 'hello you');
      assert.equal(await collect(client.greetMany({ name: 'abc' })), 'abc');
      const { promise, resolve, reject } = Promise.withResolvers<GreetReply>();
      const all = client.greetAll((error, reply) => (error === null ? resolve(reply) : reject(error)));
      all.write({ name: 'x' });
      all.end({ name: 'y' });
      assert.equal((await promise).text, 'xy');
      const chat = client.chat();
      chat.write({ name: '1' });
      chat.end({ name: '2' });
      assert.equal(await collect(chat), '12');
    }
    assert.equal(kedge.handshakes, 1);
  });

  it('a generated class keeps its statics, its name and its instanceof', async (t) => {
    const kedge = await startGrpcKedge(t);
    const Wrapped = grpcDialer(kedge.dialer()).wrap(GeneratedClient);
    assert.equal(Wrapped.name, 'GeneratedClient');
    assert.equal(Wrapped.serviceName, 'test.Echo');
    const client = new Wrapped(ADDRESS);
    assert.ok(client instanceof GeneratedClient && client instanceof Wrapped);
    class Subclass extends Wrapped {
      readonly mine = true;
    }
    for (const each of [client, new Subclass(ADDRESS, undefined, {})]) {
      const reply = await new Promise<Echo>((resolve, reject) => {
        each.unary({ text: 'hi' }, (error, value) => (error === null ? resolve(value!) : reject(error)));
      });
      assert.deepEqual(reply, { text: 'hi', authority: ADDRESS });
      each.close();
    }
    assert.equal(kedge.handshakes, 1);
  });

  it('nice-grpc takes channel()', async (t) => {
    const kedge = await startGrpcKedge(t);
    const dialer = kedge.dialer({ mapper: single(kedge.route({ backendAuth: staticToken('backend') })) });
    const client = createClient(echoService('test.Echo') as never, grpcDialer(dialer).channel(ADDRESS)) as unknown as {
      unary(request: { text: string }): Promise<Echo>;
      serverStream(request: { text: string }): AsyncIterable<Echo>;
      bidi(requests: AsyncIterable<{ text: string }>): AsyncIterable<Echo>;
    };
    assert.deepEqual(await client.unary({ text: 'nice' }), { text: 'nice', authority: ADDRESS });
    const texts: string[] = [];
    for await (const { text } of client.serverStream({ text: 'abc' })) texts.push(text);
    async function* requests() {
      yield { text: '1' };
      yield { text: '2' };
    }
    for await (const { text } of client.bidi(requests())) texts.push(text);
    assert.deepEqual(texts, ['a', 'b', 'c', '1', '2']);
    assert.deepEqual(kedge.calls[0]!.metadata.get('authorization'), ['Bearer backend']);
  });

  it("the caller's retry policy works", async (t) => {
    let attempts = 0;
    const kedge = await startGrpcKedge(t, {
      unary: (call, callback) => {
        attempts += 1;
        if (attempts < 3) callback({ code: grpc.status.UNAVAILABLE, details: 'busy' });
        else callback(null, { text: call.request.text, authority: '' });
      },
    });
    const retryPolicy = {
      maxAttempts: 4,
      initialBackoff: '0.01s',
      maxBackoff: '0.1s',
      backoffMultiplier: 2,
      retryableStatusCodes: ['UNAVAILABLE'],
    };
    const service = JSON.stringify({ methodConfig: [{ name: [{ service: 'test.Echo' }], retryPolicy }] });
    const { wrap } = grpcDialer(kedge.dialer());
    const patient = new (wrap(echoClient()))(ADDRESS, undefined, { 'grpc.service_config': service });
    assert.equal((await unary(patient, 'x')).text, 'x');
    assert.equal(attempts, 3);
    attempts = 0;
    await assert.rejects(unary(new (wrap(echoClient()))(ADDRESS), 'x'), { code: grpc.status.UNAVAILABLE });
    assert.equal(attempts, 1, 'nothing is sent again of its own accord');
  });

  it('more calls than a connection takes open another', async (t) => {
    const kedge = await startGrpcKedge(t, {
      server: { 'grpc.max_concurrent_streams': 100 },
      unary: (call, callback) => setTimeout(() => callback(null, { text: call.request.text, authority: '' }), 300),
    });
    const client = new (grpcDialer(kedge.dialer()).wrap(echoClient()))(ADDRESS);
    const raw = new (echoClient())(
      `127.0.0.1:${kedge.port}`,
      grpc.credentials.createSsl(
        Buffer.from(kedge.ca.cert),
        Buffer.from(kedge.client.key),
        Buffer.from(kedge.client.cert),
      ),
      {
        'grpc.ssl_target_name_override': 'us1.kedge.test',
      },
    );
    const time = async (each: typeof client) => {
      await unary(each, 'warm');
      const begin = performance.now();
      await Promise.all(Array.from({ length: 500 }, (_, i) => unary(each, String(i))));
      return performance.now() - begin;
    };
    const ours = await time(client);
    const theirs = await time(raw);
    raw.close();
    assert.ok(kedge.handshakes >= 6, `${kedge.handshakes} connections`);
    t.diagnostic(
      `500 calls of 300 ms: ${ours.toFixed(0)} ms against ${theirs.toFixed(0)} ms: ${(ours / theirs).toFixed(2)}`,
    );
  });
});
