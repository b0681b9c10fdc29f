import assert from 'node:assert/strict';
import { setTimeout as sleep } from 'node:timers/promises';

/** Waits until something is so, for at most `timeoutMs`; fails with what it was otherwise. */
export async function until(what: string, isSo: () => boolean, timeoutMs = 3_000): Promise<void> {
  for (let i = 0; i < timeoutMs / 10 && !isSo(); i += 1) await sleep(10);
  assert.ok(isSo(), what);
}
