import type { Scenario } from '../run.ts';
import { bounds } from './bounds.ts';
import { handshakes } from './handshakes.ts';
import { identities } from './identities.ts';
import { outages } from './outages.ts';
import { scarcity } from './scarcity.ts';
import { streams } from './streams.ts';
import { tokens } from './tokens.ts';

/** Every row of the fault table, in its order as far as they share a file. */
export const scenarios: readonly Scenario[] = [
  ...outages,
  ...handshakes,
  ...streams,
  ...identities,
  ...tokens,
  ...scarcity,
  ...bounds,
];
