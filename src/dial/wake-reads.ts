import type { Socket } from 'node:net';

/**
 * Node's HTTP/2 does not read while it writes, and TLS may lose the end of a write that failed: such a connection never hears
 * that its other end is gone, and takes calls and PINGs that it can neither send nor fail
 * (https://github.com/nodejs/node/issues/61304). Reading again where nothing moves brings out the reset.
 */
export function wakeReads(socket: Socket): void {
  const { _handle: handle } = socket as Socket & { readonly _handle?: { readStart?(): number } | null };
  if (!socket.destroyed) handle?.readStart?.();
}
