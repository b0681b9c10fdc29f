import assert from 'node:assert/strict';
import { describe, it, type TestContext } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { after, at } from '../../src/support/timer.ts';

const HOUR_MS = 3600_000;
/** Within what time a date that a clock jumped over is noticed, in ms. */
const NOTICED_MS = 30_000;

describe('a timer for a date', () => {
  /** A timer for an hour from now, on a clock that `jump` sets. */
  const start = (t: TestContext, inMs = HOUR_MS) => {
    t.mock.timers.enable({ apis: ['setTimeout', 'Date'], now: Date.parse('2026-03-01T00:00:00Z') });
    let fired = 0;
    const stop = at(new Date(Date.now() + inMs), () => {
      fired += 1;
    });
    const jump = (ms: number) => t.mock.timers.setTime(Date.now() + ms);
    return { stop, jump, pass: (ms: number) => t.mock.timers.tick(ms), fired: () => fired };
  };

  it('calls back at it, once', (t) => {
    const { pass, fired } = start(t);
    pass(HOUR_MS - 1);
    assert.equal(fired(), 0);
    pass(1);
    assert.equal(fired(), 1);
    pass(2 * HOUR_MS);
    assert.equal(fired(), 1);
  });

  it('notices soon that the clock was set past it, as when the machine slept', (t) => {
    const { jump, pass, fired } = start(t);
    pass(60_000);
    jump(HOUR_MS);
    pass(NOTICED_MS);
    assert.equal(fired(), 1);
  });

  it('waits for it where the clock was set back, however often', (t) => {
    const { jump, pass, fired } = start(t);
    for (let i = 0; i < 5; i += 1) {
      pass(HOUR_MS - 1000);
      jump(1000 - HOUR_MS);
    }
    assert.equal(fired(), 0);
    pass(HOUR_MS - 1);
    assert.equal(fired(), 0);
    pass(NOTICED_MS);
    assert.equal(fired(), 1);
  });

  it('waits for one that is further away than any timer of Node, and calls back late rather than never', (t) => {
    const { jump, pass, fired } = start(t, 100 * 24 * HOUR_MS);
    pass(HOUR_MS);
    assert.equal(fired(), 0);
    jump(100 * 24 * HOUR_MS);
    pass(NOTICED_MS);
    assert.equal(fired(), 1);
  });

  it('says nothing once it is stopped', (t) => {
    const { stop, jump, pass, fired } = start(t);
    pass(60_000);
    stop();
    jump(2 * HOUR_MS);
    pass(2 * HOUR_MS);
    assert.equal(fired(), 0);
  });
});

describe('a timer for a time from now', () => {
  it('is not moved by the clock', async (t) => {
    const now = Date.now;
    let offset = 0;
    t.mock.method(Date, 'now', () => now.call(Date) + offset);
    let fired = 0;
    after(150, () => {
      fired += 1;
    });
    offset = 2 * HOUR_MS;
    await sleep(60);
    assert.equal(fired, 0);
    offset = -2 * HOUR_MS;
    await sleep(150);
    assert.equal(fired, 1);
  });
});
