#!/usr/bin/env node
import { unfitNode } from '../support/node-version.ts';

const unfit = unfitNode();
if (unfit === undefined) {
  // Only now: an older Node.js cannot load what this imports.
  const { run } = await import('./run.ts');
  process.exitCode = await run(process.argv.slice(2));
} else {
  console.error(unfit);
  process.exitCode = 2;
}
