import { KedgeError } from '../support/errors.ts';
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

/**
 * A client certificate in PEM files that may change at any time, as cert-manager, spiffe-helper, Vault and Kubernetes
 * write them: new connections carry the new certificate within a second, and calls under way finish on the old one. Key
 * and certificate are used only when they fit together. Nothing is read before the first use. Or CAs alone, where kedges
 * are called without a certificate.
 *
 * @throws {@link KedgeError} `ERR_KEDGE_IDENTITY`
 */
export function pemFiles(init: PemFilesInit): Identity;
export function pemFiles(init: TrustFilesInit): Identity<TrustSnapshot>;
export function pemFiles(init: PemFilesInit | TrustFilesInit): AnyIdentity {
  const { cert, key } = init ?? {};
  const trusts = cert === undefined && key === undefined && init?.ca !== undefined;
  const { ca, passphrase, onWarning } = checkPaths('pemFiles', init, trusts ? ['ca'] : ['cert', 'key']);
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

const COMMON = ['ca', 'passphrase', 'onWarning'];

/** @throws {@link KedgeError} `ERR_KEDGE_IDENTITY` */
export function checkPaths<T extends IdentityFilesOptions>(
  called: string,
  init: T,
  required: readonly string[],
): T & { onWarning: (warning: Error) => void } {
  const invalid = (reason: string) => new KedgeError('ERR_KEDGE_IDENTITY', `${called}() ${reason}`);
  if (typeof init !== 'object' || init === null) throw invalid(`takes { ${[...required, 'ca?'].join(', ')} }`);
  const values = init as Record<string, unknown>;
  const unknown = Object.keys(init).find(
    (name) => values[name] !== undefined && !required.includes(name) && !COMMON.includes(name),
  );
  if (unknown !== undefined) throw invalid(`has no option \`${unknown}\``);
  for (const name of [...required, 'ca']) {
    if (name === 'ca' && values[name] === undefined) continue;
    if (typeof values[name] !== 'string' || values[name] === '') throw invalid(`needs \`${name}\`: the path of a file`);
  }
  if (init.passphrase !== undefined && typeof init.passphrase !== 'string') throw invalid('`passphrase` is a string');
  if (init.onWarning !== undefined && typeof init.onWarning !== 'function') throw invalid('`onWarning` is a function');
  return { ...init, onWarning: init.onWarning ?? ((warning: Error) => process.emitWarning(warning)) };
}
