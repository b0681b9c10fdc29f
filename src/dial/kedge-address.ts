import { isIP } from 'node:net';
import { KedgeError, quote } from '../support/errors.ts';
import { canonicalHost } from '../target.ts';

/** What is dialled: one kedge's address and the name that it has to prove. */
export interface KedgeAddress {
  /** `https://host:port`; the pools' origin. */
  readonly origin: string;
  /** `host:port`, for people. */
  readonly name: string;
  /** A DNS name, or an IP address without brackets. */
  readonly hostname: string;
  readonly port: number;
  /** False only for an `http:` kedge, which never sees a token or a client certificate. */
  readonly secure: boolean;
  /** Sent as SNI; empty where the kedge is an IP address (RFC 6066 allows names only). */
  readonly sni: string;
  /** The name or address that the certificate must be for. */
  readonly verifyName: string;
}

/**
 * A kedge URL with everything that could be misread refused.
 *
 * @throws {@link KedgeError} `ERR_KEDGE_ROUTE`
 */
export function kedgeAddress(url: URL, serverName?: string): KedgeAddress {
  const { protocol } = url;
  if (protocol !== 'https:' && protocol !== 'http:') throw invalid(url, 'the scheme is not https or http');
  if (url.username !== '' || url.password !== '') throw invalid(url, 'credentials in the URL');
  if ((url.pathname !== '/' && url.pathname !== '') || url.search !== '' || url.hash !== '') {
    throw invalid(url, 'a kedge URL has no path, query or fragment');
  }
  if (url.port === '0') throw invalid(url, 'port 0');
  const secure = protocol === 'https:';
  const host = hostOf(url);
  const hostname = host.startsWith('[') ? host.slice(1, -1) : host;
  const port = url.port === '' ? (secure ? 443 : 80) : Number(url.port);
  const verifyName = serverName ?? hostname;
  return Object.freeze({
    origin: `${protocol}//${host}:${port}`,
    name: `${host}:${port}`,
    hostname,
    port,
    secure,
    sni: isIP(verifyName) === 0 ? verifyName : '',
    verifyName,
  });
}

function hostOf(url: URL): string {
  try {
    return canonicalHost(url.hostname, url.hostname);
  } catch (cause) {
    throw invalid(url, 'the host is not a valid name', cause);
  }
}

function invalid(url: URL, reason: string, cause?: unknown): KedgeError {
  return new KedgeError('ERR_KEDGE_ROUTE', `kedge URL ${quote(url.href)}: ${reason}`, { cause });
}
