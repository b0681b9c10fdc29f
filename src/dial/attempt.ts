import type { Socket } from 'node:net';
import { running } from '../support/timer.ts';

/** Settles a dialling socket exactly once: ready, failed, closed, or out of time. */
export function attempt(
  socket: Socket,
  timeoutMs: number,
  settle: (error: Error | undefined, reason: 'ready' | 'failed' | 'timeout') => void,
): { ready: () => void } {
  const finish = (error: Error | undefined, reason: 'ready' | 'failed' | 'timeout') => {
    stopTimer();
    socket.off('error', onError);
    socket.off('close', onClose);
    if (reason !== 'ready') socket.destroy();
    settle(error, reason);
  };
  const onError = (error: Error) => finish(error, 'failed');
  const onClose = () => finish(undefined, 'failed');
  // A connection that was made while this process was busy is not late.
  const stopTimer = running(timeoutMs, () => finish(undefined, 'timeout'));
  socket.once('error', onError);
  socket.once('close', onClose);
  return { ready: () => finish(undefined, 'ready') };
}
