/**
 * Runs all tests, and searches what they print, and what the programs print that they run, for what must never be printed:
 * keys, and the tokens and secrets that the tests use.
 */
import { spawn } from 'node:child_process';

const SECRETS =
  /-----BEGIN [A-Z ]*PRIVATE KEY-----|canary-[a-z-]+|top-secret|proxy-secret|backend-secret|client-secret/g;

const LIMIT_MS = 40 * 60_000;

// Much of a test is waiting; Node's own choice on two cores is one file after the other.
const args = ['--test', '--test-concurrency=2', '--test-reporter=spec', ...process.argv.slice(2)];
const child = spawn(process.execPath, args, { stdio: ['inherit', 'pipe', 'pipe'] });
// The runner waits for ever for a file whose process does not end; so told, it ends and names the file.
const limit = setTimeout(() => child.kill(), LIMIT_MS);
const found = new Set<string>();
let bytes = 0;
for (const [stream, out] of [
  [child.stdout, process.stdout],
  [child.stderr, process.stderr],
] as const) {
  let tail = '';
  stream.setEncoding('utf8').on('data', (text: string) => {
    bytes += text.length;
    for (const [secret] of (tail + text).matchAll(SECRETS)) found.add(secret);
    tail = (tail + text).slice(-100);
    out.write(text);
  });
}
child.on('close', (code) => {
  clearTimeout(limit);
  for (const secret of found) console.error(`printed, and should never be: ${secret}`);
  console.log(`${bytes} bytes of output searched for tokens and keys: ${found.size} found`);
  process.exitCode = code === 0 && found.size === 0 ? 0 : 1;
});
