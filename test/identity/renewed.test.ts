import assert from 'node:assert/strict';
import { AsyncLocalStorage } from 'node:async_hooks';
import { subscribe, unsubscribe } from 'node:diagnostics_channel';
import { describe, it } from 'node:test';
import { type Identity, pem } from '../../src/index.ts';
import { authority, startKedge } from '../helpers/kedge.ts';

const ca = await authority();
const second = (ms: number) => new Date(Math.ceil((Date.now() + ms) / 1000) * 1000);
const old = await ca.issue({ cn: 'pod', notBefore: second(-20_000), notAfter: second(-1000) });
const fresh = await ca.issue({ cn: 'pod', notAfter: second(60_000) });
const expired = pem({ cert: old.cert, key: old.key, ca: ca.cert }).current();
const renewed = pem({ cert: fresh.cert, key: fresh.key, ca: ca.cert }).current();

describe('an identity that does not tell of its new certificate', () => {
  it('has its connections dialled in the context of the dialer, not of the call that found it', async (t) => {
    const kedge = await startKedge(t);
    const context = new AsyncLocalStorage<string>();
    let current = expired;
    const identity: Identity = { current: () => current, subscribe: () => () => {} };
    const dialer = context.run('dialer', () => kedge.dialer({ identity, onWarning: () => {} }));
    await assert.rejects(dialer.fetch('http://a.us1/'));
    current = renewed;
    const contexts: (string | undefined)[] = [];
    const see = () => contexts.push(context.getStore());
    subscribe('net.client.socket', see);
    t.after(() => unsubscribe('net.client.socket', see));
    await context.run('call', () => dialer.fetch('http://a.us1/'));
    assert.deepEqual(contexts, ['dialer']);
  });

  it('is warned of once when that cannot be used, not with each call', async (t) => {
    const kedge = await startKedge(t);
    let current = expired;
    const identity: Identity = { current: () => current, subscribe: () => () => {} };
    const warnings: string[] = [];
    const dialer = kedge.dialer({ identity, onWarning: ({ message }) => warnings.push(message) });
    await assert.rejects(dialer.fetch('http://a.us1/'));
    const { cert, ca: trusted, subject, serial, notBefore, notAfter } = renewed;
    current = { cert, key: old.key, ca: trusted, subject, serial, notBefore, notAfter } as typeof current;
    for (let i = 0; i < 20; i += 1) await assert.rejects(dialer.fetch('http://a.us1/'));
    assert.ok(warnings.filter((text) => /cannot be used/.test(text)).length <= 1, `${warnings.length} warnings`);
  });
});
