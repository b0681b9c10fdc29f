const MAX_TIMER_MS = 2 ** 31 - 1;

/** A timer of any length that does not hold the process; returns the way to stop it. */
export function after(ms: number, callback: () => void): () => void {
  let timer: NodeJS.Timeout;
  const arm = (left: number) => {
    const step = Math.min(Math.max(left, 0), MAX_TIMER_MS);
    timer = setTimeout(() => (left > step ? arm(left - step) : callback()), step).unref();
  };
  arm(ms);
  return () => clearTimeout(timer);
}
