/**
 * A process with calls under way over every wire, which is stopped from outside or stalls its own event loop as PINGs
 * leave: `CHAOS=<JSON> node paused.ts`. It prints `{}` when its connections are there and what came of its calls at the end.
 */
import { subscribe } from 'node:diagnostics_channel';
import type { ClientHttp2Session, ClientHttp2Stream } from 'node:http2';
import { setTimeout as sleep } from 'node:timers/promises';
import { createDialer, pem, single, staticToken } from '../../src/index.ts';
import { KEDGE_NAME } from '../helpers/kedge.ts';
import { type Client, connectClient, grpcClient, httpClient } from './clients.ts';
import { type Call, start } from './load.ts';

export interface Paused {
  cert: string;
  key: string;
  ca: string;
  token: string;
  urls: readonly string[];
  /** Rounds of one call over each wire. */
  rounds: number;
  everyMs: number;
  /** How often it stalls, and for how long. */
  stalls: number;
  stallMs: number;
}

/** By wire: calls, and what those that failed were told. */
export type PausedResult = Record<string, { calls: number; failed: string[] }>;

const { cert, key, ca, token, urls, rounds, everyMs, stalls, stallMs } = JSON.parse(process.env['CHAOS']!) as Paused;
const dial = (protocol: 'h1' | 'h2' | 'auto') =>
  createDialer({
    identity: pem({ cert, key, ca }),
    mapper: single({ kedge: [...urls], serverName: KEDGE_NAME, proxyAuth: staticToken(token) }),
    http: { protocol },
    grpc: { keepaliveTimeMs: 2000, keepaliveTimeoutMs: 2000 },
  });
const dialers = [dial('h1'), dial('h2'), dial('auto'), dial('auto')] as const;
const clients: readonly Client[] = [
  httpClient('h1', dialers[0].dispatcher),
  httpClient('h2', dialers[1].dispatcher),
  grpcClient(dialers[2]),
  connectClient(dialers[3]),
];

let stalled = 0;
const sessions = new WeakSet<ClientHttp2Session>();
/** Right after a PING has left nothing is read until more of them are due. */
subscribe('http2.client.stream.created', (message) => {
  const { session } = (message as { stream: ClientHttp2Stream }).stream;
  if (session === undefined || sessions.has(session as ClientHttp2Session)) return;
  sessions.add(session as ClientHttp2Session);
  const { ping } = session;
  session.ping = (...args: unknown[]) => {
    if (stalled < stalls) {
      stalled += 1;
      setImmediate(() => {
        for (const end = performance.now() + stallMs; performance.now() < end; );
      });
    }
    return ping.apply(session, args as never);
  };
});

const calls: Call[] = [];
const pending: Promise<void>[] = [];
const round = () => {
  for (const client of clients) {
    const { call, done } = start(client, client.wire === 'grpc' ? 'UNARY' : 'POST', 'orders.us1:8080');
    calls.push(call);
    pending.push(done);
  }
};
round();
await Promise.all(pending);
console.log('{}');
for (let i = 1; i < rounds || (stalled < stalls && i < 10 * rounds); i += 1) {
  // Now and then it is silent for long enough to ask whether anybody is there.
  await sleep(i % 20 === 0 ? 3500 : everyMs);
  round();
}
await Promise.all(pending);
const result: PausedResult = {};
for (const { wire, ok, error, crossed } of calls) {
  result[wire] ??= { calls: 0, failed: [] };
  result[wire].calls += 1;
  if (!ok) result[wire].failed.push(crossed ? 'an answer that is not its own' : String(error));
}
console.log(JSON.stringify(result));
await Promise.all(dialers.map((dialer) => dialer.destroy()));
