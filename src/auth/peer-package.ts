import { tokenError } from './token-source.ts';

/** Loads an optional peer when it is first needed, and says what to install where it is missing. */
export async function loadPeer<T>(source: string, name: string, load: () => Promise<T>): Promise<T> {
  try {
    return await load();
  } catch (cause) {
    if ((cause as NodeJS.ErrnoException).code !== 'ERR_MODULE_NOT_FOUND') throw cause;
    throw tokenError(source, `needs the package ${name}: npm install ${name}`);
  }
}
