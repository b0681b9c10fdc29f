import { subscribe, unsubscribe } from 'node:diagnostics_channel';
import dns from 'node:dns';
import type { TestContext } from 'node:test';
import type { TokenSource } from '../../src/index.ts';

/** What a call does to the world before anything is answered. */
export interface Effects {
  lookups: number;
  sockets: number;
  tokens: number;
  /** A token source whose every use counts. */
  source(name: string, token: string): TokenSource;
  /** Since the last time. */
  take(): { lookups: number; sockets: number; tokens: number };
}

/** Counts name look-ups, sockets and uses of tokens, whoever makes them. */
export function countEffects(t: TestContext): Effects {
  const effects: Effects = {
    lookups: 0,
    sockets: 0,
    tokens: 0,
    source: (name, token) => {
      const use = <T>(value: T): T => {
        effects.tokens += 1;
        return value;
      };
      return { name, peek: () => use(token), token: async () => use(token) };
    },
    take: () => {
      const { lookups, sockets, tokens } = effects;
      Object.assign(effects, { lookups: 0, sockets: 0, tokens: 0 });
      return { lookups, sockets, tokens };
    },
  };
  const count = <T extends (...args: never[]) => unknown>(original: T) =>
    ((...args: never[]) => {
      effects.lookups += 1;
      return original(...args);
    }) as T;
  t.mock.method(dns, 'lookup', count(dns.lookup));
  for (const name of ['lookup', 'resolve', 'resolve4', 'resolve6', 'resolveTxt'] as const) {
    t.mock.method(dns.promises, name, count(dns.promises[name] as never));
  }
  const onSocket = () => {
    effects.sockets += 1;
  };
  subscribe('net.client.socket', onSocket);
  t.after(() => unsubscribe('net.client.socket', onSocket));
  return effects;
}
