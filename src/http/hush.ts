/**
 * Evaluated before undici. Importing undici 8 makes its own agent the process's global dispatcher, which moves an untouched
 * built-in fetch of Node 22 and 24 onto HTTP/1.1 and drops a dispatcher that was set before
 * (https://github.com/nodejs/undici/issues/5500). Importing this package must change nothing, so undici's attempt is refused
 * the way a frozen global object refuses it; undici then keeps that agent to itself as its default.
 * `setGlobalDispatcher()` works as ever afterwards.
 *
 * A module of its own, because imports are evaluated before the lines around them: a `try … finally` around undici would
 * need `require()`, which bundlers cannot follow, or a top-level `await`, which keeps CommonJS from requiring this package.
 */

/** Where undici 8 (Node 26) and undici 6 and 7 (Node 22, 24) look for the global dispatcher. */
export const GLOBAL_DISPATCHER = Symbol.for('undici.globalDispatcher.2');
export const LEGACY_GLOBAL_DISPATCHER = Symbol.for('undici.globalDispatcher.1');

const original = Object.defineProperty;

function refusing<T>(object: T, key: PropertyKey, descriptor: PropertyDescriptor & ThisType<unknown>): T {
  if ((object as unknown) === globalThis && (key === GLOBAL_DISPATCHER || key === LEGACY_GLOBAL_DISPATCHER)) {
    // After its first refusal undici does not try again.
    unhush();
    throw new TypeError('not while kedge-dialer loads undici');
  }
  return original(object, key, descriptor);
}

try {
  Object.defineProperty = refusing;
  // Where undici throws while it is evaluated, as on a Node that is too old, nothing after it runs but this.
  queueMicrotask(unhush);
} catch {
  // Frozen intrinsics: undici's side effect stands.
}

/** Ends the refusal; called as soon as undici is evaluated. */
export function unhush(): void {
  if (Object.defineProperty === refusing) Object.defineProperty = original;
}
