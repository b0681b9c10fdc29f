import type { Dispatcher } from './undici.ts';

/**
 * undici 8's `Dispatcher`, in a type that is the `Dispatcher` of undici 6 and 7 as well: `fetch(url, { dispatcher })`
 * compiles with `@types/node` 22, 24 and 26, which bring one each. At run time it takes the handlers of all of them.
 */
export interface KedgeDispatcher extends AnyDispatcher {}

type AnyDispatcher = OtherVersions & Dispatcher;

/**
 * One more overload of the methods whose types differ between versions: nobody can call it, and TypeScript, which
 * compares the parameters of methods in both directions, finds it assignable to all of them. It comes first because
 * error messages and `Parameters<>` go by the last overload.
 */
type OtherVersions = Record<
  | ('compose' | 'connect' | 'dispatch' | 'pipeline' | 'request' | 'stream' | 'upgrade')
  | ('addListener' | 'off' | 'on' | 'once' | 'prependListener' | 'prependOnceListener' | 'removeListener')
  | ('emit' | 'listeners' | 'rawListeners'),
  (...args: never) => never
>;
