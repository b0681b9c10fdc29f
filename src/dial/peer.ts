import { createHash, X509Certificate } from 'node:crypto';
import { checkServerIdentity, type PeerCertificate } from 'node:tls';
import { boolean, invalid, is, object, oneOf, optional, type Place, type Table } from '../support/shape.ts';

/** What a kedge has to prove beyond a certificate for its name from a trusted CA. */
export interface PeerPolicy {
  /** The SPIFFE ID that the certificate must carry as URI SAN, such as `spiffe://example.com/kedge`. */
  spiffeId?: string;
  /** SHA-256 hashes of public keys (SPKI, base64) of which the certificate must have one, as in RFC 7469. */
  spkiPins?: readonly string[];
  /** The lowest TLS version. Default: `TLSv1.2`. */
  minVersion?: 'TLSv1.2' | 'TLSv1.3';
  /** Accepts any certificate. Warns at every start, and refuses routes with tokens. For a laptop, never for a pod. */
  dangerouslySkipVerification?: boolean;
}

const PIN = /^[A-Za-z0-9+/]{43}=$/;
const SPIFFE_ID = /^spiffe:\/\/[a-z0-9._-]{1,255}(?:\/[A-Za-z0-9._-]+)*$/;

const POLICY = object({
  spiffeId: optional(
    is('a SPIFFE ID such as spiffe://example.com/kedge', (value): value is string => isMatch(SPIFFE_ID, value)),
  ),
  spkiPins: optional(is('a list of base64 SHA-256 hashes', isPins)),
  minVersion: optional(oneOf('TLSv1.2', 'TLSv1.3')),
  dangerouslySkipVerification: optional(boolean),
} satisfies Table<PeerPolicy>);

/**
 * Checks a policy and freezes a copy of it.
 *
 * @throws {@link KedgeError} `ERR_KEDGE_OPTIONS`
 */
export function peerPolicy(value: unknown, at: Place): PeerPolicy {
  const place = { ...at, code: 'ERR_KEDGE_OPTIONS' } as const;
  const { spiffeId, spkiPins, dangerouslySkipVerification: skip } = POLICY(value, place);
  if (skip === true && (spiffeId !== undefined || spkiPins !== undefined)) {
    throw invalid(place, 'contradicts itself: `dangerouslySkipVerification` beside `spiffeId` or `spkiPins`');
  }
  return Object.freeze({
    ...(value as PeerPolicy),
    ...(spkiPins === undefined ? {} : { spkiPins: Object.freeze([...spkiPins]) }),
  });
}

/** Equal for policies that ask for the same: connections to a kedge are shared by what it has to prove. */
export function peerKey({ spiffeId, spkiPins, minVersion, dangerouslySkipVerification: skip }: PeerPolicy): string {
  return JSON.stringify([spiffeId, spkiPins && [...new Set(spkiPins)].sort(), minVersion ?? 'TLSv1.2', skip === true]);
}

/** The check that node:tls runs on a certificate whose chain it has already verified. */
export function checkPeer(policy: PeerPolicy): (name: string, certificate: PeerCertificate) => Error | undefined {
  return (name, certificate) => {
    const mismatch = checkServerIdentity(name, certificate);
    if (mismatch !== undefined) return mismatch;
    if (policy.spiffeId !== undefined && !hasUri(certificate, policy.spiffeId)) {
      return new Error(`the certificate does not carry ${policy.spiffeId}`);
    }
    if (policy.spkiPins !== undefined && !policy.spkiPins.includes(spkiPin(certificate))) {
      return new Error("the certificate's public key is not pinned");
    }
    return undefined;
  };
}

function hasUri(certificate: PeerCertificate, uri: string): boolean {
  return (certificate.subjectaltname ?? '').split(', ').includes(`URI:${uri}`);
}

function spkiPin(certificate: PeerCertificate): string {
  const { publicKey } = new X509Certificate(certificate.raw);
  return createHash('sha256')
    .update(publicKey.export({ type: 'spki', format: 'der' }))
    .digest('base64');
}

function isPins(value: unknown): value is readonly string[] {
  return Array.isArray(value) && value.length > 0 && value.every((pin) => isMatch(PIN, pin));
}

function isMatch(pattern: RegExp, value: unknown): value is string {
  return typeof value === 'string' && pattern.test(value);
}
