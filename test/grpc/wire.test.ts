import assert from 'node:assert/strict';
import { once } from 'node:events';
import { Readable } from 'node:stream';
import { pipeline } from 'node:stream/promises';
import { describe, it } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import * as grpc from '@grpc/grpc-js';
import { grpcDialer } from '../../src/grpc/index.ts';
import { createDialer, isKedgeError, pem, single, staticToken, type TokenSource } from '../../src/index.ts';
import { type Echo, echoClient, echoService, startEchoServer, startGrpcKedge, unary } from '../helpers/grpc-kedge.ts';
import { startKedge } from '../helpers/kedge.ts';
import { trackLeaks } from '../helpers/leaks.ts';

const ADDRESS = 'Greeter.Shop.svc.us1:9090';
const AUTHORITY = 'greeter.shop.svc.us1:9090';
const EchoClient = echoClient();

describe('a mapped gRPC call', () => {
  it('refuses channel options that no connection can have, by their names, and takes those of grpc-js', async (t) => {
    const kedge = await startGrpcKedge(t);
    const { wrap, channel } = grpcDialer(kedge.dialer());
    const wrong = {
      'grpc-node.flow_control_window': [2 ** 31, 1.5, 0, -1, Number.NaN, '65535'],
      'grpc.keepalive_time_ms': [Number.NaN, -2, '1000', null],
      'grpc.keepalive_timeout_ms': [Number.NaN, 0, -1, 2 ** 31, '1000'],
      'grpc.keepalive_permit_without_calls': [true, 2, '1'],
      'grpc.max_receive_message_length': [Number.NaN, -2, '4096'],
      'grpc.primary_user_agent': [1],
      'grpc.secondary_user_agent': [{}],
    };
    for (const [name, values] of Object.entries(wrong)) {
      for (const value of values) {
        const options = { [name]: value } as grpc.ClientOptions;
        const expected = {
          code: 'ERR_KEDGE_OPTIONS',
          target: AUTHORITY,
          message: new RegExp(`channel options: .${name.replaceAll('.', '[.]')}. is a`),
        };
        assert.throws(() => new (wrap(EchoClient))(ADDRESS, undefined, options), expected, `${name} ${value}`);
        assert.throws(() => channel(ADDRESS, undefined, options), expected, `${name} ${value}`);
      }
    }
    for (const options of [
      { 'grpc-node.flow_control_window': 1 },
      { 'grpc-node.flow_control_window': 2 ** 31 - 1 },
      { 'grpc.keepalive_time_ms': -1, 'grpc.max_receive_message_length': -1 },
      { 'grpc.keepalive_time_ms': 0, 'grpc.keepalive_permit_without_calls': 1 },
      { 'grpc.keepalive_time_ms': Number.POSITIVE_INFINITY, 'grpc.keepalive_timeout_ms': 2 ** 31 - 1 },
    ]) {
      assert.equal((await unary(new (wrap(EchoClient))(ADDRESS, undefined, options), 'x')).text, 'x');
    }
  });

  it("has the user agent that it has without a kedge, with the caller's before and after", async (t) => {
    const kedge = await startGrpcKedge(t);
    const { port, calls } = await startEchoServer(t);
    const Wrapped = grpcDialer(kedge.dialer()).wrap(EchoClient);
    const agents: grpc.ClientOptions[] = [
      {},
      { 'grpc.primary_user_agent': 'app/1' },
      { 'grpc.primary_user_agent': 'app/1', 'grpc.secondary_user_agent': 'lib/2' },
    ];
    for (const options of agents) {
      const raw = new EchoClient(`127.0.0.1:${port}`, grpc.credentials.createInsecure(), options);
      await Promise.all([unary(raw, 'x'), unary(new Wrapped(ADDRESS, undefined, options), 'x')]);
      raw.close();
      assert.deepEqual(kedge.calls.at(-1)!.metadata.get('user-agent'), calls.at(-1)!.metadata.get('user-agent'));
    }
    assert.match(
      String(calls.at(-1)!.metadata.get('user-agent')),
      /^app[/]1 grpc-node-js[/]\d+[.]\d+[.]\d+\S* lib[/]2$/,
    );
  });

  it('keeps its authority, proves itself to the kedge by its name, and brings the tokens', async (t) => {
    const kedge = await startGrpcKedge(t);
    const dialer = kedge.dialer({
      mapper: single(
        kedge.route({ proxyAuth: staticToken('for-the-kedge'), backendAuth: staticToken('for-the-backend') }),
      ),
    });
    const { wrap, channel, channelFactory } = grpcDialer(dialer);
    const clients = {
      wrap: new (wrap(EchoClient))(ADDRESS),
      channel: new EchoClient(ADDRESS, grpc.credentials.createInsecure(), {
        channelOverride: channel(`dns:///${ADDRESS}`),
      }),
      factory: new EchoClient(ADDRESS, grpc.credentials.createInsecure(), { channelFactoryOverride: channelFactory }),
    };
    for (const [seam, client] of Object.entries(clients)) {
      assert.deepEqual(await unary(client, 'hi'), { text: 'hi', authority: AUTHORITY }, seam);
      const { metadata } = kedge.calls.at(-1)!;
      assert.deepEqual(metadata.get('proxy-authorization'), ['Bearer for-the-kedge'], seam);
      assert.deepEqual(metadata.get('authorization'), ['Bearer for-the-backend'], seam);
      client.close();
    }
    assert.equal(kedge.connections.length, 1, 'closing one client closes nothing of another');
    assert.equal(kedge.connections[0]!.sni, 'us1.kedge.test');
    assert.equal(kedge.connections[0]!.clientSubject, 'pod');
  });

  it('may be of any kind', async (t) => {
    const kedge = await startGrpcKedge(t);
    const client = new (grpcDialer(kedge.dialer()).wrap(EchoClient))(ADDRESS);
    assert.equal((await unary(client, 'one')).text, 'one');

    const joined = await new Promise<Echo>((resolve, reject) => {
      const call = client.clientStream(new grpc.Metadata(), (error, reply) =>
        error ? reject(error) : resolve(reply!),
      );
      for (const text of ['a', 'b', 'c']) call.write({ text });
      call.end();
    });
    assert.equal(joined.text, 'abc');

    const texts: string[] = [];
    for await (const { text } of client.serverStream({ text: 'xyz' }) as AsyncIterable<Echo>) texts.push(text);
    assert.deepEqual(texts, ['x', 'y', 'z']);

    const bidi = client.bidi();
    for (const text of ['1', '2', '3']) {
      bidi.write({ text });
      const [reply] = (await once(bidi, 'data')) as [Echo];
      assert.deepEqual(reply, { text, authority: AUTHORITY });
    }
    bidi.end();
    const [status] = (await once(bidi, 'status')) as [grpc.StatusObject];
    assert.equal(status.code, grpc.status.OK);
  });

  it('calls back every write, before and after its end', async (t) => {
    const early = {
      early: { ...echoService('test.Early').clientStream, path: '/test.Early/Early' },
    };
    const answers = [{ code: grpc.status.NOT_FOUND, details: 'enough' }, null];
    const kedge = await startGrpcKedge(t, {
      addServices: (server) =>
        server.addService(early, {
          early: (call: grpc.ServerReadableStream<unknown, Echo>, callback: grpc.sendUnaryData<Echo>) => {
            const error = answers.shift()!;
            call.once('data', () => callback(error, error === null ? { text: 'enough', authority: '' } : undefined));
          },
        }),
    });
    const Early = grpc.makeGenericClientConstructor(early, 'test.Early');
    const client = new (grpcDialer(kedge.dialer()).wrap(Early as never) as never as grpc.ServiceClientConstructor)(
      ADDRESS,
      grpc.credentials.createInsecure(),
    );
    type Early = (callback: (error: grpc.ServiceError | null) => void) => grpc.ClientWritableStream<{ text: string }>;
    const call = () => {
      const { promise: ended, resolve } = Promise.withResolvers<grpc.status | undefined>();
      const stream = (client['early'] as unknown as Early).call(client, (error) => resolve(error?.code));
      return { ended, stream };
    };
    const words = async function* () {
      for (let i = 0; i < 40; i += 1) {
        yield { text: 'x' };
        await sleep(5);
      }
    };
    for (const code of [grpc.status.NOT_FOUND, undefined]) {
      const { ended, stream } = call();
      const written = pipeline(Readable.from(words()), stream as never as NodeJS.WritableStream).then(() => 'written');
      assert.equal(await Promise.race([written, sleep(3000, 'hangs', { ref: false })]), 'written');
      assert.equal(await ended, code);
    }
  });

  it('calls back what its end found unsent', async (t) => {
    const silent = await startKedge(t, { onTcp: () => true });
    const channel = grpcDialer(silent.dialer()).channel(ADDRESS);
    const call = channel.createCall('/test.Echo/ClientStream', Number.POSITIVE_INFINITY, null, null, null);
    const status = Promise.withResolvers<grpc.StatusObject>();
    call.start(new grpc.Metadata(), {
      onReceiveMetadata: () => {},
      onReceiveMessage: () => {},
      onReceiveStatus: status.resolve,
    });
    const done: number[] = [];
    for (const i of [0, 1, 2]) call.sendMessageWithContext({ callback: () => done.push(i) }, Buffer.from('x'));
    call.cancelWithStatus(grpc.status.CANCELLED, 'enough');
    assert.equal((await status.promise).code, grpc.status.CANCELLED);
    call.sendMessageWithContext({ callback: () => done.push(3) }, Buffer.from('x'));
    assert.ok(!done.includes(3), 'not before it returns');
    await sleep(20);
    assert.deepEqual(done, [0, 1, 2, 3]);
  });

  it('shares connections: 200 calls to 20 services open at most 2', async (t) => {
    const services = Array.from({ length: 20 }, (_, i) => `svc${i}.Echo`);
    const kedge = await startGrpcKedge(t, {
      services,
      unary: (call, callback) =>
        setTimeout(() => callback(null, { text: call.request.text, authority: call.getHost() }), 100),
    });
    const { wrap } = grpcDialer(kedge.dialer());
    const calls = services.flatMap((service, i) => {
      const client = new (wrap(echoClient(service)))(`svc${i}.us1:9090`);
      return Array.from({ length: 10 }, async (_, n) => {
        assert.deepEqual(await unary(client, `${i}.${n}`), { text: `${i}.${n}`, authority: `svc${i}.us1:9090` });
      });
    });
    await Promise.all(calls);
    assert.equal(kedge.calls.length, 200);
    assert.ok(kedge.handshakes <= 2, `${kedge.handshakes} handshakes`);
  });

  it('carries metadata, binary too, both ways, error details, and large messages', async (t) => {
    const kedge = await startGrpcKedge(t, {
      unary: (call, callback) => {
        if (call.request.text !== 'fail') {
          callback(null, { text: call.request.text, authority: '' }, new grpc.Metadata());
          return;
        }
        const metadata = new grpc.Metadata();
        metadata.set('detail-bin', Buffer.from([0, 255, 1]));
        callback({ code: grpc.status.FAILED_PRECONDITION, details: 'not today', metadata });
      },
    });
    const client = new (grpcDialer(kedge.dialer()).wrap(EchoClient))(ADDRESS, undefined, {
      'grpc.max_receive_message_length': -1,
      'grpc.max_send_message_length': -1,
    });
    const metadata = new grpc.Metadata();
    metadata.set('key-bin', Buffer.from([1, 0, 254]));
    metadata.set('key', 'value');
    await assert.rejects(unary(client, 'fail', metadata), (error: grpc.ServiceError) => {
      assert.equal(error.code, grpc.status.FAILED_PRECONDITION);
      assert.equal(error.details, 'not today');
      assert.deepEqual(error.metadata.get('detail-bin'), [Buffer.from([0, 255, 1])]);
      assert.equal(error.cause, undefined);
      return true;
    });
    assert.deepEqual(kedge.calls[0]!.metadata.get('key-bin'), [Buffer.from([1, 0, 254])]);
    assert.deepEqual(kedge.calls[0]!.metadata.get('key'), ['value']);
    const large = 'x'.repeat(16 * 1024 * 1024);
    assert.equal((await unary(client, large)).text.length, large.length);
  });

  it('ends at its deadline and when it is cancelled, waiting for a connection too', async (t) => {
    const cancelled: Promise<unknown>[] = [];
    const kedge = await startGrpcKedge(t, {
      unary: (call) => {
        cancelled.push(once(call, 'cancelled'));
      },
    });
    const client = new (grpcDialer(kedge.dialer()).wrap(EchoClient))(ADDRESS);
    await assert.rejects(unary(client, 'slow', undefined, { deadline: Date.now() + 200 }), {
      code: grpc.status.DEADLINE_EXCEEDED,
    });
    const call = client.unary({ text: 'slow' }, () => {});
    const ended = once(call, 'status');
    while (kedge.calls.length < 2) await new Promise(setImmediate);
    call.cancel();
    assert.equal(((await ended) as [grpc.StatusObject])[0].code, grpc.status.CANCELLED);
    await Promise.all(cancelled);

    const silent = await startKedge(t, { onTcp: () => true });
    const waiting = new (grpcDialer(silent.dialer()).wrap(EchoClient))(ADDRESS);
    await assert.rejects(unary(waiting, 'x', undefined, { deadline: Date.now() + 100 }), (error: grpc.ServiceError) => {
      assert.equal(error.code, grpc.status.DEADLINE_EXCEEDED);
      assert.match(error.details, /waiting for a connection to kedge 127\.0\.0\.1:/);
      return true;
    });
    const held = waiting.unary({ text: 'x' }, () => {});
    const status = once(held, 'status');
    held.cancel();
    assert.equal(((await status) as [grpc.StatusObject])[0].code, grpc.status.CANCELLED);
  });

  it('composes the call credentials of the caller with the tokens', async (t) => {
    const kedge = await startGrpcKedge(t);
    const dialer = kedge.dialer({
      mapper: single(kedge.route({ proxyAuth: staticToken('proxy'), backendAuth: staticToken('backend') })),
    });
    const { wrap } = grpcDialer(dialer);
    const generator = (values: Record<string, string>) =>
      grpc.credentials.createFromMetadataGenerator((_options, callback) => {
        const metadata = new grpc.Metadata();
        for (const [name, value] of Object.entries(values)) metadata.set(name, value);
        callback(null, metadata);
      });
    const seen = () => {
      const { metadata } = kedge.calls.at(-1)!;
      return ['authorization', 'proxy-authorization', 'x-user'].map((name) => metadata.get(name));
    };

    const client = new (wrap(EchoClient))(ADDRESS);
    await unary(client, 'a', undefined, { credentials: generator({ 'x-user': 'ada' }) });
    assert.deepEqual(seen(), [['Bearer backend'], ['Bearer proxy'], ['ada']]);
    await unary(client, 'a', undefined, { credentials: generator({ authorization: 'Basic own' }) });
    assert.deepEqual(seen(), [['Basic own'], ['Bearer proxy'], []]);

    const composed = grpc.credentials.combineChannelCredentials(
      grpc.credentials.createSsl(),
      generator({ authorization: 'Basic channel' }),
    );
    await unary(new (wrap(EchoClient))(ADDRESS, composed), 'a');
    assert.deepEqual(seen(), [['Basic channel'], ['Bearer proxy'], []]);

    const own = new grpc.Metadata();
    own.set('authorization', 'Basic metadata');
    await unary(client, 'a', own, { credentials: generator({ authorization: 'Basic own', 'x-user': 'ada' }) });
    assert.deepEqual(seen(), [['Basic metadata'], ['Bearer proxy'], ['ada']]);
    assert.deepEqual(own.get('authorization'), ['Basic metadata']);
    assert.deepEqual(own.get('proxy-authorization'), [], "the caller's metadata was changed");

    const broken = grpc.credentials.createFromMetadataGenerator((_options, callback) => callback(null));
    await assert.rejects(unary(client, 'a', undefined, { credentials: broken }), { code: grpc.status.UNAUTHENTICATED });
  });

  it('cannot hurt the calls of others', async (t) => {
    const release = Promise.withResolvers<void>();
    const kedge = await startGrpcKedge(t, {
      unary: async (call, callback) => {
        if (call.request.text === 'innocent') await release.promise;
        callback(null, { text: call.request.text, authority: '' });
      },
    });
    const dialer = kedge.dialer({ mapper: single(kedge.route({ proxyAuth: staticToken('proxy') })) });
    const client = new (grpcDialer(dialer).wrap(EchoClient))(ADDRESS);
    const innocent = Array.from({ length: 99 }, () => unary(client, 'innocent'));
    const hostile: Record<string, string[]> = {
      authorization: ['a', 'b'],
      'proxy-authorization': ['a'],
      connection: ['close'],
      'transfer-encoding': ['chunked'],
      'keep-alive': ['1'],
      upgrade: ['h2c'],
      host: ['evil'],
      te: ['gzip'],
      'content-length': ['5'],
      date: ['a', 'b'],
      range: ['a', 'b'],
      from: ['a', 'b'],
    };
    for (const [name, values] of Object.entries(hostile)) {
      const metadata = new grpc.Metadata();
      for (const value of values) metadata.add(name, value);
      await assert.rejects(unary(client, 'hostile', metadata), (error: grpc.ServiceError) => {
        assert.equal(error.code, grpc.status.INVALID_ARGUMENT, name);
        assert.ok(isKedgeError(error.cause) && error.cause.code === 'ERR_KEDGE_REQUEST');
        assert.match(error.details, new RegExp(name));
        return true;
      });
      const generator = grpc.credentials.createFromMetadataGenerator((_options, callback) => callback(null, metadata));
      await assert.rejects(unary(client, 'hostile', undefined, { credentials: generator }), {
        code: grpc.status.UNAUTHENTICATED,
      });
    }
    for (const host of ['', 'a\nb', 'evil host', '127.0.0.1']) {
      await assert.rejects(unary(client, 'hostile', undefined, { host }), { code: grpc.status.INVALID_ARGUMENT });
    }
    release.resolve();
    await Promise.all(innocent);
    assert.equal(kedge.handshakes, 1);
  });

  it('maps a host of its own, and takes that route', async (t) => {
    const [one, two] = await Promise.all([startGrpcKedge(t), startGrpcKedge(t)]);
    const routes = { one: single(one.route()), two: single(two.route()) };
    const dialer = one.dialer({
      mapper: (target) => (target.hostname.endsWith('.two') ? routes.two : routes.one)(target),
    });
    const client = new (grpcDialer(dialer).wrap(EchoClient))('a.one:1');
    assert.equal((await unary(client, 'x', undefined, { host: 'B.two:2' })).authority, 'b.two:2');
    assert.equal(one.calls.length, 0);
    assert.equal(two.calls.length, 1);
  });
});

describe('an unmapped gRPC target', () => {
  it('uses the credentials of the caller and nothing of ours, or is refused', async (t) => {
    const kedge = await startGrpcKedge(t);
    const plain = new grpc.Server();
    let seen: grpc.Metadata | undefined;
    plain.addService(echoService('test.Echo'), {
      unary: (call: grpc.ServerUnaryCall<{ text: string }, Echo>, callback: grpc.sendUnaryData<Echo>) => {
        seen = call.metadata;
        callback(null, { text: 'direct', authority: call.getHost() });
      },
    } as never);
    const port = await new Promise<number>((resolve, reject) => {
      plain.bindAsync('127.0.0.1:0', grpc.ServerCredentials.createInsecure(), (error, bound) =>
        error ? reject(error) : resolve(bound),
      );
    });
    t.after(() => plain.forceShutdown());
    const route = single(kedge.route({ proxyAuth: staticToken('proxy'), backendAuth: staticToken('backend') }));
    const mapper = (target: Parameters<typeof route>[0]) =>
      target.hostname.endsWith('.us1') ? route(target) : undefined;
    const { wrap, channel } = grpcDialer(kedge.dialer({ mapper }));
    const direct = new (wrap(EchoClient))(`127.0.0.1:${port}`, grpc.credentials.createInsecure());
    assert.equal((await unary(direct, 'x')).text, 'direct');
    assert.deepEqual(
      ['authorization', 'proxy-authorization'].flatMap((name) => seen!.get(name)),
      [],
    );
    direct.close();
    assert.throws(() => new (wrap(EchoClient))('elsewhere:1'), { code: 'ERR_KEDGE_UNMAPPED', target: 'elsewhere:1' });
    assert.throws(() => channel('elsewhere:1'), { code: 'ERR_KEDGE_UNMAPPED' });
    const rejecting = grpcDialer(kedge.dialer({ mapper, unmapped: 'reject' }));
    assert.throws(() => rejecting.channel('elsewhere:1', grpc.credentials.createInsecure()), {
      code: 'ERR_KEDGE_UNMAPPED',
    });
    assert.equal(kedge.handshakes, 0);
  });
});

describe('a gRPC call that cannot be made', () => {
  const failing = async (
    t: Parameters<typeof startGrpcKedge>[0],
    expected: { code: string; stage: string; status?: grpc.status },
    call: Promise<unknown>,
  ) => {
    void t;
    await assert.rejects(call, (error: grpc.ServiceError) => {
      assert.ok(isKedgeError(error.cause), error.message);
      const { code, stage, target, kedge } = error.cause;
      assert.deepEqual({ code, stage, target }, { code: expected.code, stage: expected.stage, target: AUTHORITY });
      assert.equal(error.code, expected.status ?? grpc.status.UNAVAILABLE);
      if (stage !== 'token') assert.match(error.details, new RegExp(`kedge ${kedge}`));
      return true;
    });
  };

  it('says which kedge, which stage and why', async (t) => {
    const kedge = await startGrpcKedge(t);
    const identity = pem({ cert: kedge.client.cert, key: kedge.client.key, ca: kedge.ca.cert });
    const call = (options: Parameters<typeof kedge.dialer>[0]) =>
      unary(new (grpcDialer(kedge.dialer(options)).wrap(EchoClient))(ADDRESS), 'x');
    await failing(t, { code: 'ERR_KEDGE_CONNECT', stage: 'connect' }, call({ mapper: single('https://127.0.0.1:1') }));
    await failing(t, { code: 'ERR_KEDGE_DNS', stage: 'dns' }, call({ mapper: single('https://kedge.invalid') }));
    await failing(t, { code: 'ERR_KEDGE_CERTIFICATE', stage: 'tls' }, call({ identity, mapper: single(kedge.url) }));
    await failing(
      t,
      { code: 'ERR_KEDGE_CLIENT_CERTIFICATE', stage: 'tls' },
      call({ identity: undefined, mapper: single(kedge.route({ peer: { dangerouslySkipVerification: true } })) }),
    );
    const silent = await startKedge(t, { onTcp: () => true });
    const connect = { timeoutMs: 300, handshakeTimeoutMs: 200 };
    await failing(
      t,
      { code: 'ERR_KEDGE_TLS_TIMEOUT', stage: 'tls' },
      call({ connect, mapper: single(silent.route()) }),
    );
    const mute = await startKedge(t, { onH2: () => {} });
    await failing(
      t,
      { code: 'ERR_KEDGE_CONNECT_TIMEOUT', stage: 'connect' },
      call({ connect, mapper: single(mute.route()) }),
    );
    const bad: TokenSource = { name: 'bad', peek: () => undefined, token: async () => 'to ken\n' };
    await failing(
      t,
      { code: 'ERR_KEDGE_TOKEN', stage: 'token', status: grpc.status.UNAUTHENTICATED },
      call({ mapper: single(kedge.route({ proxyAuth: bad })) }),
    );
    const down: TokenSource = { name: 'down', peek: () => undefined, token: () => Promise.reject(new Error('secret')) };
    await failing(
      t,
      { code: 'ERR_KEDGE_TOKEN_UNAVAILABLE', stage: 'token' },
      call({ mapper: single(kedge.route({ proxyAuth: down })) }),
    );
  });

  it('goes to the next kedge when no connection can be made', async (t) => {
    const kedge = await startGrpcKedge(t);
    const dialer = kedge.dialer({ mapper: single(kedge.route({ kedge: ['https://127.0.0.1:1', kedge.url] })) });
    const client = new (grpcDialer(dialer).wrap(EchoClient))(ADDRESS);
    const replies = await Promise.all(Array.from({ length: 50 }, (_, i) => unary(client, String(i))));
    assert.equal(replies.length, 50);
    const patient = kedge.dialer({ mapper: single(kedge.route({ kedge: ['https://127.0.0.1:1', kedge.url] })) });
    const waiting = new (grpcDialer(patient).wrap(EchoClient))(ADDRESS);
    assert.equal((await unary(waiting, 'x', new grpc.Metadata({ waitForReady: true }))).text, 'x');
  });

  it('waits for the kedge with waitForReady', async (t) => {
    const { createServer } = await import('node:net');
    const taken = createServer().listen(0, '127.0.0.1');
    await once(taken, 'listening');
    const { port } = taken.address() as { port: number };
    await new Promise((resolve) => taken.close(resolve));
    const dialer = createDialer({ mapper: single(`https://127.0.0.1:${port}`) });
    t.after(() => dialer.destroy());
    const client = new (grpcDialer(dialer).wrap(EchoClient))(ADDRESS);
    const metadata = new grpc.Metadata({ waitForReady: true });
    await assert.rejects(unary(client, 'x', metadata, { deadline: Date.now() + 400 }), {
      code: grpc.status.DEADLINE_EXCEEDED,
    });
  });
});

describe('the life of gRPC connections', () => {
  it('reports connectivity, and waits for it', async (t) => {
    const kedge = await startGrpcKedge(t);
    const dialer = kedge.dialer();
    const client = new (grpcDialer(dialer).wrap(EchoClient))(ADDRESS);
    const channel = client.getChannel();
    assert.equal(channel.getTarget(), ADDRESS);
    assert.equal(channel.getConnectivityState(false), grpc.connectivityState.IDLE);
    await new Promise<void>((resolve, reject) =>
      client.waitForReady(Date.now() + 5000, (error) => (error ? reject(error) : resolve())),
    );
    assert.equal(channel.getConnectivityState(false), grpc.connectivityState.READY);
    client.close();
    assert.equal(channel.getConnectivityState(false), grpc.connectivityState.SHUTDOWN);
    await assert.rejects(unary(client, 'x'), { code: grpc.status.UNAVAILABLE });
    assert.equal(dialer.stats().inFlight, 0);
  });

  it('lets calls finish on close() and leaves nothing behind', async (t) => {
    const noLeaks = trackLeaks();
    const release = Promise.withResolvers<void>();
    const kedge = await startGrpcKedge(t, {
      unary: async (call, callback) => {
        await release.promise;
        callback(null, { text: call.request.text, authority: '' });
      },
    });
    const dialer = kedge.dialer();
    const client = new (grpcDialer(dialer).wrap(EchoClient))(ADDRESS);
    const call = unary(client, 'late');
    while (kedge.calls.length === 0) await new Promise(setImmediate);
    const closed = dialer.close();
    await assert.rejects(
      unary(client, 'x'),
      (error: grpc.ServiceError) => isKedgeError(error.cause) && error.cause.code === 'ERR_KEDGE_CLOSED',
    );
    release.resolve();
    assert.equal((await call).text, 'late');
    await closed;
    kedge.server.forceShutdown();
    await kedge.close();
    await noLeaks();
  });

  it('destroy() ends calls that are held and calls that run', async (t) => {
    const kedge = await startGrpcKedge(t, { unary: () => {} });
    const dialer = kedge.dialer();
    const client = new (grpcDialer(dialer).wrap(EchoClient))(ADDRESS);
    const running = unary(client, 'x');
    running.catch(() => {});
    while (kedge.calls.length === 0) await new Promise(setImmediate);
    const silent = await startKedge(t, { onTcp: () => true });
    const second = silent.dialer();
    const held = unary(new (grpcDialer(second).wrap(EchoClient))(ADDRESS), 'x');
    held.catch(() => {});
    await Promise.all([dialer.destroy(), second.destroy()]);
    await assert.rejects(running, { code: grpc.status.UNAVAILABLE });
    await assert.rejects(held, { code: grpc.status.UNAVAILABLE });
  });

  it('destroy() and close() of the client end a call whose own credentials never come', async (t) => {
    const kedge = await startGrpcKedge(t);
    const credentials = grpc.credentials.createFromMetadataGenerator(() => {});
    const slow: TokenSource = { name: 'slow', peek: () => undefined, token: async () => 'late' };
    for (const proxyAuth of [undefined, slow]) {
      for (const end of ['destroy', 'close'] as const) {
        const dialer = kedge.dialer({ mapper: single(kedge.route({ proxyAuth })) });
        const client = new (grpcDialer(dialer).wrap(EchoClient))(ADDRESS);
        const call = unary(client, 'x', undefined, { credentials }).catch((error: grpc.ServiceError) => error);
        await sleep(100);
        if (end === 'destroy') void dialer.destroy();
        else client.close();
        const error = await Promise.race([call, sleep(2000, undefined, { ref: false })]);
        assert.ok(error instanceof Error, `${end}: the call goes on`);
        assert.ok(isKedgeError(error.cause) && error.cause.code === 'ERR_KEDGE_CLOSED');
        assert.equal(dialer.stats().inFlight, 0);
      }
    }
    assert.equal(kedge.calls.length, 0);
  });

  it('refuses what would change what is dialled', async (t) => {
    const kedge = await startGrpcKedge(t);
    const { wrap, channel } = grpcDialer(kedge.dialer());
    for (const name of ['grpc.default_authority', 'grpc.ssl_target_name_override']) {
      assert.throws(() => new (wrap(EchoClient))(ADDRESS, undefined, { [name]: 'evil' }), {
        code: 'ERR_KEDGE_OPTIONS',
      });
    }
    assert.throws(() => new (wrap(EchoClient))(ADDRESS, undefined, { channelOverride: channel(ADDRESS) }), {
      code: 'ERR_KEDGE_OPTIONS',
    });
    assert.throws(() => grpcDialer({} as never), { code: 'ERR_KEDGE_OPTIONS' });
    for (const address of ['', 'user@host:1', 'unix:/x', 'https://a.b', 'a:0', 'b..k:1']) {
      assert.throws(() => channel(address), { code: 'ERR_KEDGE_TARGET' }, address);
    }
  });
});
