import { createHash, X509Certificate } from 'node:crypto';
import { checkServerIdentity, type PeerCertificate } from 'node:tls';
import { KedgeError } from '../support/errors.ts';

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

const FIELDS = new Set(['spiffeId', 'spkiPins', 'minVersion', 'dangerouslySkipVerification']);
const PIN = /^[A-Za-z0-9+/]{43}=$/;
const SPIFFE_ID = /^spiffe:\/\/[a-z0-9._-]{1,255}(?:\/[A-Za-z0-9._-]+)*$/;

/**
 * Checks a policy and freezes a copy of it.
 *
 * @throws {@link KedgeError} `ERR_KEDGE_OPTIONS`
 */
export function peerPolicy(init: PeerPolicy): PeerPolicy {
  if (typeof init !== 'object' || init === null) throw invalid('`peer` is an object');
  const unknown = Object.keys(init).find((name) => !FIELDS.has(name));
  if (unknown !== undefined) throw invalid(`\`peer\` has no option \`${unknown}\``);
  const { spiffeId, spkiPins, minVersion, dangerouslySkipVerification: skip } = init;
  if (spiffeId !== undefined && !SPIFFE_ID.test(spiffeId)) throw invalid('`peer.spiffeId` is not a SPIFFE ID');
  if (spkiPins !== undefined) {
    if (!Array.isArray(spkiPins) || spkiPins.length === 0 || !spkiPins.every((pin) => PIN.test(pin))) {
      throw invalid('`peer.spkiPins` is a list of base64 SHA-256 hashes');
    }
  }
  if (minVersion !== undefined && minVersion !== 'TLSv1.2' && minVersion !== 'TLSv1.3') {
    throw invalid('`peer.minVersion` is "TLSv1.2" or "TLSv1.3"');
  }
  if (skip !== undefined && typeof skip !== 'boolean') throw invalid('`peer.dangerouslySkipVerification` is a boolean');
  if (skip === true && (spiffeId !== undefined || spkiPins !== undefined)) {
    throw invalid('`peer.dangerouslySkipVerification` contradicts `spiffeId` and `spkiPins`');
  }
  return Object.freeze({ ...init, ...(spkiPins === undefined ? {} : { spkiPins: Object.freeze([...spkiPins]) }) });
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

function invalid(reason: string): KedgeError {
  return new KedgeError('ERR_KEDGE_OPTIONS', reason);
}
