import assert from 'node:assert/strict';
import { setTimeout as sleep } from 'node:timers/promises';

const COUNTED = /^(?:TCPSocketWrap|TLSWrap|TCPServerWrap|TCPConnectWrap|Timeout|Immediate|GetAddrInfoReqWrap)$/;

function resources(): Record<string, number> {
  const counts: Record<string, number> = {};
  for (const kind of process.getActiveResourcesInfo()) {
    if (COUNTED.test(kind)) counts[kind] = (counts[kind] ?? 0) + 1;
  }
  return counts;
}

/** Counts what keeps the process alive; the function it returns asserts that nothing was added since. */
export function trackLeaks(): () => Promise<void> {
  const before = resources();
  return async () => {
    let left: [string, number][] = [];
    // Closing takes a few turns of the loop, and a loaded machine more; a leak stays however long we look.
    for (let attempt = 0; attempt < 50; attempt += 1) {
      left = Object.entries(resources()).filter(([kind, count]) => count > (before[kind] ?? 0));
      if (left.length === 0) return;
      await sleep(20);
    }
    assert.deepEqual(left, [], 'resources were left behind');
  };
}
