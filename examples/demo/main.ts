/**
 * Two clusters with a kedge each, and a service that calls them: `npm run demo`. Everything is real (TLS, processes,
 * proxies) and lives in a temporary folder and on 127.0.0.1 until the end.
 */
import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { pem, route } from 'kedge-dialer';
import { createAuthority } from '../pki.ts';
import { type Row, runClient } from './client.ts';

const CLUSTERS = ['eu1', 'us1'];
const folder = mkdtempSync(join(tmpdir(), 'kedge-demo-'));
const children: ChildProcess[] = [];

/** Starts a script in a process of its own and waits for the JSON line that says that it is ready. */
async function start(script: string, ...args: string[]): Promise<Record<string, unknown>> {
  const path = join(import.meta.dirname, script);
  const child = spawn(process.execPath, [path, ...args], { stdio: ['ignore', 'pipe', 'inherit'] });
  children.push(child);
  const lines = createInterface({ input: child.stdout });
  const [line] = (await Promise.race([
    once(lines, 'line'),
    once(child, 'exit').then(([code]) => [`exit ${code}`]),
  ])) as [string];
  if (!line.startsWith('{')) throw new Error(`${script} did not start: ${line}`);
  return JSON.parse(line);
}

function file(name: string, content: string | object): string {
  const path = join(folder, name);
  writeFileSync(path, typeof content === 'string' ? content : JSON.stringify(content), { mode: 0o600 });
  return path;
}

async function startCluster(cluster: string, ca: Awaited<ReturnType<typeof createAuthority>>): Promise<number> {
  const { cert, key } = await ca.issue({ cn: `kedge ${cluster}`, dns: [`${cluster}.prod.kedge.example.com`] });
  const { httpPort, grpcPort } = await start('backend.ts', cluster);
  const domain = `${cluster}.prod.clusters.local`;
  const director = {
    http: { routes: [{ backend_name: 'orders', host_matcher: `orders.shop.svc.${domain}`, port_matcher: 8080 }] },
    grpc: {
      routes: [
        {
          backend_name: 'greeter',
          service_name_matcher: 'demo.*',
          authority_host_matcher: `greeter.shop.svc.${domain}`,
        },
      ],
    },
  };
  const backendPool = {
    http: { backends: [{ name: 'orders', host: { dns_name: '127.0.0.1', port: httpPort } }] },
    grpc: { backends: [{ name: 'greeter', host: { dns_name: '127.0.0.1', port: grpcPort } }] },
  };
  const { port } = await start(
    '../kedge/main.ts',
    '--server_http_tls_port=any',
    `--server_tls_cert_file=${file(`${cluster}.crt`, cert)}`,
    `--server_tls_key_file=${file(`${cluster}.key`, key)}`,
    `--server_tls_client_ca_files=${file('ca.crt', ca.cert)}`,
    `--kedge_config_director_config_path=${file(`${cluster}-director.json`, director)}`,
    `--kedge_config_backendpool_config_path=${file(`${cluster}-backendpool.json`, backendPool)}`,
  );
  return Number(port);
}

function print(rows: Row[]): void {
  const table = [
    ['call', 'target', 'answered by', 'client the kedge saw', 'protocol', 'ms'],
    ...rows.map(({ call, target, answer, protocol, ms, error }) => [
      call,
      target,
      answer === undefined ? `FAILED: ${String(error)}` : `${answer.cluster} ${answer.backend}`,
      answer?.client ?? '',
      protocol,
      ms.toFixed(1),
    ]),
  ];
  const widths = table[0]!.map((_, column) => Math.max(...table.map((cells) => cells[column]!.length)));
  for (const cells of table)
    console.log(
      cells
        .map((cell, column) => cell.padEnd(widths[column]!))
        .join('  ')
        .trimEnd(),
    );
}

/** Ends what was started, whatever state it is in. */
async function cleanUp(): Promise<void> {
  await Promise.all(
    children.map(async (child) => {
      if (child.exitCode !== null || child.signalCode !== null) return;
      const exit = once(child, 'exit');
      child.kill('SIGTERM');
      const timer = setTimeout(() => child.kill('SIGKILL'), 3000);
      await exit;
      clearTimeout(timer);
    }),
  );
  rmSync(folder, { recursive: true, force: true });
}

try {
  const ca = await createAuthority('demo CA');
  const { cert, key } = await ca.issue({ cn: 'checkout' });
  const [neighbour, ...ports] = await Promise.all([
    start('backend.ts', 'home').then(({ httpPort }) => `127.0.0.1:${httpPort}`),
    ...CLUSTERS.map((cluster) => startCluster(cluster, ca)),
  ]);
  const clusters = new Map(
    CLUSTERS.map((cluster, i) => {
      // In production the kedge's name resolves; here it is given beside the address.
      const serverName = `${cluster}.prod.kedge.example.com`;
      return [cluster, route({ kedge: `https://127.0.0.1:${ports[i]}`, serverName })];
    }),
  );
  const { rows, handshakes } = await runClient({ identity: pem({ cert, key, ca: ca.cert }), clusters, neighbour });
  print(rows);
  const failed = rows.filter(({ error }) => error !== undefined).length;
  console.log(`demo: ${rows.length} calls, ${failed} failed, ${handshakes} TLS handshakes`);
  if (failed > 0) process.exitCode = 1;
} finally {
  await cleanUp();
}
