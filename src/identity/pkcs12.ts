import { check, is, object, optional, path, string, type Table } from '../support/shape.ts';
import { FilesIdentity } from './files.ts';
import type { Identity, IdentitySnapshot } from './identity.ts';
import { FILES, type IdentityFilesOptions } from './pem-files.ts';
import { type Pkcs12Init, pemText, snapshotOfPkcs12 } from './snapshot.ts';

const PKCS12 = object({
  pfx: is('a PKCS#12 container as a Buffer', (value) => value instanceof Uint8Array),
  passphrase: optional(string),
  ca: optional(pemText),
} satisfies Table<Pkcs12Init>);
const PKCS12_FILE = object({ ...FILES, pfx: path } satisfies Table<Pkcs12FileInit>);

/**
 * A client certificate that stays the same, in a PKCS#12 container.
 *
 * @example
 * ```ts
 * import { readFileSync } from 'node:fs';
 * import { pkcs12 } from 'kedge-dialer';
 *
 * const identity = pkcs12({ pfx: readFileSync('client.p12'), passphrase: process.env['PASSPHRASE'] ?? '' });
 * ```
 *
 * @throws {@link KedgeError} `ERR_KEDGE_IDENTITY` when it cannot be opened
 */
export function pkcs12(init: Pkcs12Init): Identity {
  check('pkcs12', PKCS12, init, { code: 'ERR_KEDGE_IDENTITY' });
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
 * @example
 * ```ts
 * import { pkcs12File } from 'kedge-dialer';
 *
 * const identity = pkcs12File({ pfx: '/tls/client.p12', passphrase: process.env['PASSPHRASE'] ?? '', ca: '/tls/ca.crt' });
 * ```
 *
 * @throws {@link KedgeError} `ERR_KEDGE_IDENTITY`
 */
export function pkcs12File(init: Pkcs12FileInit): Identity {
  const { pfx, ca, passphrase, onWarning } = check('pkcs12File', PKCS12_FILE, init, { code: 'ERR_KEDGE_IDENTITY' });
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
