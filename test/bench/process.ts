import { spawnSync } from 'node:child_process';
import { pathToFileURL } from 'node:url';
import type { Bench } from './bench.ts';
import { spread } from './measure.ts';

const ROUNDS = 9;
const REQUESTS = 1_000_000;
const TARGETS = 10_000;
const MIB = 1024 * 1024;

/** What the package costs a process: to import, and to keep. */
export async function processRows({ server, dial, fact }: Bench): Promise<void> {
  for (const [entry, rival] of [
    ['dist/index.js', 'undici'],
    ['dist/grpc/index.js', '@grpc/grpc-js'],
    ['dist/connectrpc/index.js', '@connectrpc/connect'],
  ] as const) {
    await fact(`import of ${entry}`, rival, async () => {
      const ours: number[] = [];
      const theirs: number[] = [];
      for (let i = 0; i < ROUNDS; i += 1) {
        ours.push(importMs(pathToFileURL(entry).href));
        theirs.push(importMs(rival));
      }
      return `${spread(ours).median.toFixed(0)} against ${spread(theirs).median.toFixed(0)} ms`;
    });
  }

  await fact(`memory after ${TARGETS} targets`, 'RSS', async () => {
    const dialer = dial(server.httpPort);
    await (await dialer.fetch('http://warm.us1/')).text();
    globalThis.gc?.();
    const before = process.memoryUsage().rss;
    for (let i = 0; i < TARGETS; i += 1) dialer.explain(`http://svc${i}.us1:8080`);
    const grown = (process.memoryUsage().rss - before) / MIB;
    await dialer.close();
    return `${grown.toFixed(1)} MiB more`;
  });

  await fact('memory after 1 M requests', 'RSS after 100,000', async () => {
    const dialer = dial(server.httpPort);
    const { dispatcher } = dialer;
    let left = REQUESTS;
    let early = 0;
    const worker = async () => {
      while (left > 0) {
        left -= 1;
        if (left === REQUESTS * 0.9) early = process.memoryUsage().rss;
        const { body } = await dispatcher.request({ origin: 'http://svc.us1:8080', path: '/', method: 'GET' });
        await body.dump();
      }
    };
    await Promise.all(Array.from({ length: 100 }, worker));
    const late = process.memoryUsage().rss;
    await dialer.close();
    return `${(late / MIB).toFixed(0)} against ${(early / MIB).toFixed(0)} MiB`;
  });
}

function importMs(specifier: string): number {
  const code = `const t = performance.now(); await import(${JSON.stringify(specifier)}); console.log(performance.now() - t);`;
  const { stdout, stderr } = spawnSync(process.execPath, ['--input-type=module', '-e', code], { encoding: 'utf8' });
  if (stdout === '') throw new Error(stderr);
  return Number(stdout);
}
