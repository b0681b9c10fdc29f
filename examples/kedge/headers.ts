import type { IncomingHttpHeaders, OutgoingHttpHeaders } from 'node:http';
import { endToEnd } from '../headers.ts';
import type { Peer } from './peer.ts';

/**
 * What a backend does not get from a client: what is for the next hop only (RFC 9110 §7.6.1), what is for us, and what only
 * a kedge may say about a caller.
 */
const NOT_FOR_BACKENDS = new Set([
  'connection',
  'expect',
  'forwarded',
  'host',
  'http2-settings',
  'keep-alive',
  'proxy-authenticate',
  'proxy-authorization',
  'proxy-connection',
  'te',
  'trailer',
  'transfer-encoding',
  'upgrade',
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

/** What never stands in trailers (RFC 9110 §6.5.1): it would change how the message or the connection is read. */
const NEVER_TRAILERS = new Set(['content-encoding', 'content-length', 'content-range', 'content-type', 'host']);

/** What a client said in the head of a request. */
export interface Head {
  /** For the backend: name, value, name, value ... */
  readonly headers: string[];
  readonly host: string | undefined;
  readonly proxyAuthorization: string | undefined;
  readonly upgrade: string | undefined;
  readonly expects: boolean;
  /** `X-Kedge-Info-Logs`: the caller wants a line in the log. */
  readonly infoLogs: string | undefined;
  /** Whether it announces a body in HTTP/1.1. */
  readonly hasBody: boolean;
}

/**
 * Reads the raw headers of a request: without what was meant for us, with what we know of the peer. Undefined when nobody can
 * tell which one counts: with two hosts (RFC 9112 §3.2) or two `Proxy-Authorization`.
 */
export function readHead(raw: readonly string[], peer: Peer): Head | undefined {
  const headers: string[] = [];
  let host: string | undefined;
  let proxyAuthorization: string | undefined;
  let upgrade: string | undefined;
  let connection = '';
  let cookie: string | undefined;
  let infoLogs: string | undefined;
  let expects = false;
  let hasBody = false;
  for (let i = 0; i < raw.length; i += 2) {
    const name = raw[i]!.toLowerCase();
    const value = raw[i + 1]!;
    if (name.charCodeAt(0) === COLON) continue;
    if (NOT_FOR_BACKENDS.has(name)) {
      if (name === 'host') {
        if (host !== undefined) return undefined;
        host = value;
      } else if (name === 'proxy-authorization') {
        if (proxyAuthorization !== undefined) return undefined;
        proxyAuthorization = value;
      } else if (name === 'connection') connection += `,${value}`;
      else if (name === 'upgrade') upgrade = value;
      else if (name === 'expect') expects = true;
      else if (name === 'transfer-encoding') hasBody = true;
    } else if (name === 'cookie') {
      // HTTP/2 may cut it in pieces (RFC 9113 §8.2.3).
      cookie = cookie === undefined ? value : `${cookie}; ${value}`;
    } else if (!isTwin(name)) {
      if (name === 'content-length' && value !== '0') hasBody = true;
      else if (name === 'x-kedge-info-logs') infoLogs = value;
      headers.push(name, value);
    }
  }
  if (cookie !== undefined) headers.push('cookie', cookie);
  const kept = /[^\s,]/.test(connection) ? withoutNamed(headers, connection) : headers;
  kept.push(...peer.headers);
  return { headers: kept, host, proxyAuthorization, upgrade, expects, infoLogs, hasBody };
}

const COLON = 58;

/** CGI, WSGI and others take `X_Real_IP` for `X-Real-IP`. */
function isTwin(name: string): boolean {
  return name.includes('_') && NOT_FOR_BACKENDS.has(name.replaceAll('_', '-'));
}

/** What `Connection` names is for us only (RFC 9110 §7.6.1), but for the length: without it the body would be another one. */
function withoutNamed(headers: string[], connection: string): string[] {
  const named = new Set(connection.toLowerCase().split(/[\s,]+/));
  named.delete('content-length');
  if (!headers.some((name, i) => i % 2 === 0 && named.has(name))) return headers;
  return headers.filter((_, i) => !named.has(headers[i - (i % 2)]!));
}

/** All values of each header, by its name in lower case. */
export function valuesOf(raw: readonly string[]): Record<string, string[]> {
  const values: Record<string, string[]> = Object.create(null);
  for (let i = 0; i < raw.length; i += 2) {
    const name = raw[i]!.toLowerCase();
    values[name] ??= [];
    values[name].push(raw[i + 1]!);
  }
  return values;
}

/** The first value of a header, which is named in lower case. */
export function firstOf(headers: readonly string[], name: string): string | undefined {
  for (let i = 0; i < headers.length; i += 2) if (headers[i] === name) return headers[i + 1];
  return undefined;
}

/** A backend's headers as the client gets them; throws when one could not be sent as it is. */
export function towardsClient(headers: IncomingHttpHeaders): OutgoingHttpHeaders {
  const result = endToEnd(headers, isForClients);
  for (const name in result) {
    const value = result[name];
    if (
      typeof value === 'string' ? INVALID.test(value) : Array.isArray(value) && value.some((each) => INVALID.test(each))
    )
      throw new Error(`the backend sent an invalid ${name}`);
  }
  return result;
}

/** A backend's trailers; those that could not be sent as they are, are left out. */
export function trailersTowardsClient(trailers: IncomingHttpHeaders): OutgoingHttpHeaders {
  return endToEnd(
    trailers,
    (name) =>
      isForClients(name) &&
      !NEVER_TRAILERS.has(name) &&
      ![trailers[name]].flat().some((each) => INVALID.test(each ?? '')),
  );
}

const INVALID = /[^\t\x20-\x7e\x80-\xff]/;

function isForClients(name: string): boolean {
  return !SAID_BY_KEDGE.has(name);
}
