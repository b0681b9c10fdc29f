import { AsyncLocalStorage } from 'node:async_hooks';
import dns, { type LookupAddress } from 'node:dns';
import { isIP, type LookupFunction } from 'node:net';
import { debug } from '../support/debug.ts';
import { after } from '../support/timer.ts';

/** How long an answer counts where no name server says it, in ms: names from /etc/hosts, search domains, caches. */
const DEFAULT_TTL_MS = 30_000;
const MIN_TTL_MS = 1_000;
/**
 * How long a look-up may take, in ms, before the last good answer serves, and before whoever needs an address begins another:
 * the resolver may be well again. It cannot be cancelled, and holds one of the few threads that the process has for look-ups,
 * so the more are stuck the longer is waited.
 */
const PATIENCE_MS = 1_000;
const MANY_STUCK = 8;
const LONG_PATIENCE_MS = 60_000;
/** For the question for the TTL, which can do without an answer. */
const NAME_SERVER_TIMEOUT_MS = 2_000;
/** An address that none of so many answers in a row has is the kedge's no more: many name servers give one of several in turn. */
const ANSWERS = 3;

/**
 * The addresses of one kedge. `dns.lookup` decides, as for everybody else on the machine; name servers are asked as well,
 * for the TTL only, and only where they agree. While no answer is to be had, the last good one serves.
 *
 * @remarks Large, for an answer, the look-up under way, and which addresses failed change together or not at all.
 */
export class Addresses {
  private readonly hostname: string;
  private readonly ttlMs: number | undefined;
  private readonly onAnswer: () => void;
  /** Those that took a connection and then failed it, the first to do so first: they are dialled last. */
  private readonly failing = new Set<string>();
  /** The last {@link ANSWERS}, the newest first. */
  private answers: LookupAddress[][] = [];
  private expires = 0;
  /** Those who wait for an address; whichever look-up has one serves them all. */
  private waiting: PromiseWithResolvers<LookupAddress[]> | undefined;
  private stopWaiting = () => {};
  /** Look-ups are numbered: the newest one begun, and the newest that had an answer. */
  private begun = 0;
  private answered = 0;
  private underWay = 0;
  /** When the newest one began; undefined when it is over. */
  private since: number | undefined;
  private readonly resolvers = new Set<dns.promises.Resolver>();
  private stopTimer = () => {};
  private closed = false;
  /** The dialer's: what is started here must not run in the async context of a call, or keep it. */
  private readonly inOwnContext = AsyncLocalStorage.snapshot();

  /** `onAnswer` hears of every answer: what {@link has} says may have changed. */
  constructor(hostname: string, ttlMs: number | undefined, onAnswer: () => void) {
    this.hostname = hostname;
    this.ttlMs = ttlMs;
    this.onAnswer = onAnswer;
  }

  /** For `net.connect`; undefined where the kedge is an IP address. */
  get lookup(): LookupFunction | undefined {
    return isIP(this.hostname) === 0 ? this.answerTo : undefined;
  }

  /** Whether a connected address is still one of the kedge's, as far as is known. */
  has(address: string | undefined): boolean {
    if (address === undefined || this.answers.length === 0) return true;
    return this.answers.some((answer) => answer.some((each) => each.address === address));
  }

  /** TCP to an address tells nothing of what is behind it: what fails later does not come first in the next dial. */
  failed(address: string): void {
    this.failing.delete(address);
    this.failing.add(address);
  }

  worked(address: string): void {
    this.failing.delete(address);
  }

  close(): void {
    this.closed = true;
    this.stopTimer();
    for (const resolver of this.resolvers) resolver.cancel();
  }

  private readonly answerTo: LookupFunction = (_hostname, options, callback) => {
    this.current().then(
      (addresses) => {
        const family = typeof options.family === 'number' && options.family !== 0 ? options.family : undefined;
        const fitting = addresses.filter((each) => family === undefined || each.family === family);
        const chosen = this.healthyFirst(fitting.length > 0 ? fitting : addresses);
        if (options.all) callback(null, chosen);
        else callback(null, chosen[0]!.address, chosen[0]!.family);
      },
      (error: NodeJS.ErrnoException) => callback(error, [], 0),
    );
  };

  private healthyFirst(addresses: LookupAddress[]): LookupAddress[] {
    if (this.failing.size === 0) return addresses;
    const order = [...this.failing];
    return addresses.toSorted((a, b) => order.indexOf(a.address) - order.indexOf(b.address));
  }

  private current(): Promise<LookupAddress[]> {
    const now = performance.now();
    const [last] = this.answers;
    if (last !== undefined && now < this.expires) return Promise.resolve(last);
    return this.inOwnContext(() => this.next(now));
  }

  private next(now: number): Promise<LookupAddress[]> {
    if (this.waiting === undefined) {
      this.waiting = Promise.withResolvers();
      this.stopWaiting = after(PATIENCE_MS, () => this.makeDo('it takes too long'));
    }
    const { promise } = this.waiting;
    const patienceMs = this.underWay < MANY_STUCK ? this.underWay * PATIENCE_MS : LONG_PATIENCE_MS;
    if (this.since === undefined || now - this.since >= patienceMs) {
      this.since = now;
      void this.ask();
    }
    return promise;
  }

  private async ask(): Promise<void> {
    this.begun += 1;
    this.underWay += 1;
    const number = this.begun;
    try {
      const addresses = await dns.promises.lookup(this.hostname, { all: true, order: 'verbatim' });
      if (addresses.length === 0)
        throw Object.assign(new Error('no address'), { syscall: 'getaddrinfo', code: 'ENOTFOUND' });
      if (number > this.answered) this.learn(number, addresses);
    } catch (error) {
      // A newer look-up may know better.
      if (number === this.begun && !this.makeDo((error as NodeJS.ErrnoException).code)) this.settle('reject', error);
    } finally {
      this.underWay -= 1;
      if (number === this.begun) this.since = undefined;
    }
  }

  private learn(number: number, addresses: LookupAddress[]): void {
    this.answered = number;
    if (!isSame(addresses, this.answers[0])) this.failing.clear();
    this.answers = [addresses, ...this.answers.slice(0, ANSWERS - 1)];
    this.keep(this.ttlMs ?? DEFAULT_TTL_MS);
    this.settle('resolve', addresses);
    if (this.ttlMs === undefined) void this.learnTtl(addresses);
    this.onAnswer();
  }

  /** Serves the last good answer, if there is one, in place of one that is not to be had. */
  private makeDo(reason: string | undefined): boolean {
    const [last] = this.answers;
    if (last === undefined) return false;
    debug.dial('%s: no answer (%s), the last good one serves', this.hostname, reason);
    this.keep(MIN_TTL_MS);
    this.settle('resolve', last);
    return true;
  }

  private settle(how: 'resolve', value: LookupAddress[]): void;
  private settle(how: 'reject', value: unknown): void;
  private settle(how: 'resolve' | 'reject', value: unknown): void {
    this.stopWaiting();
    this.waiting?.[how](value as LookupAddress[]);
    this.waiting = undefined;
  }

  /** Asks again when the answer is out of date: connections may be to an address that is no longer the kedge's. */
  private keep(ttlMs: number): void {
    this.expires = performance.now() + ttlMs;
    this.stopTimer();
    if (this.closed) return;
    this.stopTimer = after(ttlMs + 1, () => this.current().catch(() => {}));
  }

  private async learnTtl(addresses: LookupAddress[]): Promise<void> {
    if (this.closed) return;
    // One of our own: a question that nobody answers would hold the process for long after close().
    const resolver = new dns.promises.Resolver({ timeout: NAME_SERVER_TIMEOUT_MS, tries: 1 });
    resolver.setServers(dns.getServers());
    this.resolvers.add(resolver);
    const none = () => [];
    const [v4, v6] = await Promise.all([
      resolver.resolve4(this.hostname, { ttl: true }).catch(none),
      resolver.resolve6(this.hostname, { ttl: true }).catch(none),
    ]);
    this.resolvers.delete(resolver);
    const records = [...v4, ...v6];
    const agree = addresses.every(({ address }) => records.some((record) => record.address === address));
    if (!agree || this.answers[0] !== addresses) return;
    this.keep(Math.max(Math.min(...records.map(({ ttl }) => ttl)) * 1000, MIN_TTL_MS));
  }
}

function isSame(addresses: LookupAddress[], last: LookupAddress[] = []): boolean {
  return addresses.length === last.length && addresses.every((each) => last.some((it) => it.address === each.address));
}
