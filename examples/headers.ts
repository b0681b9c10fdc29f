import type { IncomingHttpHeaders, OutgoingHttpHeaders } from 'node:http';

/** RFC 9110 §7.6.1: for the next hop only. `te: trailers` is what gRPC needs and is set anew where it matters. */
const HOP_BY_HOP = new Set([
  'connection',
  'http2-settings',
  'keep-alive',
  'proxy-authenticate',
  'proxy-connection',
  'te',
  'trailer',
  'transfer-encoding',
  'upgrade',
]);

/** Leaves out pseudo headers, hop-by-hop headers, those that `Connection` names, and what `keep` does not want. */
export function endToEnd(headers: IncomingHttpHeaders, keep: (name: string) => boolean): OutgoingHttpHeaders {
  const { connection } = headers;
  // Most often it names nothing.
  const named =
    connection === undefined || connection === 'keep-alive' || connection === 'close'
      ? undefined
      : new Set(connection.toLowerCase().split(/\s*,\s*/));
  const result: OutgoingHttpHeaders = {};
  for (const name in headers) {
    const value = headers[name];
    if (
      value === undefined ||
      name === '__proto__' ||
      name.startsWith(':') ||
      HOP_BY_HOP.has(name) ||
      named?.has(name) ||
      !keep(name)
    )
      continue;
    result[name] = value;
  }
  return result;
}
