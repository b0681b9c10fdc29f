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
  /** Default: now. */
  notBefore?: Date;
  /** Default: in one day. */
  notAfter?: Date;
  /** Default: `ec` (P-256). */
  keyType?: 'ec' | 'rsa' | 'ed25519';
}

/** A certificate with its key, as PEM text. */
export interface Certificate {
  cert: string;
  key: string;
  /** Hexadecimal, upper case, as node:tls shows it. */
  serial: string;
}

/** A certificate authority that lives as long as the process. */
export interface Authority {
  /** Its own certificate, PEM. */
  cert: string;
  issue(request: CertificateRequest): Promise<Certificate>;
}

type KeyPair = webcrypto.CryptoKeyPair;

const DAY_MS = 24 * 60 * 60 * 1000;
const ALGORITHMS = {
  ec: { name: 'ECDSA', namedCurve: 'P-256', hash: 'SHA-256' },
  rsa: { name: 'RSASSA-PKCS1-v1_5', hash: 'SHA-256', publicExponent: new Uint8Array([1, 0, 1]), modulusLength: 2048 },
  ed25519: { name: 'Ed25519' },
} as const;

x509.cryptoProvider.set(webcrypto as never);

/** Makes a CA for a demo or a test: nothing is written anywhere. */
export async function createAuthority(cn: string): Promise<Authority> {
  const keys = await keyPair('ec');
  const certificate = await x509.X509CertificateGenerator.createSelfSigned({
    serialNumber: serialNumber(),
    name: `CN=${cn}`,
    notBefore: new Date(Date.now() - DAY_MS),
    notAfter: new Date(Date.now() + 10 * DAY_MS),
    keys: keys as never,
    signingAlgorithm: ALGORITHMS.ec,
    extensions: [
      new x509.BasicConstraintsExtension(true, undefined, true),
      new x509.KeyUsagesExtension(x509.KeyUsageFlags.keyCertSign | x509.KeyUsageFlags.cRLSign, true),
      await x509.SubjectKeyIdentifierExtension.create(keys.publicKey as never),
    ],
  });
  return {
    cert: certificate.toString('pem'),
    issue: (request) => issue(certificate, keys, request),
  };
}

async function issue(
  issuer: x509.X509Certificate,
  issuerKeys: KeyPair,
  request: CertificateRequest,
): Promise<Certificate> {
  const keys = await keyPair(request.keyType ?? 'ec');
  const names = [
    ...(request.dns ?? []).map((value) => ({ type: 'dns' as const, value })),
    ...(request.ip ?? []).map((value) => ({ type: 'ip' as const, value })),
    ...(request.uri ?? []).map((value) => ({ type: 'url' as const, value })),
  ];
  const certificate = await x509.X509CertificateGenerator.create({
    serialNumber: serialNumber(),
    subject: `CN=${request.cn}`,
    issuer: issuer.subject,
    notBefore: request.notBefore ?? new Date(Date.now() - 60_000),
    notAfter: request.notAfter ?? new Date(Date.now() + DAY_MS),
    publicKey: keys.publicKey as never,
    signingKey: issuerKeys.privateKey as never,
    signingAlgorithm: ALGORITHMS.ec,
    extensions: [
      new x509.BasicConstraintsExtension(false, undefined, true),
      new x509.KeyUsagesExtension(x509.KeyUsageFlags.digitalSignature, true),
      new x509.ExtendedKeyUsageExtension([x509.ExtendedKeyUsage.serverAuth, x509.ExtendedKeyUsage.clientAuth]),
      await x509.AuthorityKeyIdentifierExtension.create(issuer.publicKey),
      ...(names.length > 0 ? [new x509.SubjectAlternativeNameExtension(names)] : []),
    ],
  });
  const pkcs8 = Buffer.from(await webcrypto.subtle.exportKey('pkcs8', keys.privateKey));
  return {
    cert: certificate.toString('pem'),
    key: x509.PemConverter.encode(pkcs8, 'PRIVATE KEY'),
    serial: certificate.serialNumber.toUpperCase(),
  };
}

async function keyPair(type: keyof typeof ALGORITHMS): Promise<KeyPair> {
  return (await webcrypto.subtle.generateKey(ALGORITHMS[type] as never, true, ['sign', 'verify'])) as KeyPair;
}

/** Positive, and without a leading zero byte that OpenSSL would not show. */
function serialNumber(): string {
  const bytes = Buffer.from(webcrypto.getRandomValues(new Uint8Array(16)));
  bytes[0] = (bytes[0]! & 0x7f) | 0x40;
  return bytes.toString('hex');
}
