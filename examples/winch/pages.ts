import { once } from 'node:events';
import { readFileSync } from 'node:fs';
import http from 'node:http';
import type { TokenSource } from 'kedge-dialer';
import { Counter, Registry } from 'prom-client';

/** What winch counts. */
export class Metrics {
  readonly registry = new Registry();
  readonly requests = new Counter({
    name: 'winch_requests_total',
    help: 'Proxied HTTP requests by status',
    labelNames: ['status'],
    registers: [this.registry],
  });
}

export interface PagesOptions {
  /** The proxy's own, for the allow-list of hosts. */
  readonly port: number;
  readonly pac: string;
  readonly tokenSources: ReadonlyMap<string, TokenSource>;
  readonly metrics: Metrics;
  /** Undefined: they are shown elsewhere. */
  readonly metricsPath: string | undefined;
  onCallback(url: URL): boolean;
}

/**
 * Winch's own pages. Only for who asks for this machine by its own name: a page elsewhere whose name resolves to 127.0.0.1
 * (DNS rebinding) gets nothing.
 */
export function pages({ port, pac, tokenSources, metrics: { registry }, metricsPath, onCallback }: PagesOptions) {
  const hosts = new Set(['127.0.0.1', 'localhost', '[::1]'].map((name) => `${name}:${port}`));
  return async (request: http.IncomingMessage, response: http.ServerResponse): Promise<void> => {
    const answer = (status: number, text: string, type = 'text/plain') =>
      response.writeHead(status, { 'content-type': type }).end(text);
    const url = URL.parse(request.url!, `http://127.0.0.1:${port}`);
    if (!hosts.has((request.headers.host ?? '').toLowerCase())) {
      answer(403, 'winch: this is not how winch is called\n');
    } else if (url === null) {
      answer(400, 'winch: not a path\n');
    } else if (url.pathname === '/wpad.dat') {
      answer(200, pac, 'application/x-ns-proxy-autoconfig');
    } else if (url.pathname === '/version') {
      answer(200, `kedge-dialer winch, Node ${process.version}\n`);
    } else if (url.pathname === metricsPath) {
      answer(200, await registry.metrics(), registry.contentType);
    } else if (url.pathname.startsWith(CLEAR)) {
      // A page elsewhere may point here, but changes nothing (https://www.w3.org/TR/fetch-metadata/).
      if (!/^(?:none|same-origin)$/.test(String(request.headers['sec-fetch-site'] ?? 'none'))) {
        answer(403, 'winch: not from another page\n');
        return;
      }
      const source = tokenSources.get(decodeURIComponent(url.pathname.slice(CLEAR.length)));
      source?.invalidate?.();
      if (source === undefined) answer(404, 'no such source\n');
      else answer(200, 'cleared\n');
    } else if (onCallback(url)) {
      answer(200, 'You are logged in. This page can be closed.\n');
    } else {
      answer(404, 'winch: a proxy for http: URLs; its own pages are /wpad.dat, /version and /metrics\n');
    }
  };
}

const CLEAR = '/winch/cleartoken/';

/** `host:port`: the metrics at an address of their own, such as for a collector elsewhere, and nothing else. */
export async function startMonitoring(address: string, path: string, { registry }: Metrics): Promise<http.Server> {
  const [, host, port] = /^\[?([^\]]*?)\]?:([0-9]{1,5})$/.exec(address) ?? [];
  if (port === undefined) throw new Error('--server_http_monitoring_address is host:port');
  const server = http.createServer(async (request, response) => {
    if (request.url !== path) response.writeHead(404).end();
    else response.setHeader('content-type', registry.contentType).end(await registry.metrics());
  });
  server.listen(Number(port), host || undefined);
  await once(server, 'listening');
  return server;
}

/** A file, or a script for hosts of these expressions, which become string literals and nothing else; none: every host. */
export function pacOf(file: string, expressions: readonly string[], port: number): string {
  if (file !== '') return readFileSync(file, 'utf8');
  const conditions = expressions.map((each) => `shExpMatch(host, ${JSON.stringify(each)})`);
  return `function FindProxyForURL(url, host) {
  if (isPlainHostName(host) || !shExpMatch(url, "http:*")) return "DIRECT";
  if (${conditions.join(' || ') || 'true'}) return "PROXY 127.0.0.1:${port}; DIRECT";
  return "DIRECT";
}
`;
}
