/** The longest timer that Node keeps, in ms; also HTTP/2's largest window and its last stream (RFC 9113 §6.9.1, §5.1.1). */
export const MAX_INT32 = 2 ** 31 - 1;
/** How late a timer for a date may notice that the clock was set, or that the machine slept. */
const CLOCK_CHECK_MS = 30_000;

/** A timer of any length, on the monotonic clock, that does not hold the process; returns the way to stop it. */
export function after(ms: number, callback: () => void): () => void {
  const end = performance.now() + ms;
  return wait(() => end - performance.now(), MAX_INT32, callback);
}

/** Calls back at a date, by the wall clock, wherever that is set to meanwhile; otherwise as {@link after}. */
export function at(date: Date, callback: () => void): () => void {
  return wait(() => date.getTime() - Date.now(), CLOCK_CHECK_MS, callback);
}

function wait(left: () => number, stepMs: number, callback: () => void): () => void {
  let timer: NodeJS.Timeout;
  const arm = () => {
    timer = setTimeout(fire, Math.min(Math.max(Math.ceil(left()), 0), stepMs)).unref();
  };
  const fire = () => (left() > 0 ? arm() : callback());
  arm();
  return () => clearTimeout(timer);
}

const STEPS = 5;

/**
 * As `setTimeout`, in time during which this process ran: whatever came while it was stopped or busy is read before
 * `callback` is called. Does not hold the process; returns the way to stop it.
 */
export function running(ms: number, callback: () => void): () => void {
  let left = STEPS;
  let last: NodeJS.Immediate | undefined;
  const timer = setInterval(() => {
    left -= 1;
    if (left > 0) return;
    clearInterval(timer);
    // Timers come before reads in a turn of the event loop, this after them.
    last = setImmediate(callback);
  }, ms / STEPS).unref();
  return () => {
    clearInterval(timer);
    clearImmediate(last);
  };
}
