import { KedgeError } from '../support/errors.ts';
import { isFunction } from '../support/shape.ts';
import { describe, described } from './describe.ts';
import type { Mapper } from './mapper.ts';

/**
 * Asks each mapper in turn; the first route wins.
 *
 * @example
 * ```ts
 * import { firstMatch, hosts, suffix } from 'kedge-dialer';
 *
 * const mapper = firstMatch(
 *   hosts({ 'orders.us1.clusters.local': 'https://special.kedge.example.com' }),
 *   suffix({ match: '*.clusters.local', suffix: '.kedge.example.com' }),
 * );
 * ```
 *
 * @throws {@link KedgeError} `ERR_KEDGE_ROUTE` when an argument is not a function
 */
export function firstMatch(...mappers: readonly Mapper[]): Mapper {
  if (!mappers.every(isFunction)) throw new KedgeError('ERR_KEDGE_ROUTE', 'firstMatch: every argument is a mapper');
  const first: Mapper = (target) => {
    for (const mapper of mappers) {
      const found = mapper(target);
      if (found !== undefined) return found;
    }
    return undefined;
  };
  return described(first, (target) => {
    const index = mappers.findIndex((mapper) => mapper(target) !== undefined);
    if (index !== -1) return `firstMatch[${index}]: ${describe(mappers[index]!, target)}`;
    return `none of firstMatch: ${mappers.map((mapper) => describe(mapper, target)).join('; ')}`;
  });
}
