import { once } from 'node:events';
import http from 'node:http';
import type { TokenSource } from 'kedge-dialer';
import type { Registry } from 'prom-client';
import { readFlagFile } from '../flags.ts';
import type { Logins } from './logins.ts';

export interface Metrics {
  readonly registry: Registry;
  readonly path: string;
}

export interface PagesOptions {
  /** The proxy's own, for the allow-list of hosts. */
  readonly port: number;
  readonly pac: string;
  readonly tokenSources: ReadonlyMap<string, TokenSource>;
  readonly logins: Logins;
  /** Undefined: they are shown elsewhere. */
  readonly metrics: Metrics | undefined;
}

const CLEAR = '/winch/cleartoken/';

/**
 * Winch's own pages. Only for who asks for this machine by its own name: a page elsewhere whose name resolves to 127.0.0.1
 * (DNS rebinding) gets nothing.
 */
export function pages({ port, pac, tokenSources, logins, metrics }: PagesOptions) {
  const hosts = new Set(['127.0.0.1', 'localhost', '[::1]'].map((name) => `${name}:${port}`));
  const clear = (name: string, from: string): [status: number, text: string] => {
    // A page elsewhere may point here, but changes nothing (https://www.w3.org/TR/fetch-metadata/).
    if (from !== 'none' && from !== 'same-origin') return [403, 'winch: not from another page\n'];
    const source = tokenSources.get(name);
    source?.invalidate?.();
    return source === undefined ? [404, 'no such source\n'] : [200, 'cleared\n'];
  };
  return async ({ url: target, headers }: http.IncomingMessage, response: http.ServerResponse): Promise<void> => {
    const answer = (status: number, text: string, type = 'text/plain') =>
      response.writeHead(status, { 'content-type': type }).end(text);
    const url = new URL(target!.replace(/^\/+/, '/'), `http://127.0.0.1:${port}`);
    const { pathname: path } = url;
    if (!hosts.has((headers.host ?? '').toLowerCase())) answer(403, 'winch: this is not how winch is called\n');
    else if (path === '/wpad.dat') answer(200, pac, 'application/x-ns-proxy-autoconfig');
    else if (path === '/version') answer(200, `kedge-dialer winch, Node ${process.version}\n`);
    else if (path === metrics?.path) await show(metrics, response);
    else if (path.startsWith(CLEAR))
      answer(...clear(decodeURIComponent(path.slice(CLEAR.length)), String(headers['sec-fetch-site'] ?? 'none')));
    else if (logins.end(url)) answer(200, 'You are logged in. This page can be closed.\n');
    else answer(404, 'winch: a proxy for http: URLs; its own pages are /wpad.dat, /version and /metrics\n');
  };
}

/** `host:port`: the metrics at an address of their own, such as for a collector elsewhere, and nothing else. */
export async function startMonitoring(address: string, metrics: Metrics): Promise<http.Server> {
  const [, host, port] = /^\[?([^\]]*?)\]?:([0-9]{1,5})$/.exec(address) ?? [];
  if (port === undefined) throw new Error('--server_http_monitoring_address is host:port');
  const server = http.createServer((request, response) => {
    if (request.url === metrics.path) void show(metrics, response);
    else response.writeHead(404).end();
  });
  server.listen(Number(port), host || undefined);
  await once(server, 'listening');
  return server;
}

async function show({ registry }: Metrics, response: http.ServerResponse): Promise<void> {
  response.setHeader('content-type', registry.contentType).end(await registry.metrics());
}

/** A file, or a script for hosts of these expressions, which become string literals and nothing else; none: every host. */
export function pacOf(file: string, expressions: readonly string[], port: number): string {
  if (file !== '' && expressions.length > 0)
    throw new Error('--pac_file and --pac_redirect_sh_expressions are two answers to the same question: give one');
  if (file !== '') return readFlagFile('pac_file', file);
  const conditions = expressions.map((each) => `shExpMatch(host, ${JSON.stringify(each)})`);
  return `function FindProxyForURL(url, host) {
  if (isPlainHostName(host) || !shExpMatch(url, "http:*")) return "DIRECT";
  if (${conditions.join(' || ') || 'true'}) return "PROXY 127.0.0.1:${port}; DIRECT";
  return "DIRECT";
}
`;
}
