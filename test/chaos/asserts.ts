import { isKedgeError, type KedgeErrorCode } from '../../src/index.ts';
import { type Call, isIdempotent, took } from './load.ts';
import type { World } from './world.ts';

/** The code of a failed call: on gRPC it is that of the cause. */
export function codeOf(call: Call): string {
  const { error } = call;
  if (isKedgeError(error)) return error.code;
  const { cause, code } = (error ?? {}) as { cause?: unknown; code?: unknown };
  if (isKedgeError(cause)) return cause.code;
  return call.status === undefined ? `${call.wire} ${code ?? error}` : `status ${call.status}`;
}

/** How many of which code, and which kinds of calls they were, such as `3 ERR_KEDGE_CONNECTION (h2 POST)`. */
export function tally(calls: readonly Call[]): string {
  const groups = Map.groupBy(calls, codeOf);
  const kinds = (group: readonly Call[]) => {
    const exact = new Set(group.map(({ wire, method }) => `${wire} ${method}`));
    return [...(exact.size > 3 ? new Set(group.map(({ wire }) => wire)) : exact)].join(', ');
  };
  return [...groups].map(([code, group]) => `${group.length} ${code} (${kinds(group)})`).join(', ');
}

export function failures(calls: readonly Call[]): Call[] {
  return calls.filter(({ ok }) => !ok);
}

/** No failure at all, or none of the calls that may be sent again: an answer that has begun is never begun anew. */
export function noneFailed(world: World, calls: readonly Call[], which: 'any' | 'idempotent' = 'any'): void {
  const failed = failures(calls).filter((call) => which === 'any' || (isIdempotent(call) && !call.begun));
  world.check(failed.length === 0, `${failed.length} calls failed: ${tally(failed)} (${failed[0]?.error})`);
}

/** Those that failed say what happened. */
export function typed(world: World, calls: readonly Call[], codes: readonly KedgeErrorCode[]): void {
  const other = failures(calls).filter((call) => !codes.includes(codeOf(call) as KedgeErrorCode));
  world.check(other.length === 0, `failures other than ${codes.join()}: ${tally(other)} (${other[0]?.error})`);
}

export function within(world: World, calls: readonly Call[], ms: number, what: string): void {
  const slow = calls.filter((call) => took(call) > ms);
  const most = Math.round(Math.max(0, ...slow.map(took)));
  world.check(
    slow.length === 0,
    `${what}: ${slow.length} of ${calls.length} calls took more than ${ms} ms, up to ${most} ms`,
  );
}

/** From `since` to the end of the first call that began later and went well, over each wire. */
export function recovery(world: World, calls: readonly Call[], since: number, ms: number): void {
  for (const wire of ['h1', 'h2', 'grpc'] as const) {
    const own = calls.filter((call) => call.wire === wire && call.startedAt >= since);
    if (own.length === 0) continue;
    const first = Math.min(...own.filter(({ ok }) => ok).map(({ endedAt }) => endedAt)) - since;
    world.recovered(first);
    world.check(first < ms, `${wire} recovered after ${Math.round(first)} ms, not ${ms} ms`);
  }
}
