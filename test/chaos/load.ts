import { setTimeout as sleep } from 'node:timers/promises';
import type { Client, Wire } from './clients.ts';
import { pick } from './random.ts';

export type Method = 'GET' | 'PUT' | 'POST' | 'UNARY' | 'RETRIED';

/** One call from its start to its end, as its caller saw it. */
export interface Call {
  readonly id: string;
  readonly wire: Wire;
  readonly method: Method;
  readonly host: string;
  readonly startedAt: number;
  endedAt: number;
  /** How often it was told its end: once, or somebody is wrong. */
  settled: number;
  ok: boolean;
  error: unknown;
  status: number | undefined;
  /** The head of its answer came: from there on nobody sends it again, grpc-js neither (gRFC A6). */
  begun: boolean;
  /** It got an answer that was meant for another call. */
  crossed: boolean;
}

/** Calls that may be executed more than once: gRPC calls only where the service config says so. */
export function isIdempotent({ method }: Call): boolean {
  return method === 'GET' || method === 'PUT' || method === 'RETRIED';
}

export function took(call: Call): number {
  return call.endedAt - call.startedAt;
}

const HOSTS = ['orders.us1:8080', 'users.us1:8080', 'carts.us1:9000'];
const HTTP: readonly Method[] = ['GET', 'GET', 'PUT', 'POST'];
const GRPC: readonly Method[] = ['UNARY', 'RETRIED'];
const TICK_MS = 5;
const SETTLE_MS = 45_000;

export interface LoadOptions {
  /** Calls per second and client. Default: 60. */
  rate?: number;
  hosts?: readonly string[];
  methods?: readonly Method[];
}

let lastId = 0;

/** One call of a client, now. */
export function start(client: Client, method: Method, host: string): { call: Call; done: Promise<void> } {
  lastId += 1;
  const call: Call = {
    id: `id-${lastId}`,
    wire: client.wire,
    method,
    host,
    startedAt: performance.now(),
    endedAt: Number.NaN,
    settled: 0,
    ok: false,
    error: undefined,
    status: undefined,
    begun: false,
    crossed: false,
  };
  const done = new Promise<void>((resolve) => {
    client.send(call, () => {
      call.settled += 1;
      if (call.settled > 1) return;
      call.endedAt = performance.now();
      resolve();
    });
  });
  return { call, done };
}

/**
 * Open loop: calls start when the schedule says so, however long those before them take, as those of independent users
 * do; a closed loop would stop asking just when something is slow.
 */
export class Load {
  readonly calls: Call[] = [];
  private readonly pending = new Set<Promise<void>>();
  private readonly timer: NodeJS.Timeout;

  constructor(clients: readonly Client[], next: () => number, options: LoadOptions = {}) {
    const { rate = 60, hosts = HOSTS } = options;
    const began = performance.now();
    let started = 0;
    this.timer = setInterval(() => {
      const due = ((performance.now() - began) / 1000) * rate;
      for (; started < due; started += 1) {
        for (const client of clients) {
          const methods = options.methods ?? (client.wire === 'grpc' ? GRPC : HTTP);
          this.add(start(client, pick(next, methods), pick(next, hosts)));
        }
      }
    }, TICK_MS);
  }

  add({ call, done }: { call: Call; done: Promise<void> }): void {
    this.calls.push(call);
    this.pending.add(done);
    done.then(() => this.pending.delete(done));
  }

  /** No more calls; resolves when all have settled, or never will. */
  async stop(): Promise<void> {
    clearInterval(this.timer);
    const late = new AbortController();
    const timeout = sleep(SETTLE_MS, undefined, { signal: late.signal }).catch(() => {});
    await Promise.race([Promise.all(this.pending), timeout]);
    late.abort();
  }
}
