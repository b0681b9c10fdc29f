import os from 'node:os';
import type { Row } from './run.ts';

export function header(seed: number): string {
  const cpu = `${os.cpus().length} x ${os.cpus()[0]?.model}`;
  return `Node ${process.version}, ${cpu}, ${new Date().toISOString().slice(0, 10)}, seed ${seed}`;
}

export function table(rows: readonly Row[]): string {
  const head = ['scenario', 'calls', 'failed', 'duplicated', 'cross-wired', 'slowest recovery ms', 'result', 'notes'];
  const lines = rows.map((row) => [
    row.scenario,
    row.calls,
    row.failed,
    row.duplicated,
    row.crossed,
    row.recoveryMs,
    row.violations.length === 0 ? 'ok' : 'VIOLATION',
    row.notes.join('; '),
  ]);
  return [head, head.map(() => '---'), ...lines].map((line) => `| ${line.join(' | ')} |`).join('\n');
}
