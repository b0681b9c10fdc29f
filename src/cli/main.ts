#!/usr/bin/env node
/** As `engines` of package.json says. */
const NEEDED = [22, 19] as const;

const [major = 0, minor = 0] = process.versions.node.split('.').map(Number);
if (major > NEEDED[0] || (major === NEEDED[0] && minor >= NEEDED[1])) {
  // Only now: an older Node cannot load what this imports, and would say so in a page of stack.
  const { run } = await import('./run.ts');
  process.exitCode = await run(process.argv.slice(2));
} else {
  console.error(`kedge-dialer: needs Node.js ${NEEDED.join('.')} or later; this is ${process.versions.node}`);
  process.exitCode = 2;
}

export {};
