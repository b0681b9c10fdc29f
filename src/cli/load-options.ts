import { readFileSync } from 'node:fs';
import type { parseArgs } from 'node:util';
import { check, is, whole } from '../support/shape.ts';
import { MAX_INT32 } from '../support/timer.ts';

/** What is asked of the result: `p99<50ms`, `tls.p90<=20ms`, `errors<0.1%`, `errors<=3`, `rate>95`. */
export interface Expectation {
  readonly text: string;
  readonly stage: Stage;
  readonly metric: string;
  readonly holds: (value: number) => boolean;
  /** What a number is: ms, a share of the calls, or how many. */
  readonly unit: '' | 'ms' | '%';
}

export const STAGES = ['dns', 'tcp', 'proxy', 'tls', 'first', 'total'] as const;
export type Stage = (typeof STAGES)[number];

export interface LoadPlan {
  /** Calls a second. */
  readonly rate: number;
  readonly durationMs: number;
  /** A call that takes longer has failed. */
  readonly timeoutMs: number;
  /** Undefined over gRPC. */
  readonly method: string | undefined;
  /** Of HTTP, or `/package.Service/Method`. */
  readonly path: string;
  readonly body: Buffer | undefined;
  readonly expectations: readonly Expectation[];
}

const text = { type: 'string' } as const;
/** In place of `--grpc` without a value, and besides those of the other commands. */
export const LOAD_OPTIONS = {
  grpc: text,
  rate: text,
  duration: text,
  timeout: text,
  expect: { type: 'string', multiple: true },
  method: text,
  data: text,
  'data-file': text,
} as const;

type Values = ReturnType<typeof parseArgs<{ options: typeof LOAD_OPTIONS & { path: typeof text } }>>['values'];

const MS: Readonly<Record<string, number>> = { ms: 1, s: 1000, m: 60_000 };
const EXPECTATION = new RegExp(
  `^(?:(${STAGES.join('|')})\\.)?(p[0-9]{1,2}(?:\\.[0-9]+)?|p999|max|errors|rate)\\s*(<=?|>=?)\\s*([0-9]+(?:\\.[0-9]+)?)(ms|s|%)?$`,
);
const HOLDS: Readonly<Record<string, (value: number, limit: number) => boolean>> = {
  '<': (value, limit) => value < limit,
  '<=': (value, limit) => value <= limit,
  '>': (value, limit) => value > limit,
  '>=': (value, limit) => value >= limit,
};

/** Throws a `KedgeError` that names the option that is wrong. */
export function loadPlan(values: Values): LoadPlan {
  const option = <T>(name: keyof Values, read: Parameters<typeof check<T>>[1], value: unknown) =>
    check('load', read, value, { path: `--${name}` });
  const isTime = (value: unknown): value is number => Number(value) >= 1 && Number(value) <= MAX_INT32;
  const time = is('a time such as 500ms, 30s or 5m', isTime);
  const expected = is('like p99<50ms, tls.p90<20ms, errors<0.1% or rate>95', isExpectation);
  const { grpc, data, 'data-file': file, method, path } = values;
  if (grpc !== undefined) {
    const isMethod = (value: unknown): value is string => /^\/?[\w.]+\/\w+$/.test(String(value));
    option('grpc', is('package.Service/Method', isMethod), grpc);
    const none = is('for HTTP alone', (value): value is undefined => value === undefined);
    for (const name of ['method', 'path'] as const) option(name, none, values[name]);
  }
  option('data', is('hexadecimal, and not with --data-file', isData(file)), data);
  const body = file !== undefined ? readFileSync(file) : data === undefined ? undefined : Buffer.from(data, 'hex');
  return {
    rate: option('rate', whole(1, 100_000, 'calls a second'), Number(values.rate ?? 10)),
    durationMs: option('duration', time, msOf(values.duration ?? '10s')),
    timeoutMs: option('timeout', time, msOf(values.timeout ?? '10s')),
    method: grpc !== undefined ? undefined : (method ?? (body === undefined ? 'GET' : 'POST')).toUpperCase(),
    path: grpc !== undefined ? `/${grpc.replace(/^\//, '')}` : (path ?? '/'),
    body,
    expectations: (values.expect ?? [])
      .flatMap((each) => each.split(','))
      .map((each) => expectationOf(option('expect', expected, each.trim()))),
  };
}

function expectationOf(text: string): Expectation {
  const [, stage = 'total', metric = '', relation = '', limit, unit = ''] = EXPECTATION.exec(text)!;
  const isTime = /^(?:p|max)/.test(metric);
  return {
    text,
    stage: stage as Stage,
    metric: metric === 'p999' ? 'p99.9' : metric,
    unit: isTime ? 'ms' : (unit as '' | '%'),
    holds: (value: number) => HOLDS[relation]!(value, Number(limit) * (isTime ? MS[unit]! : 1)),
  };
}

/** Whether the unit fits what it is a number of. */
function isExpectation(value: unknown): value is string {
  const [, stage, metric, , , unit] = EXPECTATION.exec(String(value)) ?? [];
  if (metric === undefined) return false;
  if (/^(?:p|max)/.test(metric)) return unit === 'ms' || unit === 's';
  return stage === undefined && (unit === undefined || (metric === 'errors' && unit === '%'));
}

const isData =
  (file: string | undefined) =>
  (value: unknown): value is string | undefined =>
    value === undefined || (file === undefined && /^(?:[0-9a-f]{2})*$/i.test(String(value)));

function msOf(value: string): number {
  const [, number, unit = 's'] = /^([0-9]+(?:\.[0-9]+)?)(ms|s|m)?$/.exec(value) ?? [];
  return Math.ceil(Number(number) * MS[unit]!);
}
