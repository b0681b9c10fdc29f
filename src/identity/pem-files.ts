import { check, object, optional, or, path, string, type Table } from '../support/shape.ts';
import { emitWarning, warningListener } from '../support/warnings.ts';
import { FilesIdentity } from './files.ts';
import type { AnyIdentity, AnySnapshot, Identity, TrustSnapshot } from './identity.ts';
import { snapshotOf, trustOf } from './snapshot.ts';

/** What {@link pemFiles} and {@link pkcs12File} have in common. */
export interface IdentityFilesOptions {
  /** A file of CAs that may sign a kedge's certificate, PEM, instead of the system's. Default: the system's. */
  ca?: string;
  passphrase?: string;
  /** Told when changed files cannot be used; the last good ones stay. Default: `process.emitWarning`. */
  onWarning?: (warning: Error) => void;
}

/** Paths of PEM files. */
export interface PemFilesInit extends IdentityFilesOptions {
  /** The client certificate, followed by its chain if it has one. */
  cert: string;
  /** Its private key. */
  key: string;
}

/** The path of CAs alone: no certificate is shown to kedges, which may be called with tokens. */
export interface TrustFilesInit extends IdentityFilesOptions {
  ca: string;
  cert?: undefined;
  key?: undefined;
}

/** For {@link pkcs12File} as well. */
export const FILES = {
  ca: optional(path),
  passphrase: optional(string),
  onWarning: or(warningListener, emitWarning),
} satisfies Table<IdentityFilesOptions>;
const PEM_FILES = object({ ...FILES, cert: path, key: path } satisfies Table<PemFilesInit>);
const TRUST_FILES = object({ ...FILES, ca: path, cert: optional(path), key: optional(path) });

/**
 * A client certificate in PEM files that may change at any time, as cert-manager, spiffe-helper, Vault and Kubernetes
 * write them: new connections carry the new certificate within a second, and calls under way finish on the old one. Key
 * and certificate are used only when they fit together. Nothing is read before the first use. Or CAs alone, where kedges
 * are called without a certificate.
 *
 * @example
 * ```ts
 * import { pemFiles } from 'kedge-dialer';
 *
 * const identity = pemFiles({ cert: '/tls/tls.crt', key: '/tls/tls.key', ca: '/tls/ca.crt' });
 * ```
 *
 * @throws {@link KedgeError} `ERR_KEDGE_IDENTITY`
 */
export function pemFiles(init: PemFilesInit): Identity;
export function pemFiles(init: TrustFilesInit): Identity<TrustSnapshot>;
export function pemFiles(init: PemFilesInit | TrustFilesInit): AnyIdentity {
  const { cert, key } = init ?? {};
  const trusts = cert === undefined && key === undefined && init?.ca !== undefined;
  const context = { code: 'ERR_KEDGE_IDENTITY' } as const;
  const files = trusts ? check('pemFiles', TRUST_FILES, init, context) : check('pemFiles', PEM_FILES, init, context);
  const { ca, passphrase, onWarning } = files;
  if (trusts) return new FilesIdentity({ paths: { ca }, snapshot: (read) => trustOf(read.ca!), onWarning });
  return new FilesIdentity<'cert' | 'key' | 'ca', AnySnapshot>({
    paths: { cert, key, ca },
    snapshot: (read) =>
      snapshotOf({
        cert: read.cert!,
        key: read.key!,
        ...(read.ca === undefined ? {} : { ca: read.ca }),
        ...(passphrase === undefined ? {} : { passphrase }),
      }),
    onWarning,
  });
}
