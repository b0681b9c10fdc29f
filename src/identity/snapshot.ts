import { createPrivateKey, type KeyObject, X509Certificate } from 'node:crypto';
import { KedgeError } from '../errors.ts';
import { hide } from '../hide.ts';
import type { IdentitySnapshot } from './identity.ts';

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

const CERTIFICATE = /-----BEGIN CERTIFICATE-----[^-]+-----END CERTIFICATE-----/g;

/** Checks that the parts fit together, and keeps them where neither `inspect` nor JSON shows the key. */
export function snapshotOf(init: PemInit): IdentitySnapshot {
  const [leaf] = certificates('cert', init.cert);
  if (init.ca !== undefined) certificates('ca', init.ca);
  if (!leaf!.checkPrivateKey(privateKey(init))) throw invalid('the key does not belong to the certificate');
  const facts = {
    subject: leaf!.subject.replaceAll('\n', ', '),
    serial: leaf!.serialNumber,
    notBefore: new Date(leaf!.validFrom),
    notAfter: new Date(leaf!.validTo),
  };
  const { cert, key, ca, passphrase } = init;
  hide(facts, `Identity(${facts.subject}, serial ${facts.serial})`);
  return Object.freeze(
    Object.defineProperties(facts, {
      cert: { value: cert },
      key: { value: key },
      ca: { value: ca },
      passphrase: { value: passphrase },
    }),
  );
}

function certificates(field: 'cert' | 'ca', pem: unknown): X509Certificate[] {
  const blocks = text(field, pem).match(CERTIFICATE);
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
  const pem = text('key', key);
  if (passphrase !== undefined && typeof passphrase !== 'string') throw invalid('`passphrase` is a string');
  try {
    return createPrivateKey(passphrase === undefined ? pem : { key: pem, passphrase });
  } catch (cause) {
    throw invalid('`key` holds no private key that can be read', cause);
  }
}

function text(field: string, pem: unknown): string {
  if (typeof pem === 'string') return pem;
  if (pem instanceof Uint8Array) return Buffer.from(pem).toString('latin1');
  throw invalid(`\`${field}\` is required: PEM text as a string or Buffer`);
}

function invalid(reason: string, cause?: unknown): KedgeError {
  return new KedgeError('ERR_KEDGE_IDENTITY', 'config', reason, { cause });
}
