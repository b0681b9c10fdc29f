import tls from 'node:tls';
import type { AnySnapshot } from '../identity/identity.ts';
import { codeOf, KedgeError, type KedgeErrorCode } from '../support/errors.ts';
import { because } from './dial-error.ts';
import type { KedgeAddress } from './kedge-address.ts';
import { checkPeer, type PeerPolicy } from './peer.ts';

/** Alerts by which a TLS peer rejects the certificate it was shown (RFC 8446 §6.2). */
const REFUSED_CLIENT_CERTIFICATE =
  /_ALERT_(?:BAD_CERTIFICATE|UNSUPPORTED_CERTIFICATE|CERTIFICATE_(?:REVOKED|EXPIRED|UNKNOWN|REQUIRED)|UNKNOWN_CA|ACCESS_DENIED)$/;

/** The alert of a TLS peer that speaks none of the protocols offered (RFC 7301 §3.2). */
const NO_PROTOCOL = /_ALERT_NO_APPLICATION_PROTOCOL$/;

/** node:tls codes that say that the peer's certificate failed verification (Node.js documentation, "X509 certificate error codes"). */
const UNTRUSTED_CERTIFICATE =
  /^(?:ERR_TLS_CERT_|UNABLE_TO_|CERT_|CRL_|DEPTH_ZERO_|SELF_SIGNED_|ERROR_IN_CERT_|INVALID_(?:CA|PURPOSE)|PATH_LENGTH_|HOSTNAME_MISMATCH)/;

/** Those of them that say that we do not know who signed it. */
const UNKNOWN_CA =
  /^(?:UNABLE_TO_(?:VERIFY_LEAF_SIGNATURE|GET_ISSUER_CERT(?:_LOCALLY)?)|(?:DEPTH_ZERO_)?SELF_SIGNED_CERT(?:_IN_CHAIN)?|CERT_UNTRUSTED)$/;

/**
 * What every TLS connection of a kedge has in common.
 *
 * @throws {@link KedgeError} `ERR_KEDGE_IDENTITY`
 */
export function tlsOptions(
  address: KedgeAddress,
  identity: AnySnapshot | undefined,
  peer: PeerPolicy,
): tls.ConnectionOptions {
  return {
    // One context for all connections: making it costs more than a handshake with it.
    secureContext: secureContext(identity, peer),
    servername: address.sni,
    // What node:tls verifies where there is no SNI.
    host: address.verifyName,
    checkServerIdentity: checkPeer(peer),
    // Explicit, so that NODE_TLS_REJECT_UNAUTHORIZED=0 does not reach us.
    rejectUnauthorized: peer.dangerouslySkipVerification !== true,
  };
}

/** Whether a kedge only lacks the protocol that one call needs. */
export function lacksProtocol(error: Error | undefined): boolean {
  return NO_PROTOCOL.test(codeOf(error));
}

export function refusesClientCertificate(error: Error | undefined): boolean {
  return REFUSED_CLIENT_CERTIFICATE.test(codeOf(error));
}

/** What a handshake that failed, or was undone, is called. */
export function tlsFailure(
  error: Error | undefined,
  identity: AnySnapshot | undefined,
): { readonly code: KedgeErrorCode; readonly reason: string } {
  const code = codeOf(error);
  if (refusesClientCertificate(error)) {
    const own =
      identity?.subject === undefined ? 'no client certificate' : `our client certificate ${identity.subject}`;
    return { code: 'ERR_KEDGE_CLIENT_CERTIFICATE', reason: `the kedge refused ${own}` };
  }
  if (UNTRUSTED_CERTIFICATE.test(code) || (error instanceof Error && code === '')) {
    const hint = UNKNOWN_CA.test(code) ? caHint(identity) : '';
    const reason = `the kedge's certificate was not accepted${because(error)}${hint}`;
    return { code: 'ERR_KEDGE_CERTIFICATE', reason };
  }
  return { code: 'ERR_KEDGE_TLS', reason: `TLS handshake failed${because(error)}` };
}

function caHint(identity: AnySnapshot | undefined): string {
  const trusted =
    identity?.ca === undefined
      ? "it is not from a CA of the system, and the identity, the dialer's or the route's, has no `ca`"
      : "it is not from a CA in `ca` of the identity, the dialer's or the route's";
  return `; ${trusted} (\`kedge-dialer check\` says who issued it)`;
}

function secureContext(identity: AnySnapshot | undefined, peer: PeerPolicy): tls.SecureContext {
  try {
    return tls.createSecureContext({
      cert: identity?.cert,
      key: identity?.key,
      pfx: identity?.pfx,
      passphrase: identity?.passphrase,
      ca: identity?.ca,
      minVersion: peer.minVersion ?? 'TLSv1.2',
    });
  } catch (cause) {
    throw new KedgeError('ERR_KEDGE_IDENTITY', 'certificate and key cannot be used for TLS', { stage: 'tls', cause });
  }
}
