import type { KubeConfig } from '@kubernetes/client-node';
import { AccessLog } from './access-log.ts';
import type { Gate } from './auth.ts';
import type { Files, Server } from './files.ts';
import { metrics, registry } from './metrics.ts';
import { startKedge } from './server.ts';
import type { DiscoveryOptions } from './services.ts';
import { State } from './state.ts';

/** What the flags say of one process. */
export interface Settings {
  address: string;
  port: number;
  grpcPort: number | undefined;
  clientCertRequired: boolean;
  maxHeaderBytes: number;
  drainMs: number;
  logLevel: string;
  discovery: DiscoveryOptions | undefined;
  cluster: () => KubeConfig;
}

/** A kedge in this process, or in several others. */
export interface Program extends Server {
  /** Of the processes that serve, where this one does not. */
  readonly pids?: readonly number[];
  readonly ports: { readonly port: number; readonly grpcPort: number | undefined };
  /** Lets what is under way finish. */
  drain(): Promise<void>;
  /** What is served. */
  routes(): Promise<unknown>;
  /** In the format of Prometheus. */
  metrics(): Promise<string>;
}

export async function startProgram(
  settings: Settings,
  gate: Gate,
  files: Files,
  log: (message: string) => void,
): Promise<Program> {
  const { discovery, cluster, maxHeaderBytes, drainMs } = settings;
  const state = new State(files.configuration, log, maxHeaderBytes, { discovery, cluster });
  if (discovery !== undefined) await state.discovered;
  const accessLog = new AccessLog(settings.logLevel);
  const kedge = await startKedge({ ...settings, ...files, state, gate, log: accessLog });
  return {
    ports: { port: kedge.port, grpcPort: kedge.grpcPort },
    check: ({ configuration, certificates }) => {
      try {
        if (configuration !== undefined) state.check(configuration);
      } catch (error) {
        metrics.reloads.inc('false');
        throw error;
      }
      if (certificates !== undefined) kedge.check(certificates);
    },
    take: ({ configuration, certificates }) => {
      if (configuration !== undefined) {
        state.take(configuration);
        metrics.reloads.inc('true');
      }
      if (certificates !== undefined) kedge.renew(certificates);
    },
    drain: async () => {
      await kedge.close(drainMs);
      accessLog.flush();
    },
    routes: async () => state.routes,
    metrics: () => registry.metrics(),
  };
}
