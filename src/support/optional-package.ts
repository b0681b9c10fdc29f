/** Loads an optional peer when it is first needed, and says what to install where it is missing. */
export async function loadOptional<T>(
  name: string,
  load: () => Promise<T>,
  refusal: (reason: string) => Error,
): Promise<T> {
  try {
    return await load();
  } catch (cause) {
    if ((cause as NodeJS.ErrnoException).code !== 'ERR_MODULE_NOT_FOUND') throw cause;
    throw refusal(`needs the package ${name}: npm install ${name}`);
  }
}
