import { type RouteInit, route } from '../route.ts';
import { isIP } from '../target.ts';
import { described } from './describe.ts';
import type { Mapper } from './mapper.ts';

/**
 * Every name goes to one route: the original's `single` mapper.
 *
 * @example
 * ```ts
 * import { createDialer, single } from 'kedge-dialer';
 *
 * const dialer = createDialer({ mapper: single('https://us1.kedge.example.com') });
 * ```
 *
 * @throws {@link KedgeError} `ERR_KEDGE_ROUTE`
 */
export function single(init: RouteInit): Mapper {
  const only = route(init);
  const mapper: Mapper = (target) => (isIP(target) ? undefined : only);
  return described(mapper, () => 'single: every name has this route');
}
