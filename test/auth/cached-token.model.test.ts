import assert from 'node:assert/strict';
import { getEventListeners } from 'node:events';
import { describe, it, type TestContext } from 'node:test';
import { cachedToken, type FetchedToken, isKedgeError, type TokenSource } from '../../src/index.ts';
import { random } from '../helpers/random.ts';

const SEED = Number(process.env['KEDGE_TEST_SEED'] ?? Date.now() % 1_000_000);
const STEPS = Number(process.env['KEDGE_TEST_MODEL_STEPS'] ?? 120_000);
const STEPS_PER_SOURCE = 200;

const DEADLINE_MS = 5000;
/** What the source promises: all who ask within this time of a failure have that failure. */
const COOL_MS = 250;
/** And: what is fetched just now is not expired by a clock that is ahead by less. */
const LEEWAY_MS = 60_000;
const TRUE_START = 1_700_000_000_000;

/** Why a fetch of the test fails; seen in errors by its name. */
class Refused extends Error {
  override readonly name = 'Refused';
}

/** Both clocks and the timers, which move when the test says so. */
class Time {
  elapsed = 0;
  /** The wall clock's mistake. */
  offMs = 0;
  readonly timers = new Map<object, { at: number; run: () => void }>();

  constructor(t: TestContext) {
    t.mock.method(performance, 'now', () => this.elapsed);
    t.mock.method(Date, 'now', () => this.wall);
    t.mock.method(globalThis, 'setTimeout', (run: () => void, ms: number) => {
      const timer = { unref: () => timer, ref: () => timer };
      this.timers.set(timer, { at: this.elapsed + ms, run });
      return timer;
    });
    t.mock.method(globalThis, 'clearTimeout', (timer: object) => this.timers.delete(timer));
  }

  get wall(): number {
    return TRUE_START + this.elapsed + this.offMs;
  }

  async advance(ms: number): Promise<void> {
    const until = this.elapsed + ms;
    for (;;) {
      const [timer, due] = [...this.timers].sort(([, a], [, b]) => a.at - b.at)[0] ?? [];
      if (due === undefined || due.at > until) break;
      this.elapsed = due.at;
      this.timers.delete(timer!);
      due.run();
      await turns();
    }
    this.elapsed = until;
  }
}

/** Lets promises go on: all of them by default. */
async function turns(n = 40): Promise<void> {
  for (let i = 0; i < n; i += 1) await undefined;
}

interface Fetch {
  readonly token: string;
  readonly begun: number;
  /** How often the source had been invalidated. */
  readonly epoch: number;
  readonly signal: AbortSignal;
  settle: { resolve(value: FetchedToken): void; reject(error: unknown): void } | undefined;
  /** Until when it may be served, on the wall clock; undefined: it gave none. */
  end: number | undefined;
}

interface Waiter {
  readonly epoch: number;
  readonly asked: number;
  readonly abort: AbortController | undefined;
  outcome: { token: string } | { error: unknown } | undefined;
}

/** One source, what was done to it, and what must be true of it. */
class Walk {
  private readonly time: Time;
  private readonly pick: (n: number) => number;
  private readonly source: TokenSource;
  private readonly fetches: Fetch[] = [];
  private waiters: Waiter[] = [];
  private epoch = 0;
  /** When the fetch that counted failed. */
  private failed = Number.NEGATIVE_INFINITY;
  private violation: string | undefined;
  /** Whether the model knows which fetch counts; it does not where invalidate() may come between its call and its beginning. */
  private readonly isExact: boolean;

  constructor(time: Time, pick: (n: number) => number) {
    this.time = time;
    this.pick = pick;
    this.isExact = pick(2) === 0;
    this.source = cachedToken((signal) => this.fetch(signal), { deadlineMs: DEADLINE_MS });
  }

  private fetch(signal: AbortSignal): Promise<FetchedToken> {
    // Thrown here it would be a failure of the source.
    if (this.isExact && this.time.elapsed - this.failed < COOL_MS) this.violation = 'asked again within the pause';
    const begun = this.time.elapsed;
    const { promise, resolve, reject } = Promise.withResolvers<FetchedToken>();
    const fetch: Fetch = {
      token: `t${this.fetches.length}`,
      begun,
      epoch: this.epoch,
      signal,
      settle: { resolve, reject },
      end: undefined,
    };
    this.fetches.push(fetch);
    signal.addEventListener('abort', () => {
      if (begun + DEADLINE_MS <= this.time.elapsed) this.noteFailure(fetch);
    });
    if (this.pick(20) === 0) throw new Refused(this.fail(fetch));
    return promise;
  }

  /** Only of the fetch that new calls would wait for. */
  private noteFailure(fetch: Fetch): void {
    if (fetch.epoch === this.epoch) this.failed = this.time.elapsed;
  }

  private fail(fetch: Fetch): string {
    fetch.settle = undefined;
    if (!fetch.signal.aborted) this.noteFailure(fetch);
    return 'refused';
  }

  private live(): Fetch[] {
    return this.fetches.filter((each) => each.settle !== undefined && !each.signal.aborted);
  }

  async step(): Promise<void> {
    const kind = this.pick(100);
    if (kind < 30) this.ask();
    else if (kind < 45) this.peek();
    else if (kind < 52) {
      if (this.isExact) await turns();
      this.epoch += 1;
      this.failed = Number.NEGATIVE_INFINITY;
      this.source.invalidate!();
    } else if (kind < 62) {
      const waiting = this.waiters.filter(({ abort, outcome }) => abort?.signal.aborted === false && !outcome);
      waiting[this.pick(waiting.length)]?.abort?.abort(new Refused('aborted'));
    } else if (kind < 82) await this.answer();
    else {
      await this.check();
      if (kind < 96) await this.time.advance(this.pick(3) === 0 ? this.pick(DEADLINE_MS * 2) : this.pick(300));
      else this.time.offMs = this.pick(2) === 0 ? 0 : (this.pick(3) - 1) * this.pick(7200_000);
    }
    // How far promises have come when the next thing happens is left to the seed.
    await turns(this.pick(3) === 0 ? 40 : this.pick(8));
    if (this.pick(4) === 0) await this.check();
  }

  private ask(): void {
    const abort = this.pick(2) === 0 ? new AbortController() : undefined;
    if (abort !== undefined && this.pick(10) === 0) abort.abort(new Refused('aborted before'));
    const waiter: Waiter = { epoch: this.epoch, asked: this.time.elapsed, abort, outcome: undefined };
    this.waiters.push(waiter);
    this.source.token(abort?.signal).then(
      (token) => {
        waiter.outcome = { token };
      },
      (error) => {
        waiter.outcome = { error };
      },
    );
  }

  private peek(): void {
    const token = this.source.peek();
    if (token === undefined) return;
    const fetch = this.fetches.find((each) => each.token === token)!;
    assert.equal(fetch.epoch, this.epoch, 'served after it was invalidated');
    assert.ok(fetch.end !== undefined && this.time.wall < fetch.end, 'served after its end');
  }

  private async answer(): Promise<void> {
    const open = this.fetches.filter(({ settle }) => settle !== undefined);
    const fetch = open[this.pick(open.length)];
    if (fetch === undefined) return;
    const { resolve, reject } = fetch.settle!;
    const { token } = fetch;
    const now = this.time.wall;
    const expiresAt = (ms: number) => ({ token, expiresAt: new Date(now + ms) });
    const kind = this.pick(12);
    if (kind < 7) {
      const ms = [undefined, 1 + this.pick(60_000), 1 + this.pick(3000), -this.pick(LEEWAY_MS)][this.pick(4)];
      fetch.end = ms === undefined ? Number.POSITIVE_INFINITY : now + ms + (ms > 0 ? 0 : LEEWAY_MS);
      fetch.settle = undefined;
      resolve(ms === undefined ? { token } : expiresAt(ms));
    } else {
      this.fail(fetch);
      if (kind === 7) resolve(expiresAt(-LEEWAY_MS - this.pick(7200_000)));
      else if (kind === 8) resolve([null, {}, { token: 1 }, { token, expiresAt: 'soon' }][this.pick(4)] as never);
      else if (kind === 9) reject('no Error');
      else reject(new Refused('rejected'));
    }
    // Whether it is accepted depends on the clock when it is looked at: that must not move before.
    await turns();
  }

  /** What must be true whenever all promises have come to rest. */
  async check(): Promise<void> {
    await turns();
    assert.equal(this.violation, undefined);
    const live = this.live().filter(({ epoch }) => epoch === this.epoch);
    assert.ok(live.length <= 1 || !this.isExact, `${live.length} fetches at a time`);
    const left: Waiter[] = [];
    for (const waiter of this.waiters) {
      const { abort, asked, epoch, outcome } = waiter;
      if (outcome === undefined) {
        assert.ok(abort?.signal.aborted !== true, 'an aborted call still waits');
        assert.ok(this.time.elapsed - asked <= DEADLINE_MS, 'a call waits beyond the deadline');
        assert.ok(this.live().length > 0, 'a call waits for nothing');
        left.push(waiter);
        continue;
      }
      if (abort !== undefined) assert.equal(getEventListeners(abort.signal, 'abort').length, 0, 'a listener is left');
      if ('token' in outcome) {
        const fetch = this.fetches.find(({ token }) => token === outcome.token)!;
        assert.ok(fetch.end !== undefined, 'a token that no fetch gave');
        assert.ok(fetch.epoch >= epoch, 'a token of before the invalidation that the call knows of');
      } else if (isKedgeError(outcome.error)) {
        assert.equal(outcome.error.code, 'ERR_KEDGE_TOKEN_UNAVAILABLE');
        assert.doesNotMatch(outcome.error.message, /\(Error\)|\(AbortError\)/, "failed by somebody else's leaving");
        assert.doesNotMatch(outcome.error.message, /rejected|t\d/, 'shows what the source said');
      } else {
        assert.equal(abort?.signal.aborted, true, 'neither its own abort nor a typed error');
        assert.equal(outcome.error, abort!.signal.reason);
      }
    }
    this.waiters = left;
    this.peek();
  }

  /** Whatever was done to it: a call gets a token as soon as there is one, and nothing is left. */
  async end(): Promise<void> {
    await this.check();
    this.time.offMs = 0;
    await this.time.advance(DEADLINE_MS + COOL_MS);
    await this.check();
    assert.equal(this.waiters.length, 0, 'every wait ends');
    this.epoch += 1;
    this.failed = Number.NEGATIVE_INFINITY;
    this.source.invalidate!();
    for (let i = 0; i < 100 && this.source.peek() === undefined; i += 1) {
      this.source.token().catch(() => {});
      await turns();
      for (const fetch of this.live()) {
        fetch.end = Number.POSITIVE_INFINITY;
        fetch.settle!.resolve({ token: fetch.token });
        fetch.settle = undefined;
      }
      await turns();
      await this.time.advance(COOL_MS);
    }
    assert.ok(await this.source.token());
    await this.check();
    assert.equal(this.time.timers.size, 0, 'a timer is left');
  }
}

describe('cachedToken, by a seeded random walk', () => {
  it(`serves no token that has ended or was refused, and leaves nobody waiting (seed ${SEED})`, async (t) => {
    const unhandled: unknown[] = [];
    const note = (error: unknown) => unhandled.push(error);
    process.on('unhandledRejection', note);
    t.after(() => process.off('unhandledRejection', note));
    const time = new Time(t);
    const next = random(SEED);
    const pick = (n: number) => Math.floor(next() * n);
    let steps = 0;
    try {
      while (steps < STEPS) {
        const walk = new Walk(time, pick);
        for (let i = 0; i < STEPS_PER_SOURCE; i += 1, steps += 1) await walk.step();
        await walk.end();
      }
    } catch (error) {
      throw new Error(`seed ${SEED}, step ${steps}: ${(error as Error).message}`, { cause: error });
    }
    await new Promise(setImmediate);
    assert.deepEqual(unhandled, []);
    t.diagnostic(`seed ${SEED}: ${steps} steps over ${Math.ceil(STEPS / STEPS_PER_SOURCE)} sources`);
  });
});
