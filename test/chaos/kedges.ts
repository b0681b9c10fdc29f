import { writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';
import { authority, KEDGE_NAME, type KedgeHandler, startKedge, type TestKedge } from '../helpers/kedge.ts';
import { type NodeProcess, spawnNode } from '../helpers/process.ts';
import { tempDir } from '../helpers/temp.ts';
import { answer, startBackend } from './backend.ts';
import { Relay } from './relay.ts';
import type { World } from './world.ts';

const PROGRAM = fileURLToPath(new URL('../../examples/kedge/main.ts', import.meta.url));

/** On a busy machine more calls are under way when a connection is lost than the default budget sends again. */
export const AMPLE_BUDGET = { failover: { retryBudget: 1 } } as const;

/** Two reference kedges in processes of their own, each behind a relay, before one backend. */
export interface Pair {
  readonly processes: NodeProcess<{ port: number }>[];
  readonly relays: readonly Relay[];
  /** By way of the relays. */
  readonly urls: string[];
  /** Past the relays, where the kernel shall speak for the process. */
  readonly direct: string[];
  /** Starts the process of a kedge again, on its port. */
  restart(index: number): Promise<void>;
}

export async function startPair(world: World): Promise<Pair> {
  const ca = await authority();
  const [dir, ports, server] = await Promise.all([
    tempDir(world.asTest),
    startBackend(world, world.ledger),
    ca.issue({ cn: KEDGE_NAME, dns: [KEDGE_NAME] }),
  ]);
  world.secrets.add(server.key);
  const backend = (port: number) => [{ name: 'all', host: { dns_name: '127.0.0.1', port } }];
  const routes = { routes: [{ backend_name: 'all' }] };
  const files = {
    server_tls_cert_file: server.cert,
    server_tls_key_file: server.key,
    server_tls_client_ca_files: ca.cert,
    kedge_config_director_config_path: JSON.stringify({ http: routes, grpc: routes }),
    kedge_config_backendpool_config_path: JSON.stringify({
      http: { backends: backend(ports.http) },
      grpc: { backends: backend(ports.grpc) },
    }),
  };
  const flags = [`--unsafe_bearer_token_proxy_auth=${world.token}`];
  for (const [name, content] of Object.entries(files)) {
    writeFileSync(join(dir, name), content);
    flags.push(`--${name}=${join(dir, name)}`);
  }
  const start = async (port: number | 'any') => {
    const kedge = await spawnNode<{ port: number }>(world.asTest, PROGRAM, [
      `--server_http_tls_port=${port}`,
      ...flags,
    ]);
    world.after(() => world.secrets.scan('the output of a kedge', kedge.output));
    return kedge;
  };
  const processes = await Promise.all([start('any'), start('any')]);
  const relays = await Promise.all(processes.map(({ ready }) => world.relay(ready.port)));
  return {
    processes,
    relays,
    urls: relays.map(({ url }) => url),
    direct: processes.map(({ ready }) => `https://127.0.0.1:${ready.port}`),
    restart: async (index) => {
      processes[index] = await start(processes[index]!.ready.port);
    },
  };
}

/** A kedge in this process whose handler decides what goes wrong; by default it answers as a backend would. */
export function startFaulty(world: World, handler?: KedgeHandler): Promise<TestKedge> {
  return startKedge(world.asTest, {
    settings: { maxConcurrentStreams: 1000 },
    handler: handler ?? ((request, response) => void answer(world.ledger, request, response)),
  });
}

export async function startRelay(upstream: number, at: { host?: string; port?: number } = {}): Promise<Relay> {
  return await Object.assign(new Relay(upstream), at).listen();
}

/** Asks every 10 ms; false when it is not so in time. */
export async function until(isSo: () => boolean, timeoutMs: number): Promise<boolean> {
  const end = performance.now() + timeoutMs;
  while (!isSo()) {
    if (performance.now() > end) return false;
    await sleep(10);
  }
  return true;
}
