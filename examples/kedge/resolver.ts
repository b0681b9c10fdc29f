import dns from 'node:dns/promises';
import { isIP } from 'node:net';
import type { KubeConfig } from '@kubernetes/client-node';
import type { BackendConfig } from './config.ts';
import { watchEndpoints } from './k8s.ts';
import { metrics } from './metrics.ts';

/** Something to dial. */
export interface Address {
  readonly host: string;
  readonly port: number;
}

/** The addresses of a backend, kept up to date. */
export interface Resolver {
  /** Rejects when there has never been an answer. */
  addresses(): Promise<readonly Address[]>;
  /** The last answer, the same list while nothing changes; undefined where there is none yet. */
  current(): readonly Address[] | undefined;
  close(): void;
}

/** How long an answer counts where the records do not say, in ms: SRV answers come without their TTL from node:dns. */
const TTL_MS = 5_000;
const MAX_TTL_MS = 24 * 60 * 60 * 1000;

/** `cluster`: asked for when a backend is in Kubernetes. */
export function resolverOf({ host, srv, k8s }: BackendConfig, cluster: () => KubeConfig): Resolver {
  if (k8s !== undefined) return watchEndpoints(k8s, cluster());
  if (srv !== undefined) return new Polled(() => lookUpSrv(srv.dnsName, srv.portOverride));
  const { dnsName, port } = host!;
  return new Polled(async () => {
    metrics.hostLookUps.inc();
    return {
      addresses: (await dns.lookup(dnsName, { all: true })).map(({ address }) => ({ host: address, port })),
      ttlMs: isIP(dnsName) === 0 ? await ttlOf(dnsName) : Number.POSITIVE_INFINITY,
    };
  });
}

interface Answer {
  readonly addresses: readonly Address[];
  readonly ttlMs: number;
}

/** Asks again when an answer is out of date; while none is to be had, the last one serves. */
class Polled implements Resolver {
  private readonly ask: () => Promise<Answer>;
  private answer: Answer | undefined;
  private isOutdated = false;
  private outdating: NodeJS.Timeout | undefined;
  private asking: Promise<Answer> | undefined;

  constructor(ask: () => Promise<Answer>) {
    this.ask = ask;
  }

  async addresses(): Promise<readonly Address[]> {
    return this.current() ?? (await this.refresh()).addresses;
  }

  current(): readonly Address[] | undefined {
    // Nobody waits for what is known: a new answer serves the next.
    if (this.isOutdated && this.answer !== undefined) this.refresh().catch(() => {});
    return this.answer?.addresses;
  }

  close(): void {
    clearTimeout(this.outdating);
  }

  private refresh(): Promise<Answer> {
    this.asking ??= this.ask()
      .then((answer) => {
        if (answer.addresses.length > 0 || this.answer === undefined) this.answer = answer;
        this.countFor(answer.ttlMs);
        return answer;
      })
      .catch((error) => {
        this.countFor(TTL_MS);
        throw error;
      })
      .finally(() => {
        this.asking = undefined;
      });
    return this.asking;
  }

  private countFor(ms: number): void {
    clearTimeout(this.outdating);
    this.isOutdated = false;
    if (ms > MAX_TTL_MS) return;
    this.outdating = setTimeout(() => {
      this.isOutdated = true;
    }, ms).unref();
  }
}

async function lookUpSrv(name: string, portOverride: number): Promise<Answer> {
  metrics.srvLookUps.inc();
  const records = await dns.resolveSrv(name);
  const found = await Promise.all(
    records.map(async ({ name: target, port }) => {
      const all = await dns.lookup(target, { all: true });
      return all.map(({ address }) => ({ host: address, port: portOverride || port }));
    }),
  );
  return { addresses: found.flat(), ttlMs: TTL_MS };
}

async function ttlOf(name: string): Promise<number> {
  const records = await dns.resolve4(name, { ttl: true }).catch(() => []);
  return records.length === 0
    ? TTL_MS
    : Math.max(1, Math.min(MAX_TTL_MS / 1000, ...records.map(({ ttl }) => ttl))) * 1000;
}
