import { KedgeError } from '../support/errors.ts';
import type { AnyIdentity, Identity, TrustSnapshot } from './identity.ts';
import { type PemInit, snapshotOf, type TrustInit, trustOf } from './snapshot.ts';

const FIELDS = new Set(['cert', 'key', 'ca', 'passphrase']);

/**
 * A client certificate that stays the same, given as PEM text; or CAs alone, where kedges are called without one.
 *
 * @throws {@link KedgeError} `ERR_KEDGE_IDENTITY` when a part is missing, cannot be parsed, or key and certificate do not match
 */
export function pem(init: PemInit): Identity;
export function pem(init: TrustInit): Identity<TrustSnapshot>;
export function pem(init: PemInit | TrustInit): AnyIdentity {
  if (typeof init !== 'object' || init === null) {
    throw new KedgeError('ERR_KEDGE_IDENTITY', 'pem() takes { cert, key, ca?, passphrase? }, or { ca } alone');
  }
  const unknown = Object.keys(init).find((name) => !FIELDS.has(name));
  if (unknown !== undefined) throw new KedgeError('ERR_KEDGE_IDENTITY', `pem() has no option \`${unknown}\``);
  const snapshot = onlyTrusts(init) ? trustOf(init.ca) : snapshotOf(init);
  return Object.freeze({ current: () => snapshot, subscribe: () => () => {} });
}

function onlyTrusts(init: PemInit | TrustInit): init is TrustInit {
  return init.ca !== undefined && [init.cert, init.key, init.passphrase].every((part) => part === undefined);
}
