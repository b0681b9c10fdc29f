import { finished } from 'node:stream/promises';
import { setTimeout as sleep } from 'node:timers/promises';
import type { Dialer } from '../dialer.ts';
import { coreOf } from '../engine/core.ts';
import { kedgeErrorOf } from '../kedge-error-report.ts';
import { isKedgeError } from '../support/errors.ts';
import type { Wire } from '../target.ts';
import { type CheckStep, reach } from './check.ts';
import type { LoadPlan, Stage } from './load-options.ts';
import { type LoadReport, noTimes, reportOf, type Tally } from './load-report.ts';
import { originOf, rawClient } from './raw-calls.ts';

/** Makes one call; gives what went wrong, if something did. Never rejects. */
type Call = (onFirstByte: () => void) => Promise<string | undefined>;

const PROBE_INTERVAL_MS = 1000;
const MAX_FAILURES = 20;

/**
 * Calls the target by each dialer in turn, at the times that the rate says, whether or not earlier calls came back, and counts
 * from those times: an answer that keeps others waiting is seen in all of them. Once a second a new connection shows what
 * those cost. `signal` ends it early.
 */
export async function load(
  dialers: readonly Dialer[],
  target: string,
  wire: Wire,
  plan: LoadPlan,
  signal: AbortSignal,
): Promise<LoadReport> {
  const tally: Tally = {
    sent: 0,
    answered: 0,
    failures: new Map(),
    unanswered: 0,
    tookMs: 0,
    kedges: new Map(),
    all: noTimes(),
  };
  const lanes: { call: Call; probe(): Promise<void>; record(stage: Stage, ms: number): void }[] = [];
  for (const dialer of dialers) {
    const core = coreOf(dialer);
    const endpoints = core.resolve(wire, target).plan?.endpoints ?? [];
    const kedge = endpoints.map(({ address }) => address.name).join(', ') || 'direct';
    const times = tally.kedges.get(kedge) ?? noTimes();
    tally.kedges.set(kedge, times);
    const record = (stage: Stage, ms: number) => {
      if (tally.tookMs > 0) return;
      times[stage].record(ms);
      tally.all[stage].record(ms);
    };
    const probe = async () => {
      const steps: CheckStep[] = [];
      for (const endpoint of endpoints) await reach(core, endpoint, wire, steps);
      for (const { stage, ok, ms } of steps) if (ok && stage !== 'request') record(stage, ms);
    };
    const call = wire === 'grpc' ? await grpcCall(dialer, target, plan) : httpCall(dialer, target, plan);
    lanes.push({ call, probe, record });
  }

  const began = performance.now();
  const pending = new Set<Promise<void>>();
  const send = (intended: number) => {
    const { call, record } = lanes[tally.sent % lanes.length]!;
    tally.sent += 1;
    const done = call(() => record('first', performance.now() - intended)).then((failure) => {
      pending.delete(done);
      if (tally.tookMs > 0) return;
      record('total', performance.now() - intended);
      if (failure === undefined) tally.answered += 1;
      else count(tally.failures, failure);
    });
    pending.add(done);
  };
  const probes = repeat(() => Promise.all(lanes.map(({ probe }) => probe())), signal);
  const stopped = new Promise<void>((resolve) => signal.addEventListener('abort', () => resolve(), { once: true }));
  const all = Math.max(Math.round((plan.rate * plan.durationMs) / 1000), 1);
  const timeOf = (call: number) => began + (call * 1000) / plan.rate;
  while (tally.sent < all && !signal.aborted) {
    while (tally.sent < all && timeOf(tally.sent) <= performance.now()) send(timeOf(tally.sent));
    if (tally.sent < all) await Promise.race([sleep(Math.max(timeOf(tally.sent) - performance.now(), 0)), stopped]);
  }
  while (pending.size > 0 && !signal.aborted) await Promise.race([Promise.all(pending), stopped]);
  probes.stop();
  tally.unanswered = pending.size;
  tally.tookMs = Math.max(performance.now() - began, signal.aborted ? 1 : plan.durationMs);
  return reportOf(target, plan, tally);
}

/** What went wrong may have a different text each time. */
function count(failures: Map<string, number>, failure: string): void {
  const what = failures.has(failure) || failures.size < MAX_FAILURES ? failure : 'something else';
  failures.set(what, (failures.get(what) ?? 0) + 1);
}

/** At once and every second, one at a time. */
function repeat(probe: () => Promise<unknown>, signal: AbortSignal): { stop(): void } {
  let isStopped = false;
  const next = async () => {
    const wait = sleep(PROBE_INTERVAL_MS, undefined, { ref: false });
    await probe().catch(() => {});
    await wait;
    if (!isStopped && !signal.aborted) void next();
  };
  void next();
  return {
    stop: () => {
      isStopped = true;
    },
  };
}

function httpCall(dialer: Dialer, target: string, { method, path, body, timeoutMs }: LoadPlan): Call {
  const origin = originOf(target);
  return async (onFirstByte) => {
    const signal = AbortSignal.timeout(timeoutMs);
    try {
      const options = { origin, path, method, body: body ?? null, signal };
      const answer = await dialer.dispatcher.request(options as never);
      onFirstByte();
      await finished(answer.body.resume());
      if (answer.statusCode < 400) return undefined;
      return kedgeErrorOf(answer as never)?.message ?? `status ${answer.statusCode}`;
    } catch (error) {
      return signal.aborted ? `no answer within ${timeoutMs} ms` : labelOf(error);
    }
  };
}

async function grpcCall(dialer: Dialer, target: string, { path, body, timeoutMs }: LoadPlan): Promise<Call> {
  const { grpc, call } = await rawClient(dialer, target);
  const message = body ?? Buffer.alloc(0);
  return (onFirstByte) =>
    new Promise((resolve) => {
      call(path, message, timeoutMs, (error) =>
        resolve(error === null ? undefined : `grpc ${grpc.status[error.code]}: ${error.details}`),
      ).on('metadata', onFirstByte);
    });
}

function labelOf(error: unknown): string {
  if (isKedgeError(error)) return `${error.code}: ${error.message}`;
  return String(error instanceof Error ? error.message : error);
}
