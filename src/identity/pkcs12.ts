import { KedgeError } from '../support/errors.ts';
import { FilesIdentity } from './files.ts';
import type { Identity, IdentitySnapshot } from './identity.ts';
import { checkPaths, type IdentityFilesOptions } from './pem-files.ts';
import { type Pkcs12Init, snapshotOfPkcs12 } from './snapshot.ts';

const FIELDS = ['pfx', 'ca', 'passphrase'];

/**
 * A client certificate that stays the same, in a PKCS#12 container.
 *
 * @throws {@link KedgeError} `ERR_KEDGE_IDENTITY` when it cannot be opened
 */
export function pkcs12(init: Pkcs12Init): Identity {
  if (typeof init !== 'object' || init === null) {
    throw new KedgeError('ERR_KEDGE_IDENTITY', 'pkcs12() takes { pfx, passphrase?, ca? }');
  }
  const unknown = Object.keys(init).find((name) => !FIELDS.includes(name));
  if (unknown !== undefined) throw new KedgeError('ERR_KEDGE_IDENTITY', `pkcs12() has no option \`${unknown}\``);
  const snapshot = snapshotOfPkcs12(init);
  return Object.freeze({ current: () => snapshot, subscribe: () => () => {} });
}

/** Paths of a PKCS#12 file and, if wanted, of the kedges' CAs. */
export interface Pkcs12FileInit extends IdentityFilesOptions {
  /** The container. */
  pfx: string;
}

/**
 * A client certificate in a PKCS#12 file that may change at any time, as {@link pemFiles} has it.
 *
 * @throws {@link KedgeError} `ERR_KEDGE_IDENTITY`
 */
export function pkcs12File(init: Pkcs12FileInit): Identity {
  const { pfx, ca, passphrase, onWarning } = checkPaths('pkcs12File', init, ['pfx']);
  return new FilesIdentity<'pfx' | 'ca', IdentitySnapshot>({
    paths: { pfx, ca },
    snapshot: (read) =>
      snapshotOfPkcs12({
        pfx: read.pfx!,
        ...(read.ca === undefined ? {} : { ca: read.ca }),
        ...(passphrase === undefined ? {} : { passphrase }),
      }),
    onWarning,
  });
}
