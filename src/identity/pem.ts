import { check, object, optional, string, type Table } from '../support/shape.ts';
import type { AnyIdentity, Identity, TrustSnapshot } from './identity.ts';
import { type PemInit, pemText, snapshotOf, type TrustInit, trustOf } from './snapshot.ts';

const TAKES = 'takes { cert, key, ca?, passphrase? }, or { ca } alone';
const PEM = {
  cert: pemText,
  key: pemText,
  ca: optional(pemText),
  passphrase: optional(string),
} satisfies Table<PemInit>;
const [CERTIFICATE, TRUST] = [object(PEM, TAKES), object({ ...PEM, cert: optional(pemText), key: optional(pemText) })];

/**
 * A client certificate that stays the same, given as PEM text; or CAs alone, where kedges are called without one.
 *
 * @example
 * ```ts
 * import { readFileSync } from 'node:fs';
 * import { pem } from 'kedge-dialer';
 *
 * const identity = pem({ cert: readFileSync('tls.crt'), key: readFileSync('tls.key'), ca: readFileSync('ca.crt') });
 * ```
 *
 * @throws {@link KedgeError} `ERR_KEDGE_IDENTITY` when a part is missing, cannot be parsed, or key and certificate do not match
 */
export function pem(init: PemInit): Identity;
export function pem(init: TrustInit): Identity<TrustSnapshot>;
export function pem(init: PemInit | TrustInit): AnyIdentity {
  check('pem', onlyTrusts(init) ? TRUST : CERTIFICATE, init, { code: 'ERR_KEDGE_IDENTITY' });
  const snapshot = onlyTrusts(init) ? trustOf(init.ca) : snapshotOf(init);
  return Object.freeze({ current: () => snapshot, subscribe: () => () => {} });
}

function onlyTrusts(init: PemInit | TrustInit): init is TrustInit {
  return init?.ca !== undefined && [init.cert, init.key, init.passphrase].every((part) => part === undefined);
}
