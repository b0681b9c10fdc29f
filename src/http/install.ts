import type { DispatcherLike } from '../options.ts';
import { type Fallback, globalDispatchers } from './fallback.ts';
import { GLOBAL_DISPATCHER, LEGACY_GLOBAL_DISPATCHER } from './hush.ts';

/**
 * Makes `dispatcher` the global dispatcher of every undici in the process, built in or not; what was global becomes the
 * fallback for unmapped requests. Returns the undo, which restores each of the two only where it is still ours.
 *
 * undici's own `setGlobalDispatcher()` is not used: for Node 22 and 24 it installs a wrapper that allows HTTP/1.1 only.
 */
export function install(dispatcher: DispatcherLike, fallback: Fallback): () => void {
  if (fallback.replaced !== undefined) return () => {};
  fallback.replaced = globalDispatchers();
  const undos = [GLOBAL_DISPATCHER, LEGACY_GLOBAL_DISPATCHER].map((key) => replace(key, dispatcher));
  let undone = false;
  return () => {
    if (undone) return;
    undone = true;
    for (const undo of undos) undo();
    fallback.replaced = undefined;
  };
}

function replace(key: symbol, dispatcher: DispatcherLike): () => void {
  const globals = globalThis as unknown as Record<symbol, unknown>;
  const existed = key in globals;
  const previous = globals[key];
  // As undici defines it, but removable; where undici has defined it, only the value changes.
  if (existed) globals[key] = dispatcher;
  else
    Object.defineProperty(globals, key, { value: dispatcher, writable: true, enumerable: false, configurable: true });
  return () => {
    if (globals[key] !== dispatcher) return;
    if (!existed && Object.getOwnPropertyDescriptor(globals, key)?.configurable) delete globals[key];
    else globals[key] = previous;
  };
}
