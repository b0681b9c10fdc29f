import { metrics } from './metrics.ts';
import type { Address, Resolver } from './resolver.ts';
import { Shares } from './shares.ts';

/** How long an address that cannot be dialled is left out, in ms. */
const ASIDE_MS = 2_000;

/** The connections to one address. */
export interface Line {
  /** `host:port`. */
  readonly address: string;
  /** How many requests one client may have under way here. */
  readonly share: number;
  /** Ends them when what is under way has ended. */
  close(): void;
}

/**
 * The addresses behind one name, in turn: each call takes the next, one that cannot be dialled is left out for 2 s, and when
 * all are, all are tried. Only dials are tried again: what was sent may have been done.
 */
export class Backend<L extends Line> {
  readonly name: string;
  readonly shares: Shares;
  private readonly resolver: Resolver;
  private readonly open: (address: Address) => L;
  private lines = new Map<string, L>();
  private inTurn: readonly L[] = [];
  private resolved: readonly Address[] | undefined;
  private readonly aside = new Map<L, number>();
  private turn = 0;

  constructor(name: string, resolver: Resolver, open: (address: Address) => L) {
    this.name = name;
    this.resolver = resolver;
    this.open = open;
    // Where there is no address nobody waits for one: that is said at once.
    this.shares = new Shares(() => this.inTurn.reduce((sum, { share }) => sum + share, 0) || Number.POSITIVE_INFINITY);
    // Connected before the first request, as the original does.
    this.ready()?.catch(() => {});
  }

  /** Undefined when the addresses are known; rejects when there are none to be had. */
  ready(): Promise<void> | undefined {
    const known = this.resolver.current();
    if (known !== undefined) {
      this.update(known);
      return undefined;
    }
    return this.resolver.addresses().then((addresses) => this.update(addresses));
  }

  /** The next address that was not tried yet, one that is not set aside first. */
  next(tried: readonly L[]): L | undefined {
    const { inTurn } = this;
    const count = inTurn.length;
    const start = this.turn;
    if (tried.length === 0) this.turn = (start + 1) % Math.max(1, count);
    let spare: L | undefined;
    for (let i = 0; i < count; i += 1) {
      const line = inTurn[(start + i) % count]!;
      if (tried.includes(line)) continue;
      if (this.aside.size === 0 || (this.aside.get(line) ?? 0) <= performance.now()) return line;
      spare ??= line;
    }
    // Rather one that is set aside than none.
    return spare;
  }

  setAside(line: L): void {
    metrics.failedDials.inc(this.name, line.address);
    if (this.inTurn.includes(line)) this.aside.set(line, performance.now() + ASIDE_MS);
  }

  connected(line: L): void {
    if (this.aside.size > 0) this.aside.delete(line);
  }

  close(): void {
    this.resolver.close();
    this.update([]);
  }

  private update(addresses: readonly Address[]): void {
    if (addresses === this.resolved) return;
    this.resolved = addresses;
    const lines = new Map<string, L>();
    for (const address of addresses) {
      const key = `${address.host} ${address.port}`;
      if (!lines.has(key)) lines.set(key, this.lines.get(key) ?? this.open(address));
    }
    for (const [key, line] of this.lines) {
      if (lines.has(key)) continue;
      this.aside.delete(line);
      line.close();
    }
    this.lines = lines;
    this.inTurn = [...lines.values()];
  }
}
