#!/usr/bin/env node
import { unfitNode } from '../support/node-version.ts';

// All has been written by then. Node's own clean-up spins for ever where TLS has lost the end of a write
// (https://github.com/nodejs/node/issues/61304), which kedges that are down make it do.
process.once('exit', (code) => process.exit(code));

const unfit = unfitNode();
if (unfit === undefined) {
  // Only now: an older Node.js cannot load what this imports.
  const { run } = await import('./run.ts');
  process.exitCode = await run(process.argv.slice(2));
} else {
  console.error(unfit);
  process.exitCode = 2;
}
