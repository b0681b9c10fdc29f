/** How long to wait after so many failures before this one, in ms: doubled with each, up to `maxMs`, with jitter. */
export function backoff(failures: number, firstMs: number, maxMs: number): number {
  return jittered(Math.min(firstMs * 2 ** failures, maxMs));
}

/** Half to all of it: many pods that lost something together do not come back together. */
export function jittered(ms: number): number {
  return ms * (0.5 + Math.random() / 2);
}
