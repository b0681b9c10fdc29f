/**
 * What the dialer costs, against what it could be replaced by, in one run:
 * `npm run bench [-- --only <words>] [--json] [--against <file>]`.
 */
import { readFileSync } from 'node:fs';
import os from 'node:os';
import { parseArgs } from 'node:util';
import { type Bench, startBench } from './bench.ts';
import { connections } from './connections.ts';
import { gateways } from './gateway.ts';
import { grpcRows } from './grpc.ts';
import { httpRows } from './http.ts';
import { lookups } from './lookups.ts';
import type { Row } from './measure.ts';
import { processRows } from './process.ts';
import { sidecars } from './sidecars.ts';

const { values } = parseArgs({
  options: {
    only: { type: 'string', default: '' },
    json: { type: 'boolean', default: false },
    against: { type: 'string' },
  },
});

const PARTS: ((bench: Bench) => Promise<void>)[] = [
  httpRows,
  grpcRows,
  connections,
  lookups,
  sidecars,
  gateways,
  processRows,
];

const bench = await startBench(values.only);
for (const part of PARTS) await part(bench);
bench.stop();

if (values.json)
  console.log(JSON.stringify({ node: process.version, cpus: os.cpus().length, rows: bench.rows }, null, 2));
else print(bench.rows, values.against === undefined ? [] : baseline(values.against));

/** The rows that an earlier run saved with `--json`. */
function baseline(file: string): Row[] {
  return (JSON.parse(readFileSync(file, 'utf8')) as { rows: Row[] }).rows;
}

function print(rows: readonly Row[], before: readonly Row[]): void {
  const table = rows.map(({ name, rival, comparison, value }) => {
    const old = before.find((row) => row.name === name && row.rival === rival);
    const then = old === undefined ? [] : [old.comparison?.ratio.median.toFixed(2) ?? old.value ?? ''];
    if (comparison === undefined) return [name, rival, value!, '', '', '', ...then];
    const { ours, theirs, ratio } = comparison;
    return [
      name,
      rival,
      `${ratio.median.toFixed(2)} (${ratio.min.toFixed(2)}-${ratio.max.toFixed(2)})`,
      ours.perSecond.toFixed(0),
      theirs.perSecond.toFixed(0),
      `${ours.cpuMicros.toFixed(0)} / ${theirs.cpuMicros.toFixed(0)}`,
      ...then,
    ];
  });
  const head = ['row', 'against', 'ratio, median (min-max)', 'ours/s', 'theirs/s', 'CPU us a call'];
  if (before.length > 0) head.push('before');
  console.log(
    `Node ${process.version}, ${os.cpus().length} x ${os.cpus()[0]?.model}, ${new Date().toISOString().slice(0, 10)}\n`,
  );
  for (const line of [head, head.map(() => '---'), ...table]) console.log(`| ${line.join(' | ')} |`);
}
