import { closeSync, constants, fstatSync, openSync, readFileSync, type Stats, statSync } from 'node:fs';

/** No certificate, bundle, token or configuration is as large; what is was put there by mistake. */
const MAX_BYTES = 16 * 1024 * 1024;
/** Clocks of file systems tick: what is written within one tick leaves the same times. In ms. */
const TICK_MS = 100;

/** A file as it is found, without reading it. */
export interface FileState {
  /** Another one whenever the file behind the path is another, or was written; the error's code where there is none. */
  readonly version: string;
  /** Whether what is written from now on is sure to change {@link FileState.version}. */
  readonly settled: boolean;
}

/** Through symbolic links; a file that is replaced is another inode. */
export function lookAt(path: string): FileState {
  try {
    const { dev, ino, size, mtimeNs, ctimeNs } = statSync(path, { bigint: true });
    const age = Date.now() - Number(ctimeNs / 1_000_000n);
    return { version: `${dev} ${ino} ${size} ${mtimeNs} ${ctimeNs}`, settled: age > TICK_MS };
  } catch (error) {
    return { version: String((error as NodeJS.ErrnoException).code), settled: true };
  }
}

/**
 * What a file holds. Never waits for anybody: in place of a file there may be a FIFO or a device, whose reading would
 * hold the whole process until somebody writes.
 */
export function readRegularFile(path: string): Buffer {
  check(statSync(path));
  // Looked at twice: it may be another one by now, and to open a FIFO is to wait for its writer.
  const file = openSync(path, constants.O_RDONLY | (constants.O_NONBLOCK ?? 0));
  try {
    check(fstatSync(file));
    return readFileSync(file);
  } finally {
    closeSync(file);
  }
}

function check(found: Stats): void {
  const code = found.isDirectory()
    ? 'EISDIR'
    : !found.isFile()
      ? 'ERR_NOT_A_REGULAR_FILE'
      : found.size > MAX_BYTES
        ? 'EFBIG'
        : undefined;
  if (code !== undefined) throw Object.assign(new Error('not a regular file of a moderate size'), { code });
}
