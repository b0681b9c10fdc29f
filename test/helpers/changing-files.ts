/**
 * Uses files that another process would change, and says what it has: run by test/identity/files.test.ts in a process of its
 * own, because what is tried here can stop a process. `dir` has `tls.crt`, `tls.key`, `token`, and the same again as `next.*`.
 */
import { execFileSync } from 'node:child_process';
import { closeSync, openSync, renameSync } from 'node:fs';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { fileToken, pemFiles } from '../../src/index.ts';

const [what, dir] = process.argv.slice(2) as [string, string];
const at = (name: string) => join(dir, name);
let warnings = 0;
const identity = pemFiles({
  cert: at('tls.crt'),
  key: at('tls.key'),
  onWarning: () => {
    warnings += 1;
  },
});
const source = fileToken(at('token'));
identity.subscribe(() => {});
const seen = () => ({ serial: identity.current().serial, token: source.peek(), warnings });
const replace = () => {
  for (const name of ['tls.crt', 'tls.key', 'token']) renameSync(at(`next.${name}`), at(name));
};

const tries: Record<string, () => Promise<void>> = {
  'no descriptors': async () => {
    const descriptors: number[] = [];
    try {
      for (;;) descriptors.push(openSync('/dev/null', 'r'));
    } catch {
      // None is left.
    }
    replace();
    await sleep(1200);
    for (const each of descriptors) closeSync(each);
  },
  FIFOs: async () => {
    for (const name of ['tls.crt', 'token']) {
      execFileSync('mkfifo', [at('fifo')]);
      renameSync(at('fifo'), at(name));
    }
    await sleep(1700);
    during = seen();
    replace();
  },
};
let during: object | undefined;
const before = seen();
await tries[what]!();
await sleep(1200);
console.log(JSON.stringify({ before, during, after: seen() }));
// Nothing of it holds the process.
