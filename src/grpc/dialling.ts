import { AsyncLocalStorage } from 'node:async_hooks';
import { subscribe } from 'node:diagnostics_channel';
import type { Socket } from 'node:net';

/** Hears of each TCP attempt of a dial. */
export type OnAttempt = (socket: Socket, address: string, port: number) => void;

const dials = new AsyncLocalStorage<OnAttempt>();
let running = 0;
let subscribed = false;

/**
 * Runs `dial`, which makes grpc-js connect sooner or later, and tells `onAttempt` of the sockets: grpc-js neither ends a
 * TCP connection that is being made nor says why one failed. Returns what to call when the dial is over.
 */
export function followSockets(onAttempt: OnAttempt, dial: () => void): () => void {
  if (!subscribed) {
    subscribed = true;
    // Published by net.connect() before it connects (Node.js documentation, diagnostics_channel, "Net").
    subscribe('net.client.socket', (message) => {
      const hear = dials.getStore();
      if (hear === undefined) return;
      const { socket } = message as { socket: Socket };
      socket.once('connectionAttempt', (address: string, port: number) => hear(socket, address, port));
    });
  }
  running += 1;
  dials.run(onAttempt, dial);
  let over = false;
  return () => {
    if (over) return;
    over = true;
    running -= 1;
    // On Node 22 an enabled storage slows every promise of the process down.
    if (running === 0) dials.disable();
  };
}
