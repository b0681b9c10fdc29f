/** Faults against guarantees: `npm run chaos [-- --only <words>] [--minutes <n>] [--seed <n>] [--short] [--json]`. */
import { parseArgs } from 'node:util';
import { header, table } from './report.ts';
import { type Row, runScenario } from './run.ts';
import { scenarios } from './scenarios/index.ts';
import { Secrets } from './secrets.ts';

const FULL_MINUTES = 10;
const SHORT_MINUTES = 0.5;

const { values } = parseArgs({
  options: {
    only: { type: 'string', default: '' },
    minutes: { type: 'string' },
    seed: { type: 'string', default: '1' },
    short: { type: 'boolean', default: false },
    json: { type: 'boolean', default: false },
  },
});
const minutes = Number(values.minutes ?? (values.short ? SHORT_MINUTES : FULL_MINUTES));
const seed = Number(values.seed);
const chosen = scenarios.filter(({ name }) => name.toLowerCase().includes(values.only.toLowerCase()));
if (!(minutes > 0) || !Number.isInteger(seed) || chosen.length === 0) {
  console.error('chaos: --minutes is a number above 0, --seed a whole number, and --only a part of these names:');
  for (const { name } of scenarios) console.error(`  ${name}`);
  process.exit(2);
}

const secrets = new Secrets();
secrets.watch();
const rows: Row[] = [];
for (const scenario of chosen) {
  const row = await runScenario(scenario, { seed, scale: minutes / FULL_MINUTES, secrets });
  rows.push(row);
  console.error(`${row.violations.length === 0 ? 'ok' : 'VIOLATION'}  ${row.scenario} (${row.seconds.toFixed(1)} s)`);
  for (const violation of row.violations) console.error(`    ${violation}`);
}
if (values.json) console.log(JSON.stringify({ node: process.version, seed, minutes, rows }, null, 2));
else console.log(`\n${header(seed)}\n\n${table(rows)}`);
// The table itself is searched as well.
secrets.unwatch();
const broken = rows.filter(({ violations }) => violations.length > 0).length;
if (broken > 0 || secrets.leaks.length > 0) console.error(`\n${broken} of ${rows.length} scenarios are violated`);
process.exit(broken > 0 || secrets.leaks.length > 0 ? 1 : 0);
