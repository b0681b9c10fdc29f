import assert from 'node:assert/strict';
import { mkdtemp, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { describe, it, type TestContext } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import * as grpc from '@grpc/grpc-js';
import { grpcDialer } from '../../src/grpc/index.ts';
import { pem, pemFiles, type Route, route, single, type TokenSource } from '../../src/index.ts';
import { echoClient, type GrpcKedge, startGrpcKedge, unary } from '../helpers/grpc-kedge.ts';

const Client = echoClient();
const { CONNECTING, IDLE, READY, TRANSIENT_FAILURE } = grpc.connectivityState;
const ready = (client: grpc.Client, ms: number) =>
  new Promise<void>((resolve, reject) =>
    client.waitForReady(Date.now() + ms, (error) => (error === undefined ? resolve() : reject(error))),
  );
const changed = (channel: grpc.ChannelInterface, from: grpc.connectivityState, ms = 3000) =>
  new Promise<void>((resolve, reject) =>
    channel.watchConnectivityState(from, Date.now() + ms, (error) => (error ? reject(error) : resolve())),
  );

/** Each an identity of its own, and so a kedge of its own. */
function tenants(t: TestContext, kedge: GrpcKedge, count: number, maxKedges: number) {
  const { cert, key } = kedge.client;
  const routes = new Map<string, Route>();
  for (let i = 0; i < count; i += 1) {
    const identity = pem({ cert, key, ca: kedge.ca.cert });
    routes.set(`t${i}.us1`, route(kedge.route({ identity })));
  }
  const dialer = kedge.dialer({ mapper: ({ hostname }) => routes.get(hostname), maxKedges });
  const { wrap } = grpcDialer(dialer);
  const clients = [...routes.keys()].map((host) => new (wrap(Client))(`${host}:1`));
  t.after(() => {
    for (const client of clients) client.close();
  });
  return { dialer, clients };
}

describe('more kedges than maxKedges', () => {
  for (const [count, maxKedges] of [
    [65, 64],
    [5, 1],
  ] as const) {
    it(`leave the event loop free while ${count} of them wait for readiness with room for ${maxKedges}`, async (t) => {
      const kedge = await startGrpcKedge(t);
      const { clients, dialer } = tenants(t, kedge, count, maxKedges);
      let turns = 0;
      const ticking = setInterval(() => {
        turns += 1;
      }, 10);
      const all = await Promise.allSettled(clients.map((client) => ready(client, 10_000)));
      clearInterval(ticking);
      assert.deepEqual(
        all.filter(({ status }) => status === 'rejected'),
        [],
      );
      assert.ok(turns > 5);
      assert.ok(dialer.stats().kedges.length <= count);
      const replies = await Promise.all(clients.map((client) => unary(client, 'x')));
      assert.equal(replies.length, count);
    });
  }

  it('are neither made nor given up by who looks at their state', async (t) => {
    const kedge = await startGrpcKedge(t);
    const { clients, dialer } = tenants(t, kedge, 3, 1);
    const [used, ...others] = clients;
    await unary(used!, 'x');
    const handshakes = kedge.handshakes;
    for (const client of others) {
      assert.equal(client.getChannel().getConnectivityState(false), IDLE);
      const watched = changed(client.getChannel(), IDLE, 300);
      assert.equal(used!.getChannel().getConnectivityState(false), READY);
      await assert.rejects(watched, /Deadline passed/);
    }
    assert.equal(dialer.stats().kedges.length, 1);
    await unary(used!, 'x');
    assert.equal(kedge.handshakes, handshakes);
  });

  it('are refused where they belong to one route', async (t) => {
    const kedge = await startGrpcKedge(t);
    const mapper = single(kedge.route({ kedge: [kedge.url, 'https://127.0.0.1:1'] }));
    const dialer = kedge.dialer({ mapper, maxKedges: 1 });
    assert.throws(() => grpcDialer(dialer).channel('a.us1:1'), { code: 'ERR_KEDGE_ROUTE', message: /maxKedges/ });
  });

  it('are watched across their end and their return', async (t) => {
    const kedge = await startGrpcKedge(t);
    const { clients } = tenants(t, kedge, 2, 1);
    const [one, two] = clients.map((client) => client.getChannel());
    await ready(clients[0]!, 3000);
    const leavesReady = changed(one!, READY);
    const leavesIdle = changed(two!, IDLE);
    await unary(clients[1]!, 'x');
    await Promise.all([leavesReady, leavesIdle]);
    assert.equal(one!.getConnectivityState(false), IDLE);
    assert.equal(two!.getConnectivityState(false), READY);
  });
});

describe('certificate files that are not there yet', () => {
  const start = async (t: TestContext) => {
    const kedge = await startGrpcKedge(t);
    const dir = await mkdtemp(join(tmpdir(), 'kedge-'));
    t.after(() => rm(dir, { recursive: true }));
    const paths = { cert: join(dir, 'tls.crt'), key: join(dir, 'tls.key'), ca: join(dir, 'ca.crt') };
    const put = async () => {
      await writeFile(paths.ca, kedge.ca.cert);
      await writeFile(paths.key, kedge.client.key);
      await writeFile(paths.cert, kedge.client.cert);
    };
    const one = kedge.route({ identity: pemFiles(paths) });
    const two = kedge.route({ identity: pemFiles(paths), kedge: ['https://127.0.0.1:1', kedge.url] });
    return { kedge, put, routes: [one, two] };
  };

  it('are TRANSIENT_FAILURE, and who waits for readiness gets it when they come', async (t) => {
    const { kedge, put, routes } = await start(t);
    const clients = routes.map(
      (each) => new (grpcDialer(kedge.dialer({ mapper: single(each) })).wrap(Client))('a.us1:1'),
    );
    for (const client of clients) {
      const channel = client.getChannel();
      assert.equal(channel.getConnectivityState(true), TRANSIENT_FAILURE);
      // As a failed dial, for a moment.
      await changed(channel, TRANSIENT_FAILURE);
      assert.equal(channel.getConnectivityState(false), IDLE);
    }
    const waiting = clients.map((client) => ready(client, 5000));
    await sleep(700);
    await put();
    await Promise.all(waiting);
    for (const client of clients) assert.notEqual(client.getChannel().getConnectivityState(false), CONNECTING);
  });

  it('are waited for by calls with waitForReady, and end others', async (t) => {
    const { kedge, put, routes } = await start(t);
    for (const each of routes) {
      const dialer = kedge.dialer({ mapper: single(each) });
      const client = new (grpcDialer(dialer).wrap(Client))('a.us1:1');
      await assert.rejects(unary(client, 'x'), (error: grpc.ServiceError) => {
        assert.equal(error.code, grpc.status.UNAVAILABLE);
        assert.equal((error.cause as { code?: string }).code, 'ERR_KEDGE_IDENTITY');
        return true;
      });
      const patient = new grpc.Metadata({ waitForReady: true });
      await assert.rejects(unary(client, 'x', patient, { deadline: Date.now() + 400 }), {
        code: grpc.status.DEADLINE_EXCEEDED,
      });
      assert.equal(dialer.stats().inFlight, 0);
    }
    const calls = routes.map((each) => {
      const client = new (grpcDialer(kedge.dialer({ mapper: single(each) })).wrap(Client))('a.us1:1');
      return unary(client, 'late', new grpc.Metadata({ waitForReady: true }), { deadline: Date.now() + 5000 });
    });
    await sleep(500);
    await put();
    for (const call of calls) assert.equal((await call).text, 'late');
  });
});

describe('a client that is closed', () => {
  it('ends its calls that wait for a connection, as grpc-js does, and lets others go on', async (t) => {
    const release = Promise.withResolvers<void>();
    const kedge = await startGrpcKedge(t, {
      unary: (call, done) =>
        void release.promise.then(() => done(null, { text: call.request.text, authority: call.getHost() })),
    });
    const mapper = single(kedge.route({ kedge: 'https://127.0.0.1:1' }));
    const dead = kedge.dialer({ mapper });
    const waiting = new (grpcDialer(dead).wrap(Client))('a.us1:1');
    const calls = [1, 2].map(() => unary(waiting, 'x', new grpc.Metadata({ waitForReady: true })));
    for (const pause of [0, 400]) await sleep(pause);
    waiting.close();
    for (const call of calls) {
      await assert.rejects(call, (error: grpc.ServiceError) => {
        assert.equal(error.code, grpc.status.UNAVAILABLE);
        assert.equal((error.cause as { code?: string }).code, 'ERR_KEDGE_CLOSED');
        return true;
      });
    }
    assert.equal(dead.stats().inFlight, 0);
    const client = new (grpcDialer(kedge.dialer()).wrap(Client))('a.us1:1');
    const running = unary(client, 'running');
    while (kedge.calls.length === 0) await new Promise(setImmediate);
    client.close();
    release.resolve();
    assert.equal((await running).text, 'running');
  });

  it('lets a hedged call go on that has lost one of its attempts', async (t) => {
    const release = Promise.withResolvers<void>();
    const kedge = await startGrpcKedge(t, {
      unary: async (call, done) => {
        if (call.request.text !== 'warm') await release.promise;
        done(null, { text: call.request.text, authority: call.getHost() });
      },
    });
    const hedgingPolicy = { maxAttempts: 2, hedgingDelay: '0.05s', nonFatalStatusCodes: ['UNAVAILABLE'] };
    const options = { 'grpc.service_config': JSON.stringify({ methodConfig: [{ name: [{}], hedgingPolicy }] }) };
    const dialer = kedge.dialer({ grpc: { maxStreamsPerConnection: 1 } });
    const Wrapped = grpcDialer(dialer).wrap(Client);
    await unary(new Wrapped('a.us1:1'), 'warm');
    const client = new Wrapped('a.us1:1', undefined, options);
    const hedged = unary(client, 'hedged');
    while (kedge.calls.length < 3) await sleep(5);
    [...kedge.sockets][0]!.destroy();
    await sleep(100);
    client.close();
    await sleep(20);
    release.resolve();
    assert.equal((await hedged).text, 'hedged');
    assert.equal(dialer.stats().inFlight, 0);
  });
});

describe('a dialer that is destroyed', () => {
  const policy = (methodConfig: object) => ({
    'grpc.service_config': JSON.stringify({ methodConfig: [{ name: [{}], ...methodConfig }] }),
  });
  const ended = (call: Promise<unknown>) =>
    Promise.race([call.catch((error: grpc.ServiceError) => error), sleep(1500, 'goes on', { ref: false })]);

  it('ends calls at once that would be retried', async (t) => {
    const kedge = await startGrpcKedge(t, { unary: () => {} });
    const retryPolicy = {
      maxAttempts: 5,
      initialBackoff: '3s',
      maxBackoff: '3s',
      backoffMultiplier: 1,
      retryableStatusCodes: ['UNAVAILABLE'],
    };
    for (const waitForReady of [false, true]) {
      const dialer = kedge.dialer();
      const client = new (grpcDialer(dialer).wrap(Client))('a.us1:1', undefined, policy({ retryPolicy }));
      const seen = kedge.calls.length;
      const call = unary(client, 'x', new grpc.Metadata({ waitForReady }));
      while (kedge.calls.length === seen) await sleep(5);
      await dialer.destroy();
      const error = await ended(call);
      assert.ok(error instanceof Error, `the call ${error}`);
      assert.equal((error.cause as { code?: string }).code, 'ERR_KEDGE_CLOSED');
      assert.equal(dialer.stats().inFlight, 0);
    }
  });

  it('ends hedged calls whose credentials for another attempt never come', async (t) => {
    const kedge = await startGrpcKedge(t, { unary: () => {} });
    const hedgingPolicy = { maxAttempts: 2, hedgingDelay: '0.05s', nonFatalStatusCodes: ['UNAVAILABLE'] };
    const dialer = kedge.dialer();
    const client = new (grpcDialer(dialer).wrap(Client))('a.us1:1', undefined, policy({ hedgingPolicy }));
    let asked = 0;
    const credentials = grpc.credentials.createFromMetadataGenerator((_options, callback) => {
      asked += 1;
      if (asked === 1) callback(null, new grpc.Metadata());
    });
    const call = unary(client, 'x', undefined, { credentials });
    while (asked < 2 || kedge.calls.length === 0) await sleep(5);
    await dialer.destroy();
    const error = await ended(call);
    assert.ok(error instanceof Error, `the call ${error}`);
    assert.equal(dialer.stats().inFlight, 0);
  });
});

describe('a hedged call', () => {
  it('waits for a token once, and no longer than it lives', async (t) => {
    const kedge = await startGrpcKedge(t);
    const signals: AbortSignal[] = [];
    const proxyAuth: TokenSource = {
      name: 'never',
      peek: () => undefined,
      token: (signal) => {
        signals.push(signal!);
        return new Promise(() => {});
      },
    };
    const dialer = kedge.dialer({ mapper: single(kedge.route({ proxyAuth })) });
    const hedgingPolicy = { maxAttempts: 3, hedgingDelay: '0.02s', nonFatalStatusCodes: ['UNAVAILABLE'] };
    const options = { 'grpc.service_config': JSON.stringify({ methodConfig: [{ name: [{}], hedgingPolicy }] }) };
    const client = new (grpcDialer(dialer).wrap(Client))('a.us1:1', undefined, options);
    await assert.rejects(unary(client, 'x', undefined, { deadline: Date.now() + 300 }), {
      code: grpc.status.DEADLINE_EXCEEDED,
      details: /waiting for a token/,
    });
    assert.equal(signals.length, 1);
    assert.ok(signals[0]!.aborted);
    assert.equal(dialer.stats().inFlight, 0);
  });
});
