import assert from 'node:assert/strict';
import { describe, it } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { inspect } from 'node:util';
import { Bearer } from '../../src/auth/bearer.ts';
import { cachedToken, type FetchedToken, single } from '../../src/index.ts';
import { startKedge } from '../helpers/kedge.ts';

const inMs = (ms: number) => new Date(Date.now() + ms);

describe('cachedToken', () => {
  it('asks once for a thousand calls, and not again while the token is valid', async () => {
    let fetches = 0;
    const source = cachedToken(async () => {
      fetches += 1;
      await sleep(20);
      return { token: `t${fetches}`, expiresAt: inMs(60_000) };
    });
    assert.equal(source.peek(), undefined);
    const tokens = await Promise.all(Array.from({ length: 1000 }, () => source.token()));
    assert.deepEqual(new Set(tokens), new Set(['t1']));
    assert.equal(source.peek(), 't1');
    assert.equal(fetches, 1);
  });

  it('asks once for a thousand calls on the wire', async (t) => {
    let fetches = 0;
    const source = cachedToken(async () => {
      fetches += 1;
      await sleep(100);
      return { token: 'secret', expiresAt: inMs(60_000) };
    });
    const kedge = await startKedge(t);
    const dialer = kedge.dialer({ mapper: single(kedge.route({ proxyAuth: source })) });
    await Promise.all(Array.from({ length: 1000 }, async () => (await dialer.fetch('http://a.us1/')).text()));
    assert.equal(fetches, 1);
    assert.ok(kedge.seen.every(({ headers }) => headers['proxy-authorization'] === 'Bearer secret'));
  });

  it('refreshes ahead of the end while calls go on with what is valid', async () => {
    let fetches = 0;
    const source = cachedToken(async () => {
      fetches += 1;
      if (fetches > 1) await sleep(50);
      return { token: `t${fetches}`, expiresAt: inMs(500) };
    });
    await source.token();
    await sleep(450);
    assert.equal(source.peek(), 't1', 'the old one serves while the new one is fetched');
    assert.equal(source.peek(), 't1');
    await sleep(100);
    assert.equal(source.peek(), 't2');
    assert.equal(fetches, 2);
  });

  it('serves what is valid while refreshing fails, then says so', async () => {
    let down = false;
    const source = cachedToken(
      async () => {
        if (down) throw new Error('secret-detail');
        return { token: 't', expiresAt: inMs(400) };
      },
      { name: 'mine' },
    );
    await source.token();
    down = true;
    await sleep(350);
    assert.equal(source.peek(), 't');
    await sleep(10);
    assert.equal(source.peek(), 't');
    await sleep(100);
    assert.equal(source.peek(), undefined);
    await assert.rejects(source.token(), (error: Error & { code: string }) => {
      assert.equal(error.code, 'ERR_KEDGE_TOKEN_UNAVAILABLE');
      assert.match(error.message, /token source mine/);
      assert.doesNotMatch(inspect(error), /secret-detail/);
      return true;
    });
    down = false;
    await sleep(300);
    assert.equal(await source.token(), 't', 'and heals');
  });

  it('gives a failure to all who wait, and asks again after a moment, not for each of them', async () => {
    let fetches = 0;
    const source = cachedToken(async () => {
      fetches += 1;
      throw new Error('down');
    });
    const results = await Promise.allSettled(Array.from({ length: 100 }, () => source.token()));
    assert.ok(results.every(({ status }) => status === 'rejected'));
    await assert.rejects(source.token());
    assert.equal(fetches, 1);
    await sleep(300);
    await assert.rejects(source.token());
    assert.equal(fetches, 2);
  });

  it('has a deadline, and aborts what nobody waits for', async () => {
    const aborted: unknown[] = [];
    const hangs = (signal: AbortSignal) =>
      new Promise<FetchedToken>(() => {
        signal.addEventListener('abort', () => aborted.push(signal.reason));
      });
    await assert.rejects(cachedToken(hangs, { deadlineMs: 50 }).token(), { code: 'ERR_KEDGE_TOKEN_UNAVAILABLE' });
    assert.equal(aborted.length, 1);
    const source = cachedToken(hangs);
    const [one, two] = [new AbortController(), new AbortController()];
    const waiting = [source.token(one.signal), source.token(two.signal)];
    one.abort(new Error('one'));
    await assert.rejects(waiting[0]!, /one/);
    assert.equal(aborted.length, 1, 'somebody still waits');
    two.abort(new Error('two'));
    await assert.rejects(waiting[1]!, /two/);
    await sleep(0);
    assert.equal(aborted.length, 2);
  });

  it('forgets what was invalidated', async () => {
    let fetches = 0;
    const source = cachedToken(async () => {
      fetches += 1;
      return { token: `t${fetches}` };
    });
    assert.equal(await source.token(), 't1');
    source.invalidate!();
    assert.equal(source.peek(), undefined);
    assert.equal(await source.token(), 't2');
  });

  it('refuses what is no token, and what has expired', async () => {
    for (const given of [
      undefined,
      {},
      { token: 1 },
      { token: 't', expiresAt: 'soon' },
      { token: 't', expiresAt: inMs(-1) },
    ]) {
      await assert.rejects(cachedToken(async () => given as never).token(), { code: 'ERR_KEDGE_TOKEN_UNAVAILABLE' });
    }
    await assert.rejects(new Bearer(cachedToken(async () => ({ token: 'a\nb' }))).wait(new AbortController().signal), {
      code: 'ERR_KEDGE_TOKEN',
    });
    assert.throws(() => cachedToken('x' as never), { code: 'ERR_KEDGE_OPTIONS' });
    assert.throws(() => cachedToken(async () => ({ token: 't' }), { deadlineMs: 0 }), { code: 'ERR_KEDGE_OPTIONS' });
  });

  it('shows no token when it is printed', async () => {
    const source = cachedToken(async () => ({ token: 'canary-secret' }));
    await source.token();
    assert.doesNotMatch(inspect(source, { depth: 9, showHidden: true }) + JSON.stringify(source), /canary-secret/);
  });
});
