import { mkdtemp, realpath, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import type { TestContext } from 'node:test';

/** Makes an empty directory that is gone when the test is over; its path has no symbolic link in it. */
export async function tempDir(t: TestContext): Promise<string> {
  const path = await mkdtemp(join(await realpath(tmpdir()), 'kedge-dialer-'));
  t.after(() => rm(path, { recursive: true, force: true, maxRetries: 3 }));
  return path;
}
