import assert from 'node:assert/strict';
import { describe, it } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { inspect } from 'node:util';
import { Bearer } from '../../src/auth/bearer.ts';
import {
  cachedToken,
  createDialer,
  type FetchedToken,
  type KedgeError,
  single,
  type TokenSource,
} from '../../src/index.ts';
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
      { token: 't', expiresAt: inMs(-61_000) },
    ]) {
      await assert.rejects(cachedToken(async () => given as never).token(), { code: 'ERR_KEDGE_TOKEN_UNAVAILABLE' });
    }
    await assert.rejects(new Bearer(cachedToken(async () => ({ token: 'a\nb' }))).wait(new AbortController().signal), {
      code: 'ERR_KEDGE_TOKEN',
    });
    assert.throws(() => cachedToken('x' as never), { code: 'ERR_KEDGE_OPTIONS' });
    assert.throws(() => cachedToken(async () => ({ token: 't' }), { deadlineMs: 0 }), { code: 'ERR_KEDGE_OPTIONS' });
  });

  it('takes a token that has just expired by our clock, which may be fast, for a valid one', async () => {
    let fetches = 0;
    const source = cachedToken(async () => {
      fetches += 1;
      return { token: `t${fetches}`, expiresAt: inMs(-5000) };
    });
    for (let i = 0; i < 5; i += 1) assert.equal(await source.token(), 't1');
  });

  it('asks again when a clock that was wrong comes right, also backwards', async (t) => {
    const truth = Date.now;
    let offMs = 3600_000;
    t.mock.method(Date, 'now', () => truth() + offMs);
    let fetches = 0;
    const source = cachedToken(async () => {
      fetches += 1;
      return { token: `t${fetches}`, expiresAt: new Date(truth() + 600_000) };
    });
    await assert.rejects(source.token(), /expired, or the clock is wrong/);
    offMs = 0;
    await sleep(300);
    assert.equal(await source.token(), 't2', 'a pause is measured, whatever the clock says');
    offMs = 3600_000;
    assert.equal(source.peek(), undefined);
    offMs = 0;
    assert.equal(source.peek(), 't2');
    assert.equal(fetches, 2);
  });

  it('fetches anew for a call right after one that was aborted', async () => {
    let fetches = 0;
    const source = cachedToken(async () => {
      fetches += 1;
      await sleep(20);
      return { token: `t${fetches}` };
    });
    for (let i = 1; i <= 3; i += 1) {
      const abort = new AbortController();
      const again = source.token(abort.signal).catch((error: Error) => {
        assert.equal(error.message, 'no time');
        return Promise.all([source.token(), source.token()]);
      });
      abort.abort(new Error('no time'));
      assert.deepEqual(await again, [`t${2 * i}`, `t${2 * i}`]);
      source.invalidate!();
    }
  });

  it('fetches anew for a call that is made when the aborted one has ended', async () => {
    const source = cachedToken(async (signal) => {
      await sleep(20, undefined, { signal });
      return { token: 't' };
    });
    const abort = new AbortController();
    setTimeout(() => abort.abort(new Error('no time')), 5);
    await assert.rejects(source.token(abort.signal), /no time/);
    assert.equal(await source.token(), 't');
  });

  it('does not keep what was under way when its token was refused', async () => {
    const answers: ((token: string) => void)[] = [];
    const source = cachedToken(() => new Promise((resolve) => answers.push((token) => resolve({ token }))));
    const early = source.token();
    await sleep(0);
    source.invalidate!();
    answers[0]!('old');
    assert.equal(await early, 'old', 'who had asked before has it');
    assert.equal(source.peek(), undefined);
    const later = source.token();
    await sleep(0);
    answers[1]!('new');
    assert.equal(await later, 'new');
  });

  it('shows no token when it is printed', async () => {
    const source = cachedToken(async () => ({ token: 'canary-secret' }));
    await source.token();
    assert.doesNotMatch(inspect(source, { depth: 9, showHidden: true }) + JSON.stringify(source), /canary-secret/);
  });
});

describe('a refused token', () => {
  it('is replaced once for all calls that were made with it, and each of them may try again', async () => {
    let fetches = 0;
    const source = cachedToken(async () => {
      fetches += 1;
      await sleep(5);
      return { token: `t${fetches}` };
    });
    const bearer = new Bearer(source);
    const { signal } = new AbortController();
    const old = await bearer.wait(signal);
    const again = await Promise.all(
      Array.from({ length: 100 }, async (_, i) => {
        await sleep(i % 20);
        assert.equal(bearer.invalidate(old), true, `call ${i}`);
        return bearer.wait(signal);
      }),
    );
    assert.deepEqual(new Set(again), new Set(['Bearer t2']));
    assert.equal(fetches, 2);
  });

  it('is given up when the source has no other', async () => {
    const bearer = new Bearer({ name: 'x', peek: () => 't', token: async () => 't', invalidate: () => {} });
    const { signal } = new AbortController();
    const header = await bearer.wait(signal);
    assert.equal(bearer.invalidate(header), true);
    assert.equal(await bearer.wait(signal), header);
    assert.equal(bearer.invalidate(header), false);
  });

  it('harms nothing where the source cannot forget it', async (t) => {
    const kedge = await startKedge(t, {
      handler: (_request, response) => {
        response.statusCode = 407;
        response.end();
      },
    });
    const failing = {
      throws: () => {
        throw new Error('EROFS');
      },
      rejects: () => Promise.reject(new Error('EROFS')) as never,
    };
    for (const [how, invalidate] of Object.entries(failing)) {
      const source = { name: how, peek: () => 'bad', token: async () => 'bad', invalidate };
      const bearer = new Bearer(source);
      assert.equal(typeof bearer.invalidate(bearer.peek()), 'boolean', how);
      const dialer = kedge.dialer({ mapper: single(kedge.route({ proxyAuth: source })) });
      await assert.rejects(dialer.fetch('http://a.us1/'), (error: Error) => {
        assert.equal((error.cause as KedgeError).code, 'ERR_KEDGE_UNAUTHORIZED', how);
        return true;
      });
    }
    await sleep(20);
  });
});

describe('a token source of the user', () => {
  it('that answers with a promise where a token belongs leaves no rejection behind', async () => {
    const peek = () => Promise.reject(new Error('async')) as never;
    const bearer = new Bearer({ name: 'x', peek, token: async () => 't' });
    assert.throws(() => bearer.peek(), { code: 'ERR_KEDGE_TOKEN' });
    await sleep(20);
  });

  it('that fails by a dialer fails at its own stage, whatever the dialer failed at', async () => {
    const dialer = createDialer({ mapper: single('https://127.0.0.1:1') });
    const source = cachedToken(async () => ({ token: await (await dialer.fetch('http://id.test/')).text() }));
    await assert.rejects(source.token(), (error: KedgeError) => {
      assert.deepEqual([error.code, error.stage], ['ERR_KEDGE_TOKEN_UNAVAILABLE', 'token']);
      assert.match(error.message, /the source failed \(.*ECONNREFUSED/);
      return true;
    });
    await dialer.destroy();
  });

  it('whose own request needs its token is told so at once', async (t) => {
    const kedge = await startKedge(t);
    const source: TokenSource = cachedToken(async () => ({
      token: await (await dialer.fetch('http://id.test/token')).text(),
    }));
    let dialer = kedge.dialer({ mapper: single(kedge.route({ proxyAuth: source })) });
    const loop = /goes by a route that needs this token/;
    const began = performance.now();
    await assert.rejects(source.token(), { code: 'ERR_KEDGE_TOKEN_UNAVAILABLE', message: loop });
    await assert.rejects(dialer.fetch('http://orders.test/'), (error: Error) => {
      assert.match(String((error.cause as KedgeError).message), loop);
      assert.equal((error.cause as KedgeError).target, 'orders.test');
      return true;
    });
    assert.ok(performance.now() - began < 5000, 'not by the deadline');
    // Through others: a's request needs b's token, and b's request needs a's.
    const other = kedge.dialer({ mapper: single(kedge.route({ backendAuth: source })) });
    const b = cachedToken(async () => ({ token: await (await other.fetch('http://id.test/token')).text() }));
    dialer = kedge.dialer({ mapper: single(kedge.route({ proxyAuth: b })) });
    await assert.rejects(b.token(), { message: loop });
    // What a request started goes on after it, and may use the token like everybody.
    let later: Promise<string> | undefined;
    const fine = cachedToken(async () => {
      later ??= sleep(50).then(() => fine.token());
      return { token: 'fine', expiresAt: inMs(20) };
    });
    assert.equal(await fine.token(), 'fine');
    assert.equal(await later, 'fine');
  });
});
