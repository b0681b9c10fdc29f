import { createPrivateKey, type KeyObject, X509Certificate } from 'node:crypto';
import type { Socket } from 'node:net';
import { Duplex } from 'node:stream';
import tls from 'node:tls';
import { KedgeError } from '../support/errors.ts';
import { hide } from '../support/redact.ts';
import { is } from '../support/shape.ts';
import type { AnySnapshot, IdentitySnapshot, TrustSnapshot } from './identity.ts';

/** A certificate and key as PEM text. */
export interface PemInit {
  /** The client certificate, followed by its chain if it has one. */
  cert: string | Buffer;
  /** The private key: PKCS#8, PKCS#1 or SEC1; RSA, EC or Ed25519. */
  key: string | Buffer;
  /** CAs that may sign a kedge's certificate. When given, the system's CAs are not trusted. Default: the system's. */
  ca?: string | Buffer;
  /** Opens an encrypted `key`. */
  passphrase?: string;
}

/** CAs alone: no certificate is shown to kedges, which may be called with tokens. */
export interface TrustInit {
  /** CAs that may sign a kedge's certificate, PEM text. The system's CAs are not trusted. */
  ca: string | Buffer;
  cert?: undefined;
  key?: undefined;
  passphrase?: undefined;
}

export const pemText = is(
  'PEM text as a string or Buffer',
  (value): value is string | Buffer => typeof value === 'string' || value instanceof Uint8Array,
);

const CERTIFICATE = /-----BEGIN CERTIFICATE-----[^-]+-----END CERTIFICATE-----/g;

/** A certificate and key in a PKCS#12 container. */
export interface Pkcs12Init {
  pfx: Buffer;
  passphrase?: string;
  /** CAs that may sign a kedge's certificate, PEM. When given, the system's CAs are not trusted. Default: the system's. */
  ca?: string | Buffer;
}

/** Checks that the parts fit together, and keeps them where neither `inspect` nor JSON shows the key. */
export function snapshotOf(init: PemInit): IdentitySnapshot {
  const [leaf] = certificates('cert', init.cert);
  if (init.ca !== undefined) certificates('ca', init.ca);
  if (!leaf!.checkPrivateKey(privateKey(init))) throw invalid('the key does not belong to the certificate');
  const { cert, key, ca, passphrase } = init;
  try {
    // What OpenSSL makes of the texts is what counts: it is stricter about their form.
    tls.createSecureContext({ cert, key, ca, passphrase });
  } catch (cause) {
    throw invalid('certificate, key and CA cannot be used for TLS', cause);
  }
  return sealed(leaf!, { cert, key, ca, passphrase });
}

/** CAs that are to sign the kedges' certificates, checked. */
export function trustOf(ca: string | Buffer): TrustSnapshot {
  certificates('ca', ca);
  try {
    tls.createSecureContext({ ca });
  } catch (cause) {
    throw invalid('the CA cannot be used for TLS', cause);
  }
  const snapshot = { ca };
  hide(snapshot, 'Identity(no certificate, CAs of its own)');
  return Object.freeze(snapshot);
}

/** The same for PKCS#12. */
export function snapshotOfPkcs12({ pfx, passphrase, ca }: Pkcs12Init): IdentitySnapshot {
  if (ca !== undefined) certificates('ca', ca);
  let leaf: X509Certificate | undefined;
  try {
    const secureContext = tls.createSecureContext({ pfx: Buffer.from(pfx), passphrase });
    // Node reads PKCS#12 for TLS only; a socket that is never connected shows the certificate.
    const socket = new tls.TLSSocket(new Duplex({ read() {} }) as Socket, { secureContext });
    leaf = socket.getX509Certificate();
    socket.destroy();
  } catch (cause) {
    throw invalid('`pfx` cannot be opened: a wrong passphrase, or no PKCS#12 container', cause);
  }
  if (leaf === undefined) throw invalid('`pfx` holds no certificate');
  return sealed(leaf, { pfx: Buffer.from(pfx), ca, passphrase });
}

/** Whether connections under one may as well be under the other. */
export function sameCredentials(a: AnySnapshot, b: AnySnapshot): boolean {
  return (['cert', 'key', 'pfx', 'ca'] as const).every((part) => String(a[part] ?? '') === String(b[part] ?? ''));
}

function sealed(leaf: X509Certificate, secrets: Partial<IdentitySnapshot>): IdentitySnapshot {
  const facts = {
    subject: leaf.subject.replaceAll('\n', ', '),
    serial: leaf.serialNumber,
    notBefore: new Date(leaf.validFrom),
    notAfter: new Date(leaf.validTo),
  };
  hide(facts, `Identity(${facts.subject}, serial ${facts.serial})`);
  const hidden = Object.entries(secrets).map(([name, value]) => [name, { value }]);
  return Object.freeze(Object.defineProperties(facts, Object.fromEntries(hidden)));
}

function certificates(field: 'cert' | 'ca', pem: string | Buffer): X509Certificate[] {
  const blocks = text(pem).match(CERTIFICATE);
  if (blocks === null) throw invalid(`\`${field}\` holds no PEM certificate`);
  return blocks.map((block) => {
    try {
      return new X509Certificate(block);
    } catch (cause) {
      throw invalid(`\`${field}\` holds a certificate that cannot be parsed`, cause);
    }
  });
}

function privateKey({ key, passphrase }: PemInit): KeyObject {
  const pem = text(key);
  try {
    return createPrivateKey(passphrase === undefined ? pem : { key: pem, passphrase });
  } catch (cause) {
    throw invalid('`key` holds no private key that can be read', cause);
  }
}

function text(pem: string | Buffer): string {
  return typeof pem === 'string' ? pem : Buffer.from(pem).toString('latin1');
}

function invalid(reason: string, cause?: unknown): KedgeError {
  return new KedgeError('ERR_KEDGE_IDENTITY', reason, { cause });
}
