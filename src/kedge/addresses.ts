import dns, { type LookupAddress } from 'node:dns';
import { isIP, type LookupFunction } from 'node:net';
import { debug } from '../debug.ts';

/** How long an answer counts where no name server says it, in ms: names from /etc/hosts, search domains, caches. */
const DEFAULT_TTL_MS = 30_000;
const MIN_TTL_MS = 1_000;

/**
 * The addresses of one kedge. `dns.lookup` decides, as for everybody else on the machine; name servers are asked as well,
 * for the TTL only, and only where they agree. While no answer is to be had, the last good one serves.
 */
export class Addresses {
  private readonly hostname: string;
  private readonly ttlMs: number | undefined;
  private readonly onMoved: () => void;
  private answer: LookupAddress[] | undefined;
  private expires = 0;
  private asking: Promise<LookupAddress[]> | undefined;
  private timer: NodeJS.Timeout | undefined;
  private closed = false;

  /** `onMoved` hears of an answer that differs from the one before. */
  constructor(hostname: string, ttlMs: number | undefined, onMoved: () => void) {
    this.hostname = hostname;
    this.ttlMs = ttlMs;
    this.onMoved = onMoved;
  }

  /** For `net.connect`; undefined where the kedge is an IP address. */
  get lookup(): LookupFunction | undefined {
    return isIP(this.hostname) === 0 ? this.answerTo : undefined;
  }

  /** Whether a connected address is still one of the kedge's, as far as is known. */
  has(address: string | undefined): boolean {
    return this.answer === undefined || address === undefined || this.answer.some((each) => each.address === address);
  }

  close(): void {
    this.closed = true;
    clearTimeout(this.timer);
  }

  private readonly answerTo: LookupFunction = (_hostname, options, callback) => {
    this.current().then(
      (addresses) => {
        const family = typeof options.family === 'number' && options.family !== 0 ? options.family : undefined;
        const fitting = addresses.filter((each) => family === undefined || each.family === family);
        const chosen = fitting.length > 0 ? fitting : addresses;
        if (options.all) callback(null, chosen);
        else callback(null, chosen[0]!.address, chosen[0]!.family);
      },
      (error: NodeJS.ErrnoException) => callback(error, [], 0),
    );
  };

  private current(): Promise<LookupAddress[]> {
    if (this.answer !== undefined && performance.now() < this.expires) return Promise.resolve(this.answer);
    this.asking ??= this.ask().finally(() => {
      this.asking = undefined;
    });
    return this.asking;
  }

  private async ask(): Promise<LookupAddress[]> {
    let addresses: LookupAddress[];
    try {
      addresses = await dns.promises.lookup(this.hostname, { all: true, order: 'verbatim' });
      if (addresses.length === 0)
        throw Object.assign(new Error('no address'), { syscall: 'getaddrinfo', code: 'ENOTFOUND' });
    } catch (error) {
      if (this.answer === undefined) throw error;
      debug.dial('%s: no answer (%s), the last good one serves', this.hostname, (error as NodeJS.ErrnoException).code);
      this.keep(this.answer, MIN_TTL_MS);
      return this.answer;
    }
    const before = this.answer;
    this.keep(addresses, this.ttlMs ?? DEFAULT_TTL_MS);
    if (this.ttlMs === undefined) void this.learnTtl(addresses);
    if (before !== undefined && !sameAddresses(before, addresses)) this.onMoved();
    return addresses;
  }

  /** Asks again when the answer is out of date: connections may be to an address that is no longer the kedge's. */
  private keep(addresses: LookupAddress[], ttlMs: number): void {
    this.answer = addresses;
    this.expires = performance.now() + ttlMs;
    clearTimeout(this.timer);
    if (this.closed) return;
    this.timer = setTimeout(() => this.current().catch(() => {}), ttlMs + 1).unref();
  }

  private async learnTtl(addresses: LookupAddress[]): Promise<void> {
    const none = () => [];
    const [v4, v6] = await Promise.all([
      dns.promises.resolve4(this.hostname, { ttl: true }).catch(none),
      dns.promises.resolve6(this.hostname, { ttl: true }).catch(none),
    ]);
    const records = [...v4, ...v6];
    const agree = addresses.every(({ address }) => records.some((record) => record.address === address));
    if (!agree || this.answer !== addresses) return;
    this.keep(addresses, Math.max(Math.min(...records.map(({ ttl }) => ttl)) * 1000, MIN_TTL_MS));
  }
}

function sameAddresses(a: LookupAddress[], b: LookupAddress[]): boolean {
  return a.length === b.length && a.every(({ address }) => b.some((each) => each.address === address));
}
