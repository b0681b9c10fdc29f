/**
 * What the status of an answer means to the dialer, before its caller sees it.
 *
 * - `pass`: the answer is the caller's.
 * - `kedge-token`: the kedge refused the token for itself; its backends' 401 is told from its own by what it adds.
 * - `backend-token`: the backend refused the route's or the caller's.
 * - `elsewhere`: one of `failover.statuses`: another attempt may have a better answer.
 */
export type Verdict = 'pass' | 'kedge-token' | 'backend-token' | 'elsewhere';

export function verdictOn(status: number, isOfKedge: boolean, statuses: ReadonlySet<number>): Verdict {
  if (status === 407 || (status === 401 && isOfKedge)) return 'kedge-token';
  if (status === 401) return 'backend-token';
  return statuses.has(status) ? 'elsewhere' : 'pass';
}
