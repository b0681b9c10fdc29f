import http from 'node:http';
import type { AddressInfo } from 'node:net';
import type { Gate } from './auth.ts';
import { registry } from './metrics.ts';

export interface DebugOptions {
  address: string;
  port: number;
  metricsPath: string;
  /** Who sees more than whether the kedge is healthy, by `Authorization`. */
  gate: Gate;
  isHealthy: () => boolean;
}

/** The plain port for those who run the kedge; it serves nobody else's requests. */
export async function startDebug(options: DebugOptions): Promise<{ port: number; close(): void }> {
  const { address, port, metricsPath, gate, isHealthy } = options;
  const server = http.createServer(async (request, response) => {
    const path = request.url?.split('?')[0];
    // Probes bring no token.
    if (path === '/_healthz') response.writeHead(isHealthy() ? 200 : 503).end(isHealthy() ? 'OK\n' : 'draining\n');
    else if (!(await gate.admits(request.headers.authorization))) response.writeHead(401).end('unauthorized\n');
    else if (path === '/_version') response.end(`kedge-dialer reference kedge, Node ${process.version}\n`);
    else if (path === metricsPath) {
      response.setHeader('content-type', registry.contentType);
      response.end(await registry.metrics());
    } else response.writeHead(404).end();
  });
  await new Promise<void>((resolve, reject) => {
    server.once('error', reject);
    server.listen(port, address, resolve);
  });
  server.unref();
  return { port: (server.address() as AddressInfo).port, close: () => server.close() };
}
