import assert from 'node:assert/strict';
import { describe, it, type TestContext } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { startNamedBackend } from '../helpers/named-backend.ts';
import { startReferenceKedge } from '../helpers/reference-kedge.ts';
import { ApiServer, sliceOf } from './api-server.ts';

/** A kedge in front of the endpoints of `orders.shop`, and the body or status of what it answers. */
async function startWorld(t: TestContext, dnsPortName = 'orders.shop:http') {
  const api = await ApiServer.start(t);
  process.env['KUBECONFIG'] = api.kubeconfig;
  t.after(() => delete process.env['KUBECONFIG']);
  const [one, two] = await Promise.all([startNamedBackend(t, 'one'), startNamedBackend(t, 'two')]);
  api.put('endpointslices', sliceOf('orders', 'shop', { http: one }));
  const { dialer } = await startReferenceKedge(t, {
    director: { http: { routes: [{ backend_name: 'orders' }] } },
    backendPool: { http: { backends: [{ name: 'orders', k8s: { dns_port_name: dnsPortName } }] } },
  });
  const dial = dialer();
  const ask = async () => {
    const response = await dial.fetch('http://orders.us1/');
    const text = await response.text();
    return response.status === 200 ? text : String(response.status);
  };
  const until = async (wanted: string, ms: number) => {
    const start = performance.now();
    while ((await ask()) !== wanted) {
      assert.ok(performance.now() - start < ms, `not ${wanted} within ${ms} ms`);
      await sleep(20);
    }
  };
  return { api, one, two, ask, until };
}

describe('endpoints of Kubernetes', () => {
  it('stay while the API server is away, failing or refusing, and are new soon after it is back', async (t) => {
    const { api, two, ask, until } = await startWorld(t);
    assert.equal(await ask(), 'one');
    await api.down();
    const outage = performance.now();
    while (performance.now() - outage < 2_500) {
      assert.equal(await ask(), 'one');
      await sleep(50);
    }
    await api.up();
    api.failing = 503;
    const failing = performance.now();
    while (performance.now() - failing < 1_500) {
      assert.equal(await ask(), 'one');
      await sleep(50);
    }
    api.put('endpointslices', sliceOf('orders', 'shop', { http: two }));
    api.failing = undefined;
    await until('two', 2_000);
  });

  for (const gone of ['status', 'event'] as const)
    it(`are listed again when the API server has forgotten the past (410 as ${gone})`, async (t) => {
      const { api, two, ask, until } = await startWorld(t);
      api.gone = gone;
      assert.equal(await ask(), 'one');
      await api.down();
      api.remove('endpointslices', sliceOf('orders', 'shop', {}));
      api.put('endpointslices', {
        ...sliceOf('orders', 'shop', { http: two }),
        metadata: { name: 'orders-2', namespace: 'shop', labels: { 'kubernetes.io/service-name': 'orders' } },
      });
      api.forget();
      await api.up();
      await until('two', 2_000);
      assert.equal(await ask(), 'two', 'what was deleted meanwhile is gone');
    });

  it('are watched on from where a watch ended, with bookmarks', async (t) => {
    const { api, two, ask, until } = await startWorld(t);
    assert.equal(await ask(), 'one');
    // Something else moves the version on; only a bookmark tells.
    api.put('services', { metadata: { name: 'other', namespace: 'shop' } });
    api.endWatches();
    const watches = () => api.requests.filter((each) => each.includes('watch=true'));
    for (let i = 0; i < 100 && watches().length < 2; i += 1) await sleep(20);
    api.endWatches();
    for (let i = 0; i < 100 && watches().length < 3; i += 1) await sleep(20);
    assert.match(watches()[0]!, /allowWatchBookmarks=true/);
    assert.match(watches()[2]!, /resourceVersion=102/);
    assert.equal(api.requests.length - watches().length, 1, 'listed once');
    api.put('endpointslices', sliceOf('orders', 'shop', { http: two }));
    await until('two', 2_000);
  });

  for (const [name, ports, wanted] of [
    ['orders.shop.svc.cluster.local:http', { http: 0, other: 1 }, 'one'],
    ['orders.shop', { http: 0 }, 'one'],
    ['orders.shop', { http: 0, other: 1 }, '502'],
    ['orders.shop:none', { http: 0 }, '502'],
  ] as const)
    it(`of ${name} with ports ${Object.keys(ports)}: ${wanted}`, async (t) => {
      const { api, one, until } = await startWorld(t, name);
      api.put('endpointslices', sliceOf('orders', 'shop', { ...ports, http: one }));
      await until(wanted, 2_000);
    });
});
