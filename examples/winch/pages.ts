import { once } from 'node:events';
import http from 'node:http';
import type { TokenSource } from 'kedge-dialer';
import { Counter, Registry } from 'prom-client';
import { readFlagFile } from '../flags.ts';

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
  /** The proxy's own port, for the PAC file and the allow-list. */
  readonly port: number;
  /** Shell expressions of hosts that go through winch, comma separated; empty: every host. */
  readonly pacExpressions: string;
  /** A file to serve in place of the PAC. */
  readonly pacFile: string;
  readonly tokenSources: ReadonlyMap<string, TokenSource>;
  readonly metrics: Metrics;
  readonly metricsPath: string;
  /** Somebody came back from logging in. True when that one was expected. */
  onCallback(url: URL): boolean;
}

/**
 * Winch's own pages. Only for who asks for this machine by its own name: a page elsewhere whose name resolves to 127.0.0.1
 * (DNS rebinding) gets nothing.
 */
export function pages(
  options: PagesOptions,
): (request: http.IncomingMessage, response: http.ServerResponse) => Promise<void> {
  const { port, metrics, tokenSources } = options;
  const hosts = new Set(['127.0.0.1', 'localhost', '[::1]'].map((name) => `${name}:${port}`));
  const pac = options.pacFile === '' ? pacOf(options.pacExpressions, port) : readFlagFile('pac_file', options.pacFile);
  return async (request, response) => {
    const url = URL.parse(request.url!, `http://127.0.0.1:${port}`);
    if (!hosts.has((request.headers.host ?? '').toLowerCase())) {
      response.writeHead(403).end('winch: this is not how winch is called\n');
    } else if (url === null) {
      response.writeHead(400).end();
    } else if (url.pathname === '/wpad.dat') {
      response.setHeader('content-type', 'application/x-ns-proxy-autoconfig');
      response.end(pac);
    } else if (url.pathname === '/version') {
      response.end(`kedge-dialer winch, Node ${process.version}\n`);
    } else if (url.pathname === options.metricsPath) {
      response.setHeader('content-type', metrics.registry.contentType);
      response.end(await metrics.registry.metrics());
    } else if (url.pathname.startsWith('/winch/cleartoken/')) {
      // A page elsewhere may point here, but changes nothing (https://www.w3.org/TR/fetch-metadata/).
      if (!/^(?:none|same-origin)$/.test(String(request.headers['sec-fetch-site'] ?? 'none'))) {
        response.writeHead(403).end('winch: not from another page\n');
        return;
      }
      const source = tokenSources.get(decodeURIComponent(url.pathname.slice('/winch/cleartoken/'.length)));
      source?.invalidate?.();
      response.writeHead(source === undefined ? 404 : 200).end(source === undefined ? 'no such source\n' : 'cleared\n');
    } else if (options.onCallback(url)) {
      response.end('You are logged in. This page can be closed.\n');
    } else {
      response
        .writeHead(404)
        .end('winch: a proxy for http: URLs; its own pages are /wpad.dat, /version and /metrics\n');
    }
  };
}

/** `host:port`: the metrics at an address of their own, such as for a collector elsewhere, and nothing else. */
export async function startMonitoring(
  address: string,
  path: string,
  { registry }: Metrics,
): Promise<http.Server | undefined> {
  if (address === '') return undefined;
  const [, host, port] = /^\[?([^\]]*?)\]?:([0-9]{1,5})$/.exec(address) ?? [];
  if (port === undefined) throw new Error('--server_http_monitoring_address is host:port');
  const server = http.createServer(async (request, response) => {
    if (request.url !== path) response.writeHead(404).end();
    else response.setHeader('content-type', registry.contentType).end(await registry.metrics());
  });
  server.listen(Number(port), host || '0.0.0.0');
  await once(server, 'listening');
  return server;
}

/** Expressions become string literals of the script and nothing else. */
function pacOf(expressions: string, port: number): string {
  const conditions = expressions
    .split(',')
    .map((each) => each.trim())
    .filter(Boolean)
    .map((each) => `shExpMatch(host, ${JSON.stringify(each)})`);
  return `function FindProxyForURL(url, host) {
  if (isPlainHostName(host) || !shExpMatch(url, "http:*")) return "DIRECT";
  if (${conditions.join(' || ') || 'true'}) return "PROXY 127.0.0.1:${port}; DIRECT";
  return "DIRECT";
}
`;
}
