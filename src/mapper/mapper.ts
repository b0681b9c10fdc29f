import type { Route } from '../route.ts';
import type { Target } from '../target.ts';

/**
 * Target to route; undefined means "not a kedge destination". Synchronous and pure, because its answers are cached.
 * IP addresses are never asked for.
 */
export type Mapper = (target: Target) => Route | undefined;
