import assert from 'node:assert/strict';
import { execFile } from 'node:child_process';
import { describe, it } from 'node:test';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';
import { INTRINSICS } from './helpers/intrinsics.ts';
import { nodeExecutable } from './helpers/process.ts';

const DIST = new URL('../dist/', import.meta.url);
const ENTRIES = ['index.js', 'grpc/index.js', 'connect/index.js', 'spiffe/index.js'];
const MESSAGE = /^kedge-dialer: needs Node\.js 22\.19 or later; this is 20\.\d+\.\d+$/;

/** Of `KEDGE_TEST_OLD_NODE`, or what npx fetches: a Node that is not there is a failure, not a reason to pass. */
const node20 = () => process.env['KEDGE_TEST_OLD_NODE'] ?? nodeExecutable(20);

async function run(args: readonly string[]): Promise<{ code: unknown; stdout: string; stderr: string }> {
  const env = { ...process.env, NODE_OPTIONS: '' };
  try {
    return { code: 0, ...(await promisify(execFile)(await node20(), args, { env })) };
  } catch (error) {
    return error as { code: unknown; stdout: string; stderr: string };
  }
}

describe('on a Node.js that is too old', () => {
  it('the command line says so in one line, and fails', async () => {
    const { code, stdout, stderr } = await run([fileURLToPath(new URL('cli/main.js', DIST)), '--help']);
    assert.deepEqual({ code, stdout }, { code: 2, stdout: '' }, stderr);
    assert.match(stderr.replace(/\n$/, ''), MESSAGE);
  });

  it('every entry point says so when it is imported or required, and leaves every intrinsic as it was', async () => {
    const attempts = ENTRIES.map((entry) => new URL(entry, DIST).href);
    const code = `
      import { createRequire } from 'node:module';
      ${INTRINSICS}
      const require = createRequire(import.meta.url);
      const before = snapshot();
      const said = [];
      for (const entry of ${JSON.stringify(attempts)}) {
        said.push(await import(entry).then(() => 'imported', (error) => error.message));
        try { require(new URL(entry).pathname); said.push('required'); } catch (error) { said.push(error.message); }
      }
      const keys = [1, 2].map((n) => Symbol.for('undici.globalDispatcher.' + n));
      console.log(JSON.stringify({ said, changed: changed(before), left: keys.filter((key) => key in globalThis).length }));
    `;
    const { stdout, stderr } = await run(['--input-type=module', '-e', code]);
    const { said, changed, left } = JSON.parse(stdout || '{}') as { said: string[]; changed: string[]; left: number };
    assert.equal(said?.length, 2 * ENTRIES.length, stderr);
    for (const [i, each] of said.entries()) assert.match(each, MESSAGE, ENTRIES[Math.floor(i / 2)]);
    assert.deepEqual({ changed, left }, { changed: [], left: 0 });
  });
});
