import { KedgeError } from '../errors.ts';
import type { Identity } from './identity.ts';
import { type PemInit, snapshotOf } from './snapshot.ts';

const FIELDS = new Set(['cert', 'key', 'ca', 'passphrase']);

/**
 * A client certificate that stays the same, given as PEM text.
 *
 * @throws {@link KedgeError} `ERR_KEDGE_IDENTITY` when a part is missing, cannot be parsed, or key and certificate do not match
 */
export function pem(init: PemInit): Identity {
  if (typeof init !== 'object' || init === null) {
    throw new KedgeError('ERR_KEDGE_IDENTITY', 'config', 'pem() takes { cert, key, ca?, passphrase? }');
  }
  const unknown = Object.keys(init).find((name) => !FIELDS.has(name));
  if (unknown !== undefined) throw new KedgeError('ERR_KEDGE_IDENTITY', 'config', `pem() has no option \`${unknown}\``);
  const snapshot = snapshotOf(init);
  return Object.freeze({ current: () => snapshot, subscribe: () => () => {} });
}
