import type { IncomingHttpHeaders, OutgoingHttpHeaders } from 'node:http';
import { endToEnd } from '../headers.ts';

/** What only a kedge may say about a caller: from a client it would be a forgery. */
const SET_BY_KEDGE = new Set([
  'forwarded',
  'via',
  'x-forwarded-for',
  'x-forwarded-host',
  'x-forwarded-port',
  'x-forwarded-proto',
  'x-kedge-client-subject',
  'x-real-ip',
]);

/** What only a kedge or winch may say about an answer: from a backend it would make clients replay a request. */
const SAID_BY_KEDGE = new Set([
  'x-kedge-backend-name',
  'x-kedge-error',
  'x-kedge-error-type',
  'x-winch-error',
  'x-winch-error-type',
]);

/** What the kedge tells a backend about the caller. */
export interface Caller {
  /** The client certificate's subject, such as `CN=checkout`. */
  subject: string | undefined;
  spiffeId: string | undefined;
  address: string | undefined;
  authority: string;
  /** `1.1` or `2.0`, for `Via`. */
  version: string;
}

/** A client's headers as a backend gets them: without what was meant for us, with what we know. */
export function towardsBackend(
  headers: IncomingHttpHeaders,
  caller: Caller,
  stripProxyAuth: boolean,
): OutgoingHttpHeaders {
  const result = endToEnd(
    headers,
    (name) => !SET_BY_KEDGE.has(name) && !(stripProxyAuth && name === 'proxy-authorization'),
  );
  result['via'] = `${caller.version} kedge`;
  result['x-forwarded-proto'] = 'https';
  result['x-forwarded-host'] = caller.authority;
  if (caller.address !== undefined) result['x-forwarded-for'] = caller.address;
  if (caller.subject !== undefined) result['x-kedge-client-subject'] = caller.subject;
  return result;
}

/** Whether a route that names its clients lets this one in: by subject, or by SPIFFE ID. */
export function isAllowed(allowed: readonly string[], { subject, spiffeId }: Caller): boolean {
  return allowed.length === 0 || [subject, spiffeId].some((each) => each !== undefined && allowed.includes(each));
}

export function isSaidByKedge(name: string): boolean {
  return SAID_BY_KEDGE.has(name.toLowerCase());
}

/** A backend's headers as the client gets them. */
export function towardsClient(headers: IncomingHttpHeaders): OutgoingHttpHeaders {
  return endToEnd(headers, (name) => !SAID_BY_KEDGE.has(name));
}
