import type { TLSSocket } from 'node:tls';

/** Who is at the other end of a connection. */
export interface Peer {
  /** The client certificate's subject, such as `CN=checkout`. */
  readonly subject: string | undefined;
  readonly spiffeId: string | undefined;
  /** By what its share of a backend is counted. */
  readonly name: string;
  /** What backends are told: name, value, name, value ... */
  readonly headers: readonly string[];
}

/** `version`: of HTTP, for `Via`. */
export function peerOf(socket: TLSSocket, version: string): Peer {
  const certificate = socket.authorized ? socket.getPeerX509Certificate() : undefined;
  const subject = certificate?.subject.replaceAll('\n', ',');
  const address = socket.remoteAddress;
  const headers = ['via', `${version} kedge`, 'x-forwarded-proto', 'https'];
  if (address !== undefined) headers.push('x-forwarded-for', address);
  if (subject !== undefined) headers.push('x-kedge-client-subject', inAscii(subject));
  return {
    subject,
    spiffeId: /(?:^|, )URI:(spiffe:\/\/[^,]+)/.exec(certificate?.subjectAltName ?? '')?.[1],
    name: subject ?? address ?? '',
    headers,
  };
}

/** Whether a route that names its clients lets this one in: by subject, or by SPIFFE ID. */
export function isAllowed(allowed: readonly string[], { subject, spiffeId }: Peer): boolean {
  return allowed.length === 0 || [subject, spiffeId].some((each) => each !== undefined && allowed.includes(each));
}

/** Names may be in any script, headers may not: the rest is percent-encoded. */
function inAscii(subject: string): string {
  return subject.toWellFormed().replace(/[^\x20-\x7e]|%/gu, encodeURIComponent);
}
