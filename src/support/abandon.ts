/**
 * For what a function of the user's returned and we do not want: as a promise it may still reject, and nobody else would
 * hear that, which ends the process.
 */
export function abandon(value: unknown): void {
  if (value instanceof Promise) value.catch(() => {});
}
