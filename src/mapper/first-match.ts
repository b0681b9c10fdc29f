import { KedgeError } from '../errors.ts';
import type { Mapper } from './mapper.ts';

/**
 * Asks each mapper in turn; the first route wins.
 *
 * @throws {@link KedgeError} `ERR_KEDGE_ROUTE` when an argument is not a function
 */
export function firstMatch(...mappers: readonly Mapper[]): Mapper {
  for (const mapper of mappers) {
    if (typeof mapper !== 'function') {
      throw new KedgeError('ERR_KEDGE_ROUTE', 'config', 'firstMatch: every argument is a mapper');
    }
  }
  return (target) => {
    for (const mapper of mappers) {
      const found = mapper(target);
      if (found !== undefined) return found;
    }
    return undefined;
  };
}
