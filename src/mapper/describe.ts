import type { Target } from '../target.ts';
import type { Mapper } from './mapper.ts';

/** Says in a few words why a mapper answers as it does. */
export type Describe = (target: Target) => string;

const descriptions = new WeakMap<Mapper, Describe>();

/** Gives a mapper the words for `dialer.explain()`. */
export function described(mapper: Mapper, describe: Describe): Mapper {
  descriptions.set(mapper, describe);
  return mapper;
}

/** Why `mapper` maps `target` as it does; of a user's own function only its name is known. */
export function describe(mapper: Mapper, target: Target): string {
  const own = descriptions.get(mapper);
  return own === undefined ? `function ${mapper.name || '(anonymous)'}` : own(target);
}
