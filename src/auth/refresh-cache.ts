import { randomUUID } from 'node:crypto';
import { mkdir, readFile, rename, rm, writeFile } from 'node:fs/promises';
import { dirname } from 'node:path';
import { debug } from '../debug.ts';

const OWNER_ONLY = 0o600;

/** What an earlier process left; a file that is missing or cannot be used is none. */
export async function readRefreshToken(file: string): Promise<string | undefined> {
  try {
    const { refresh_token: token } = JSON.parse(await readFile(file, 'utf8')) as { refresh_token?: unknown };
    return typeof token === 'string' && token !== '' ? token : undefined;
  } catch (error) {
    debug.auth('no refresh token in %s (%s)', file, (error as NodeJS.ErrnoException).code);
    return undefined;
  }
}

/** Replaces the file in one step, so that whoever reads meets the old or the new one; nobody else may read it. */
export async function writeRefreshToken(file: string, token: string): Promise<void> {
  await mkdir(dirname(file), { recursive: true, mode: 0o700 });
  const next = `${file}.${randomUUID()}`;
  try {
    await writeFile(next, JSON.stringify({ refresh_token: token }), { mode: OWNER_ONLY, flag: 'wx' });
    await rename(next, file);
  } catch (error) {
    await rm(next, { force: true });
    // The token itself is fine; the next process has to log in again.
    debug.auth('the refresh token is not kept in %s (%s)', file, (error as NodeJS.ErrnoException).code);
  }
}
