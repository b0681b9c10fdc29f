import type { Hop } from '../kedge/kedge.ts';
import type { Target } from '../target.ts';
import type { Credentials } from './credentials.ts';

/** A route made ready for calls: everything that can be worked out before one is made. */
export interface Plan {
  /** The kedges in the order in which they are tried. */
  readonly hops: readonly Hop[];
  readonly credentials: Credentials;
}

/** Where a target goes: `plan` is undefined when it is not a kedge destination. */
export interface Resolved {
  readonly target: Target;
  readonly plan: Plan | undefined;
}
