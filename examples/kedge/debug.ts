import http from 'node:http';
import type { AddressInfo } from 'node:net';
import { Registry } from 'prom-client';
import type { Gate } from './auth.ts';
import type { Program } from './program.ts';

export interface DebugOptions {
  address: string;
  port: number;
  metricsPath: string;
  /** Who sees more than whether the kedge is healthy, by `Authorization`. */
  gate: Gate;
  program: Program;
  /** As the original's flagz. */
  flags: object;
  isHealthy: () => boolean;
}

/** The plain port for those who run the kedge; it serves nobody else's requests. */
export async function startDebug(options: DebugOptions): Promise<{ port: number; close(): void }> {
  const { address, port, metricsPath, gate, program, flags, isHealthy } = options;
  const json = async (what: unknown) => ['application/json', `${JSON.stringify(await what, undefined, 2)}\n`];
  const pages: Record<string, () => Promise<string[]>> = {
    '/_version': async () => ['text/plain', `kedge-dialer reference kedge, Node ${process.version}\n`],
    '/debug/flagz': () => json(flags),
    '/debug/routes': () => json(program.routes()),
    [metricsPath]: async () => [Registry.PROMETHEUS_CONTENT_TYPE, await program.metrics()],
  };
  const server = http.createServer(async (request, response) => {
    const path = request.url?.split('?')[0] ?? '';
    const answer = (status: number, type: string, text: string) =>
      response.writeHead(status, { 'content-type': type }).end(text);
    try {
      // Probes bring no token.
      if (path === '/_healthz') answer(isHealthy() ? 200 : 503, 'text/plain', isHealthy() ? 'OK\n' : 'draining\n');
      else if (!(await gate.admits(request.headers.authorization))) answer(401, 'text/plain', 'unauthorized\n');
      else if (!Object.hasOwn(pages, path)) answer(404, 'text/plain', 'not found\n');
      else {
        const [type, text] = await pages[path]!();
        answer(200, type!, text!);
      }
    } catch (error) {
      answer(503, 'text/plain', `${(error as Error).message}\n`);
    }
  });
  await new Promise<void>((resolve, reject) => {
    server.once('error', reject);
    server.listen(port, address, resolve);
  });
  server.unref();
  return { port: (server.address() as AddressInfo).port, close: () => server.close() };
}
