import { watchFile } from 'node:fs';
import type { Texts } from './config.ts';
import type { Certificates } from './server.ts';

/** What the kedge reads: all of one kind is taken together, or none. */
export interface Files {
  readonly configuration: Texts;
  readonly certificates: Certificates;
}

/** Where one kind comes from. */
export interface Origin<T> {
  readonly paths: readonly string[];
  read(): T;
}

/** Whoever serves by files; `check` rejects or throws where `take` would. */
export interface Server {
  check(files: Partial<Files>): unknown;
  take(files: Partial<Files>): unknown;
}

const POLL_MS = 500;
const SAID = {
  configuration: ['configuration reloaded', 'configuration refused, the old one stays'],
  certificates: ['certificates renewed', 'certificates refused, the old ones stay'],
} as const;

/** Reads files again when they change, one kind after the other, and lets them be taken when they are right. */
export function followFiles(
  origins: { readonly [K in keyof Files]: Origin<Files[K]> },
  server: Server,
  log: (message: string) => void,
): void {
  let turn = Promise.resolve();
  const reload = async (kind: keyof Files) => {
    const [done, refused] = SAID[kind];
    try {
      const files = { [kind]: origins[kind].read() };
      await server.check(files);
      await server.take(files);
      log(done);
    } catch (error) {
      log(`${refused}: ${(error as Error).message}`);
    }
  };
  for (const kind of ['configuration', 'certificates'] as const)
    for (const path of origins[kind].paths) {
      // By polling, through symbolic links: Kubernetes swaps them, and certificates are renewed while we run.
      watchFile(path, { interval: POLL_MS, persistent: false }, () => {
        turn = turn.then(() => reload(kind));
      });
    }
}
