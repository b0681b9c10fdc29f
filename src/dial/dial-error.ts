import type { KedgeError } from '../support/errors.ts';

const dialErrors = new WeakSet<object>();

/** Marks an error as that of a dial, which proves that nothing was sent: its code and stage alone do not. */
export function dialError(error: KedgeError): KedgeError {
  dialErrors.add(error);
  return error;
}

export function isDialError(error: unknown): boolean {
  return typeof error === 'object' && error !== null && dialErrors.has(error);
}

/** A cause as the end of a sentence. */
export function because(error: Error | undefined): string {
  if (error === undefined) return ': the connection was closed';
  // An AggregateError (one failure for each address tried) has no message of its own.
  const message =
    error instanceof AggregateError ? error.errors.map((each) => String(each?.message)).join('; ') : error.message;
  return `: ${message.trim().replace(/:$/, '')}`;
}
