import { inspect } from 'node:util';
import { type LoadPlan, STAGES, type Stage } from './load-options.ts';

const PERCENTILES = [50, 90, 99, 99.9] as const;

/** Times in buckets that are at most 0.8 % wide, as HdrHistogram has them; a percentile is never less than it was. */
export class Histogram {
  private readonly counts: number[] = [];
  count = 0;
  max = 0;

  record(ms: number): void {
    const us = Math.min(Math.max(Math.round(ms * 1000), 0), 2 ** 31 - 1);
    const shift = Math.max(24 - Math.clz32(us), 0);
    const bucket = shift * 128 + (us >>> shift);
    this.counts[bucket] = (this.counts[bucket] ?? 0) + 1;
    this.count += 1;
    this.max = Math.max(this.max, ms);
  }

  /** In ms; NaN of nothing. */
  percentile(percent: number): number {
    let left = Math.ceil((this.count * percent) / 100);
    if (this.count === 0) return Number.NaN;
    for (const [bucket, count = 0] of this.counts.entries()) {
      left -= count;
      if (left > 0 || count === 0) continue;
      const shift = Math.max(Math.floor(bucket / 128) - 1, 0);
      return Math.min(((bucket - shift * 128 + 1) * 2 ** shift - 1) / 1000, this.max);
    }
    return this.max;
  }

  toJSON(): Record<string, number> {
    const percentiles = PERCENTILES.map((each) => [`p${each}`, this.percentile(each)]);
    return { count: this.count, ...Object.fromEntries(percentiles), max: this.max };
  }
}

export type Times = Record<Stage, Histogram>;

export const noTimes = (): Times => Object.fromEntries(STAGES.map((stage) => [stage, new Histogram()])) as Times;

/** What happened, as it is counted. */
export interface Tally {
  sent: number;
  answered: number;
  /** By what went wrong: an error code, a status. */
  readonly failures: Map<string, number>;
  /** What was still under way when it was stopped. */
  unanswered: number;
  tookMs: number;
  readonly kedges: Map<string, Times>;
  readonly all: Times;
}

/** What `load` prints. */
export interface LoadReport {
  ok: boolean;
  target: string;
  sent: number;
  answered: number;
  failed: number;
  unanswered: number;
  /** Answers a second. */
  rate: number;
  failures: Record<string, number>;
  kedges: Record<string, Times>;
  expectations: { text: string; ok: boolean; found: string }[];
}

export function reportOf(target: string, plan: LoadPlan, tally: Tally): LoadReport {
  const { sent, answered, unanswered, tookMs, all } = tally;
  const failed = [...tally.failures.values()].reduce((sum, each) => sum + each, 0);
  const rate = answered / (tookMs / 1000);
  const expectations = plan.expectations.map(({ text, stage, metric, holds, unit }) => {
    const value =
      metric === 'rate'
        ? rate
        : metric === 'errors'
          ? unit === '%'
            ? (failed / sent) * 100
            : failed
          : metric === 'max'
            ? all[stage].percentile(100)
            : all[stage].percentile(Number(metric.slice(1)));
    return { text, ok: holds(value), found: Number.isNaN(value) ? 'nothing' : `${round(value)}${unit}` };
  });
  const report: LoadReport = {
    ok: expectations.every(({ ok }) => ok),
    target,
    sent,
    answered,
    failed,
    unanswered,
    rate,
    failures: Object.fromEntries(tally.failures),
    kedges: Object.fromEntries(tally.kedges),
    expectations,
  };
  Object.defineProperty(report, inspect.custom, { value: () => print(report, tookMs) });
  return report;
}

function print(report: LoadReport, tookMs: number): string {
  const { target, sent, answered, failed, unanswered, rate, failures, kedges, expectations } = report;
  const row = (name: string, cells: readonly string[]) =>
    `  ${name.padEnd(12)}${cells.map((each) => each.padStart(10)).join('')}`;
  const lines = [
    `${target}: ${sent} calls in ${round(tookMs / 1000)} s, ${answered} answered (${round(rate)}/s), ${failed} failed` +
      (unanswered > 0 ? `, ${unanswered} under way` : ''),
    row('ms', ['count', ...PERCENTILES.map((each) => `p${each}`), 'max']),
  ];
  for (const [kedge, times] of Object.entries(kedges)) {
    lines.push(kedge);
    for (const stage of STAGES) {
      const { count, ...ms } = times[stage].toJSON();
      if (count! > 0)
        lines.push(row(stage, [String(count), ...Object.values(ms).map((each) => round(each).toFixed(2))]));
    }
  }
  for (const [what, count] of Object.entries(failures)) lines.push(`  ${String(count).padStart(8)} x ${what}`);
  for (const { text, ok, found } of expectations) lines.push(`${ok ? 'ok  ' : 'FAIL'} ${text}: ${found}`);
  return lines.join('\n');
}

function round(value: number): number {
  return Math.round(value * 100) / 100;
}
