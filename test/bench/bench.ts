import { fork } from 'node:child_process';
import { once } from 'node:events';
import { createDialer, type Dialer, type DialerOptions, pem, single } from '../../src/index.ts';
import { type Call, compare, type Row } from './measure.ts';

/** The name that the server's certificate is for. */
export const NAME = 'us1.kedge.test';
export const AUTHORITY = 'orders.shop.svc.us1:8080';
export const TARGET = `http://${AUTHORITY}`;

/** What the server process listens on, and what its clients show. */
export interface BenchServer {
  readonly httpPort: number;
  readonly grpcPort: number;
  /** The same behind 50 ms of distance. */
  readonly farHttpPort: number;
  readonly farGrpcPort: number;
  /** What it answers with, in the clear. */
  readonly plainPort: number;
  readonly kedgeCert: string;
  readonly kedgeKey: string;
  readonly ca: string;
  readonly cert: string;
  readonly key: string;
}

/** What the parts of the benchmark share. */
export interface Bench {
  readonly server: BenchServer;
  readonly rows: Row[];
  dial(port: number, options?: Partial<DialerOptions>): Dialer;
  /** TLS handshakes that the server has completed. */
  handshakes(): Promise<number>;
  /** Measures calls of ours against calls of a rival, in turn. */
  row(name: string, rival: string, concurrency: number, ours: Call, theirs: Call): Promise<void>;
  /** Measures something else. */
  fact(name: string, rival: string, measure: () => Promise<string>): Promise<void>;
  /** What `--only` said. */
  readonly only: string;
  wanted(name: string): boolean;
  stop(): void;
}

export async function startBench(only: string): Promise<Bench> {
  const child = fork(new URL('./server.ts', import.meta.url), { execArgv: [] });
  const [server] = (await once(child, 'message')) as [BenchServer];
  const { ca, cert, key } = server;
  const rows: Row[] = [];
  const wanted = (name: string) => name.includes(only);
  return {
    server,
    rows,
    only,
    wanted,
    dial: (port, options = {}) =>
      createDialer({
        mapper: single({ kedge: `https://127.0.0.1:${port}`, serverName: NAME }),
        identity: pem({ cert, key, ca }),
        ...options,
      }),
    handshakes: async () => {
      child.send('count');
      return ((await once(child, 'message')) as [{ handshakes: number }])[0].handshakes;
    },
    row: async (name, rival, concurrency, ours, theirs) => {
      if (wanted(name)) rows.push({ name, rival, comparison: await compare(ours, theirs, concurrency) });
    },
    fact: async (name, rival, measure) => {
      if (wanted(name)) rows.push({ name, rival, value: await measure() });
    },
    stop: () => child.disconnect(),
  };
}
