import type { Dispatcher } from './undici.ts';

/** A last overload that no call selects; it makes a method assignable to the same method in other versions' types. */
type OfAnyVersion = (...args: never[]) => never;

type AcrossVersions<T> = {
  readonly [M in keyof T]: T[M] extends (...args: never[]) => unknown ? T[M] & OfAnyVersion : T[M];
};

/**
 * undici's `Dispatcher`, in a type that is assignable to the `Dispatcher` of undici 8 and of the `undici-types` 6, 7 and 8
 * that `@types/node` 22, 24 and 26 bring: `fetch(url, { dispatcher })` compiles with each of them. At run time it
 * takes the handlers of all of them.
 */
export interface KedgeDispatcher extends AcrossVersions<Dispatcher> {}
