import assert from 'node:assert/strict';
import type { TestContext } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';

const COUNTED =
  /^(?:TCPSocketWrap|TLSWrap|TCPServerWrap|TCPConnectWrap|PipeWrap|ProcessWrap|FSEventWrap|StatWatcher|Timeout|Immediate|GetAddrInfoReqWrap)$/;

function resources(): Record<string, number> {
  const counts: Record<string, number> = {};
  for (const kind of process.getActiveResourcesInfo()) {
    if (COUNTED.test(kind)) counts[kind] = (counts[kind] ?? 0) + 1;
  }
  return counts;
}

/**
 * Counts what keeps the process alive; the function it returns asserts that nothing was added since. Given the test's
 * context it asserts by itself when the test is over, after everything that the test tears down, so call it first.
 */
export function trackLeaks(t?: TestContext): () => Promise<void> {
  const before = resources();
  const check = async () => {
    let left: [string, number][] = [];
    // Closing takes a few turns of the loop, and a loaded machine more; a leak stays however long we look.
    for (let attempt = 0; attempt < 50; attempt += 1) {
      left = Object.entries(resources()).filter(([kind, count]) => count > (before[kind] ?? 0));
      if (left.length === 0) return;
      await sleep(20);
    }
    assert.deepEqual(left, [], 'resources were left behind');
  };
  // Hooks run in the order in which they were added: added by the first of them, the check comes after those of the test.
  t?.after(() => t.after(check));
  return check;
}
