/** What `promise` comes to, or the reason of `signal` when that aborts first; it is not listened to any longer than that. */
export function orAbort<T>(promise: Promise<T>, signal: AbortSignal | undefined): Promise<T> {
  if (signal === undefined) return promise;
  return new Promise((resolve, reject) => {
    const abort = () => reject(signal.reason);
    if (signal.aborted) abort();
    signal.addEventListener('abort', abort, { once: true });
    const stop = () => signal.removeEventListener('abort', abort);
    // The source of a user may give something else.
    const given = Promise.resolve(promise);
    given.then(resolve, reject);
    given.then(stop, stop);
  });
}
