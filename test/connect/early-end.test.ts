import assert from 'node:assert/strict';
import { describe, it, type TestContext } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { connectDialer } from '../../src/connectrpc/index.ts';
import { startKedge } from '../helpers/kedge.ts';

const BASE = 'http://greeter.us1:9090';
const HEADERS = { 'content-type': 'application/proto' };

async function connected(t: TestContext, isConnected = true) {
  const kedge = await startKedge(t, { handler: (_request, response) => void response.end() });
  const dialer = kedge.dialer();
  const manager = connectDialer(dialer).sessionManager(BASE);
  if (isConnected) {
    const first = await manager.request('POST', '/first', HEADERS);
    first.resume().end();
    await new Promise((resolve) => first.once('close', resolve));
  }
  return { kedge, dialer, manager };
}

describe('a connect-es call that ends at once', () => {
  for (const isConnected of [true, false]) {
    it(`is not sent when its signal has aborted already (${isConnected ? 'connected' : 'not connected'})`, async (t) => {
      const { kedge, dialer, manager } = await connected(t, isConnected);
      await assert.rejects(manager.request('POST', '/aborted', HEADERS, { signal: AbortSignal.abort() }), /aborted/);
      await sleep(100);
      assert.ok(!kedge.seen.some(({ path }) => path === '/aborted'));
      assert.equal(dialer.stats().inFlight, 0);
    });
  }

  it('is told of an abort in the same tick, and leaves no stream behind', async (t) => {
    const { dialer, manager } = await connected(t);
    const abort = new AbortController();
    const call = manager.request('POST', '/x', HEADERS, { signal: abort.signal });
    abort.abort();
    await assert.rejects(call, /aborted/);
    await sleep(50);
    assert.equal(dialer.stats().kedges[0]!.inFlight, 0);
  });

  it('does not end the process with the dialer, in the callback that made it', async (t) => {
    const { dialer, manager } = await connected(t);
    const call = Promise.withResolvers<unknown>();
    // An error that is thrown at nobody fails this test.
    setImmediate(() => {
      manager.request('POST', '/x', HEADERS).then(call.resolve, call.reject);
      void dialer.destroy();
    });
    await assert.rejects(call.promise, /destroyed/);
    await sleep(50);
  });
});
