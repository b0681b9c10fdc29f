import assert from 'node:assert/strict';
import { execFile } from 'node:child_process';
import { isAbsolute } from 'node:path';
import { describe, it } from 'node:test';
import { fileURLToPath } from 'node:url';

const ROOT = fileURLToPath(new URL('../../', import.meta.url));
const TSC = fileURLToPath(import.meta.resolve('typescript/lib/tsc.js'));

/** Which packages must supply the types of Node and of its built-in fetch; any other would hide a mistake. */
const LINES = {
  node22: ['types-node-22', 'types-node-22/node_modules/undici-types'],
  node24: ['@types/node', 'undici-types'],
  node26: ['types-node-26', 'types-node-26/node_modules/undici-types'],
  dom: ['@types/node', 'undici-types'],
};

describe('the package compiles without a cast', { concurrency: true }, () => {
  for (const [line, packages] of Object.entries(LINES)) {
    it(`with the types of ${line}`, async () => {
      const { code, output } = await run([TSC, '-p', `test/types/${line}`, '--pretty', 'false', '--listFiles']);
      const lines = output.split('\n');
      const errors = lines.filter((text) => text !== '' && !(isAbsolute(text) && text.endsWith('.ts')));
      assert.deepEqual({ code, errors }, { code: 0, errors: [] });
      const used = new Set(lines.map(packageOf).filter((name) => name !== undefined));
      assert.deepEqual([...used].sort(), packages);
    });
  }
});

/** The package of Node's or undici's types that a file is in. */
function packageOf(file: string): string | undefined {
  return /\/node_modules\/((?:types-node-\d+|@types\/node|undici-types)(?:\/node_modules\/undici-types)?)\//.exec(
    file,
  )?.[1];
}

function run(args: readonly string[]): Promise<{ code: unknown; output: string }> {
  return new Promise((resolve) => {
    execFile(process.execPath, args, { cwd: ROOT, maxBuffer: 16 * 1024 * 1024 }, (error, stdout, stderr) => {
      resolve({ code: error === null ? 0 : (error.code ?? error.signal), output: stdout + stderr });
    });
  });
}
