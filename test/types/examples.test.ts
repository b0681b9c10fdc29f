import assert from 'node:assert/strict';
import { execFile } from 'node:child_process';
import { globSync, mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, it } from 'node:test';
import { fileURLToPath } from 'node:url';
import * as connect from '../../src/connect/index.ts';
import * as grpc from '../../src/grpc/index.ts';
import * as main from '../../src/index.ts';
import * as spiffe from '../../src/spiffe/index.ts';

const ROOT = fileURLToPath(new URL('../../', import.meta.url));
const TSC = fileURLToPath(import.meta.resolve('typescript/lib/tsc.js'));
const GREETER = `import { Client, type ServiceError } from '@grpc/grpc-js';
export declare class GreeterClient extends Client {
  sayHello(request: { name: string }, callback: (error: ServiceError | null, reply?: { text: string }) => void): void;
}
`;

interface Example {
  /** The line of source that the docstring is of. */
  readonly of: string;
  readonly code: string;
}

const examples = globSync('src/**/*.ts', { cwd: ROOT })
  .sort()
  .flatMap((file) => examplesIn(readFileSync(join(ROOT, file), 'utf8')));

function examplesIn(source: string): Example[] {
  return [...source.matchAll(/^ *\/\*\*\n((?: *\*(?!\/).*\n)*) *\*\/\n(.*)/gm)].flatMap(([, doc, of]) => {
    const text = doc!.replace(/^ *\* ?/gm, '');
    return [...text.matchAll(/@example\n```ts\n([\s\S]*?)```/g)].map(([, code]) => ({ of: of!, code: code! }));
  });
}

describe('the examples in docstrings', () => {
  it('are there for every function that the package exports', () => {
    const functions = [main, grpc, connect, spiffe]
      .flatMap((entry) => Object.entries(entry))
      .filter(([name, value]) => typeof value === 'function' && /^[a-z]/.test(name))
      .map(([name]) => name);
    assert.ok(functions.length > 20, String(functions));
    const without = functions.filter((name) => {
      return !examples.some(({ of }) => new RegExp(`^export (?:async )?function ${name}\\b`).test(of));
    });
    assert.deepEqual(without, []);
  });

  it('compile against the package', async (t) => {
    // In the package, whose name means itself there; hidden, so that no other compilation finds it.
    const folder = mkdtempSync(join(ROOT, 'test/types/.examples-'));
    t.after(() => rmSync(folder, { recursive: true }));
    mkdirSync(join(folder, 'gen'));
    writeFileSync(join(folder, 'gen/greeter.ts'), GREETER);
    const files = examples.map(({ of, code }, i) => {
      const file = `${i}-${/(\w+)\(/.exec(of)?.[1]}.ts`;
      // A module, so that one may await, and no other sees its names.
      writeFileSync(join(folder, file), `${code}export {};\n`);
      return file;
    });
    const compilerOptions = { noUnusedLocals: false };
    writeFileSync(
      join(folder, 'tsconfig.json'),
      JSON.stringify({ extends: '../tsconfig.base.json', compilerOptions, files }),
    );
    const output = await new Promise<string>((resolve) => {
      execFile(process.execPath, [TSC, '-p', folder, '--pretty', 'false'], (error, stdout, stderr) => {
        resolve(error === null ? '' : stdout + stderr || error.message);
      });
    });
    assert.equal(output, '');
  });
});
