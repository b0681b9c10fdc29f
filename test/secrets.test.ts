import assert from 'node:assert/strict';
import { describe, it } from 'node:test';
import { inspect } from 'node:util';
import * as undici from 'undici';
import { grpcDialer } from '../src/grpc/index.ts';
import { createDialer, type Identity, pem, route, single, staticToken } from '../src/index.ts';
import { echoClient, startGrpcKedge, unary } from './helpers/grpc-kedge.ts';
import { startKedge } from './helpers/kedge.ts';

/** As printed by whoever debugs: `console.log`, everything hidden too, and JSON. */
function printed(value: unknown): string {
  let json = '';
  try {
    json = JSON.stringify(value) ?? '';
  } catch {
    // Circular: nothing is printed.
  }
  return [inspect(value), inspect(value, { depth: 12, showHidden: true }), json].join('\n');
}

describe('what is printed', () => {
  it('holds no token and no key', async (t) => {
    const [kedge, rpc] = await Promise.all([startKedge(t), startGrpcKedge(t, { unary: () => {} })]);
    const identity = pem({ cert: kedge.client.cert, key: kedge.client.key, ca: kedge.ca.cert });
    const proxyAuth = staticToken('top-secret-proxy');
    const backendAuth = staticToken('top-secret-backend');
    const http = kedge.route({ proxyAuth, backendAuth });
    const dialer = kedge.dialer({ identity, mapper: single(http) });
    await (await dialer.fetch('http://a.us1/')).text();
    const second = kedge.dialer({ identity, mapper: single(rpc.route({ proxyAuth, backendAuth })) });
    const client = new (grpcDialer(second).wrap(echoClient()))('b.us1:1');
    const call = client.unary({ text: 'x' }, () => {});
    while (rpc.calls.length === 0) await new Promise(setImmediate);
    const errors = await Promise.all([
      undici
        .request('http://a.us1/', { dispatcher: dialer.dispatcher, headers: { host: 'evil' } })
        .catch((error) => error),
      unary(client, 'x', undefined, { deadline: Date.now() + 50 }).catch((error) => error),
    ]);
    const holders = {
      dialer,
      dispatcher: dialer.dispatcher,
      client,
      call,
      identity,
      snapshot: identity.current(),
      proxyAuth,
      built: route(http),
    };
    for (const [name, holder] of Object.entries({ ...holders, ...errors })) {
      const text = printed(holder);
      assert.doesNotMatch(text, /top-secret/, `${name} shows a token`);
      assert.ok(!text.includes(kedge.client.key.split('\n')[1]!), `${name} shows the key`);
    }
    assert.match(inspect(identity.current()), /Identity\(CN=pod, serial [0-9A-F]+\)/);
    call.cancel();
  });
});

describe('what a user of the package supplies', () => {
  it('may be broken: the call says so, and close() does not wait for it', async (t) => {
    const kedge = await startKedge(t);
    const broken = { current: () => ({ subject: 'x' }), subscribe: () => () => {} } as unknown as Identity;
    const dialer = createDialer({ identity: broken, mapper: single(kedge.route()) });
    await assert.rejects(undici.request('http://a.us1/', { dispatcher: dialer.dispatcher }), {
      code: 'ERR_KEDGE_IDENTITY',
    });
    const options = {
      origin: 'http://a.us1',
      path: '/',
      method: 'GET' as const,
      get body(): never {
        throw new Error('no body for you');
      },
    };
    const error = await new Promise((resolve) => {
      dialer.dispatcher.dispatch(options, {
        onRequestStart() {},
        onResponseError: (_controller, reason) => resolve(reason),
      });
    });
    assert.match(String(error), /no body for you/);
    assert.equal(dialer.stats().inFlight, 0);
    await dialer.close();
  });
});
