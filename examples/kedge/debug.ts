import http from 'node:http';
import type { AddressInfo } from 'node:net';
import { Counter, collectDefaultMetrics, Gauge, Registry } from 'prom-client';
import type { Gate } from './auth.ts';

/** What a kedge counts. */
export class Metrics {
  readonly registry = new Registry();
  /** Requests and calls by wire and by what became of them. */
  readonly requests = new Counter({
    name: 'kedge_requests_total',
    help: 'Requests and calls that came in',
    labelNames: ['wire', 'status'],
    registers: [this.registry],
  });
  readonly connections = new Gauge({
    name: 'kedge_connections',
    help: 'Open client connections',
    registers: [this.registry],
  });
  readonly reloads = new Counter({
    name: 'kedge_configuration_reloads_total',
    help: 'Changed configurations, by whether they were taken',
    labelNames: ['taken'],
    registers: [this.registry],
  });

  private readonly counts = new Map<string, ReturnType<typeof this.requests.labels>>();

  constructor() {
    collectDefaultMetrics({ register: this.registry });
  }

  /** `status`: of HTTP, or of gRPC. */
  count(wire: string, status: number | string): void {
    const key = `${wire} ${status}`;
    let counter = this.counts.get(key);
    if (counter === undefined) {
      counter = this.requests.labels(wire, String(status));
      this.counts.set(key, counter);
    }
    counter.inc();
  }
}

export interface DebugOptions {
  address: string;
  port: number;
  metricsPath: string;
  /** Who sees more than whether the kedge is healthy, by `Authorization`. */
  gate: Gate;
  metrics: Metrics;
  isHealthy: () => boolean;
}

/** The plain port for those who run the kedge; it serves nobody else's requests. */
export async function startDebug(options: DebugOptions): Promise<{ port: number; close(): void }> {
  const { address, port, metricsPath, gate, metrics, isHealthy } = options;
  const server = http.createServer(async (request, response) => {
    const path = request.url?.split('?')[0];
    // Probes bring no token.
    if (path === '/_healthz') response.writeHead(isHealthy() ? 200 : 503).end(isHealthy() ? 'OK\n' : 'draining\n');
    else if (!(await gate.admits(request.headers.authorization))) response.writeHead(401).end('unauthorized\n');
    else if (path === '/_version') response.end(`kedge-dialer reference kedge, Node ${process.version}\n`);
    else if (path === metricsPath) {
      response.setHeader('content-type', metrics.registry.contentType);
      response.end(await metrics.registry.metrics());
    } else response.writeHead(404).end();
  });
  await new Promise<void>((resolve, reject) => {
    server.once('error', reject);
    server.listen(port, address, resolve);
  });
  server.unref();
  return { port: (server.address() as AddressInfo).port, close: () => server.close() };
}
