import { randomUUID } from 'node:crypto';
import { mkdir, rename, rm, writeFile } from 'node:fs/promises';
import { dirname } from 'node:path';
import { readRegularFile } from '../read-file.ts';
import { debug } from '../support/debug.ts';

const OWNER_ONLY = 0o600;

/** What an earlier process left; a file that is missing or cannot be used is none. */
export function readRefreshToken(file: string): string | undefined {
  try {
    const { refresh_token: token } = JSON.parse(readRegularFile(file).toString('utf8')) as { refresh_token?: unknown };
    return typeof token === 'string' && token !== '' ? token : undefined;
  } catch (error) {
    debug.auth('no refresh token in %s (%s)', file, (error as NodeJS.ErrnoException).code);
    return undefined;
  }
}

/** Replaces the file in one step, so that whoever reads meets the old or the new one. Resolves with whether it could. */
export async function writeRefreshToken(file: string, token: string): Promise<boolean> {
  const next = `${file}.${randomUUID()}`;
  try {
    await mkdir(dirname(file), { recursive: true, mode: 0o700 });
    await writeFile(next, JSON.stringify({ refresh_token: token }), { mode: OWNER_ONLY, flag: 'wx' });
    await rename(next, file);
    return true;
  } catch (error) {
    await rm(next, { force: true }).catch(() => {});
    // The token itself is fine; the next process has to log in again.
    debug.auth('the refresh token is not kept in %s (%s)', file, (error as NodeJS.ErrnoException).code);
    return false;
  }
}
