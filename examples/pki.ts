import 'reflect-metadata'; // @peculiar/x509 needs it
import { webcrypto } from 'node:crypto';
import * as x509 from '@peculiar/x509';

/** What an {@link Authority} puts into a certificate. */
export interface CertificateRequest {
  /** The subject's common name. */
  cn: string;
  /** Names and addresses that a server's certificate is for. */
  dns?: readonly string[];
  ip?: readonly string[];
  /** URI names, such as a SPIFFE ID. */
  uri?: readonly string[];
  /** Good for client authentication. Default: true. */
  client?: boolean;
  /** Good for server authentication. Default: true. */
  server?: boolean;
  /** Default: a minute ago. */
  notBefore?: Date;
  /** Default: in one day. */
  notAfter?: Date;
  /** Default: `ec` (P-256). */
  keyType?: KeyType;
}

export type KeyType = 'ec' | 'rsa' | 'ed25519';

/** A certificate with its key, as PEM text. */
export interface Certificate {
  cert: string;
  key: string;
  /** Hexadecimal, upper case, as node:tls shows it. */
  serial: string;
}

/** A certificate authority that lives as long as the process; its own key is there to forge and to re-create it. */
export interface Authority {
  /** Its own certificate and key, PEM. */
  cert: string;
  key: string;
  issue(request: CertificateRequest): Promise<Certificate>;
  /** A list of revoked certificates, PEM. */
  revoke(...certificates: readonly Certificate[]): Promise<string>;
}

const DAY_MS = 24 * 60 * 60 * 1000;
const ALGORITHMS = {
  ec: { name: 'ECDSA', namedCurve: 'P-256', hash: 'SHA-256' },
  rsa: { name: 'RSASSA-PKCS1-v1_5', hash: 'SHA-256', publicExponent: new Uint8Array([1, 0, 1]), modulusLength: 2048 },
  ed25519: { name: 'Ed25519' },
} as const;

x509.cryptoProvider.set(webcrypto);

/** Makes a CA with an ECDSA P-256 key: nothing is written anywhere. */
export async function createAuthority(name: string): Promise<Authority> {
  const keys = await keyPair('ec');
  const certificate = await x509.X509CertificateGenerator.createSelfSigned({
    serialNumber: serialNumber(),
    name: commonName(name),
    notBefore: new Date(Date.now() - DAY_MS),
    notAfter: new Date(Date.now() + 10 * DAY_MS),
    keys,
    signingAlgorithm: ALGORITHMS.ec,
    extensions: [
      new x509.BasicConstraintsExtension(true, undefined, true),
      new x509.KeyUsagesExtension(x509.KeyUsageFlags.keyCertSign | x509.KeyUsageFlags.cRLSign, true),
      await x509.SubjectKeyIdentifierExtension.create(keys.publicKey),
      await x509.AuthorityKeyIdentifierExtension.create(keys.publicKey),
    ],
  });
  return {
    cert: certificate.toString('pem'),
    key: await pkcs8(keys),
    issue: (request) => issue(certificate, keys, request),
    revoke: async (...certificates) => {
      const list = await x509.X509CrlGenerator.create({
        issuer: certificate.subject,
        thisUpdate: new Date(Date.now() - 60_000),
        nextUpdate: new Date(Date.now() + DAY_MS),
        entries: certificates.map(({ serial }) => ({ serialNumber: serial })),
        signingAlgorithm: ALGORITHMS.ec,
        signingKey: keys.privateKey,
      });
      return x509.PemConverter.encode(list.rawData, 'X509 CRL');
    },
  };
}

async function issue(
  issuer: x509.X509Certificate,
  issuerKeys: webcrypto.CryptoKeyPair,
  request: CertificateRequest,
): Promise<Certificate> {
  const keyType = request.keyType ?? 'ec';
  const keys = await keyPair(keyType);
  const usage = x509.KeyUsageFlags.digitalSignature | (keyType === 'rsa' ? x509.KeyUsageFlags.keyEncipherment : 0);
  const purposes = [
    ...((request.server ?? true) ? [x509.ExtendedKeyUsage.serverAuth] : []),
    ...((request.client ?? true) ? [x509.ExtendedKeyUsage.clientAuth] : []),
  ];
  const names = [
    ...(request.dns ?? []).map((value) => ({ type: 'dns' as const, value })),
    ...(request.ip ?? []).map((value) => ({ type: 'ip' as const, value })),
    ...(request.uri ?? []).map((value) => ({ type: 'url' as const, value })),
  ];
  const certificate = await x509.X509CertificateGenerator.create({
    serialNumber: serialNumber(),
    subject: commonName(request.cn),
    issuer: issuer.subject,
    notBefore: request.notBefore ?? new Date(Date.now() - 60_000),
    notAfter: request.notAfter ?? new Date(Date.now() + DAY_MS),
    publicKey: keys.publicKey,
    signingKey: issuerKeys.privateKey,
    signingAlgorithm: ALGORITHMS.ec,
    extensions: [
      new x509.BasicConstraintsExtension(false, undefined, true),
      new x509.KeyUsagesExtension(usage, true),
      ...(purposes.length > 0 ? [new x509.ExtendedKeyUsageExtension(purposes)] : []),
      ...(names.length > 0 ? [new x509.SubjectAlternativeNameExtension(names)] : []),
      await x509.SubjectKeyIdentifierExtension.create(keys.publicKey),
      await x509.AuthorityKeyIdentifierExtension.create(issuer.publicKey),
    ],
  });
  return {
    cert: certificate.toString('pem'),
    key: await pkcs8(keys),
    serial: certificate.serialNumber.toUpperCase(),
  };
}

async function keyPair(type: KeyType): Promise<webcrypto.CryptoKeyPair> {
  const pair = await webcrypto.subtle.generateKey(ALGORITHMS[type], true, ['sign', 'verify']);
  if (!('privateKey' in pair)) throw new TypeError(`${type} has no key pair`);
  return pair;
}

async function pkcs8({ privateKey }: webcrypto.CryptoKeyPair): Promise<string> {
  return x509.PemConverter.encode(await webcrypto.subtle.exportKey('pkcs8', privateKey), 'PRIVATE KEY');
}

/** As an object, for a name given as text would be parsed: a comma in it would begin another attribute. */
function commonName(cn: string): x509.JsonName {
  return [{ CN: [cn] }];
}

/** Positive, and without a leading zero byte that OpenSSL would not show. */
function serialNumber(): string {
  const bytes = Buffer.from(webcrypto.getRandomValues(new Uint8Array(16)));
  bytes[0] = (bytes[0]! & 0x7f) | 0x40;
  return bytes.toString('hex');
}
