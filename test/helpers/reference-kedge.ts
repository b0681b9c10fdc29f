import { writeFileSync } from 'node:fs';
import { join } from 'node:path';
import type { TestContext } from 'node:test';
import { AccessLog } from '../../examples/kedge/access-log.ts';
import { bearerGate, openGate } from '../../examples/kedge/auth.ts';
import { type Kedge, startKedge } from '../../examples/kedge/server.ts';
import { State } from '../../examples/kedge/state.ts';
import type { Certificate } from '../../examples/pki.ts';
import {
  createDialer,
  type Dialer,
  type DialerOptions,
  type Identity,
  pem,
  single,
  staticToken,
} from '../../src/index.ts';
import { authority, KEDGE_NAME } from './kedge.ts';
import { type NodeProcess, spawnNode } from './process.ts';
import { tempDir } from './temp.ts';

/** The director and backend pool files, as objects. */
export interface Files {
  director: object;
  backendPool: object;
  bearerToken?: string;
}

export interface Certificates {
  ca: string;
  server: Certificate;
  client: Certificate;
  identity: Identity;
}

export interface ReferenceKedge extends Certificates {
  kedge: Kedge;
  /** A dialer that sends every name here; closed when the test ends. */
  dialer(options?: Partial<DialerOptions>, token?: string): Dialer;
}

async function certificates(): Promise<Certificates> {
  const ca = await authority();
  const [server, client] = await Promise.all([
    ca.issue({ cn: KEDGE_NAME, dns: [KEDGE_NAME], ip: ['127.0.0.1'] }),
    ca.issue({ cn: 'pod' }),
  ]);
  return { ca: ca.cert, server, client, identity: pem({ cert: client.cert, key: client.key, ca: ca.cert }) };
}

const text = (file: string, value: object) => ({ file, text: JSON.stringify(value) });

const MAX_HEADER_BYTES = 65_536;

/** The reference kedge in this process. */
export async function startReferenceKedge(t: TestContext, files: Files): Promise<ReferenceKedge> {
  const all = await certificates();
  const texts = { director: text('director', files.director), pool: text('pool', files.backendPool) };
  const kedge = await startKedge({
    address: '127.0.0.1',
    port: 0,
    certificates: { cert: all.server.cert, key: all.server.key, clientCas: [all.ca] },
    clientCertRequired: true,
    maxHeaderBytes: MAX_HEADER_BYTES,
    gate: files.bearerToken === undefined || files.bearerToken === '' ? openGate : bearerGate(files.bearerToken),
    state: new State(texts, () => {}, MAX_HEADER_BYTES),
    log: new AccessLog('error'),
  });
  t.after(() => kedge.close(0));
  return {
    ...all,
    kedge,
    dialer: (options = {}, token = undefined) => {
      const route = { kedge: `https://127.0.0.1:${kedge.port}`, serverName: KEDGE_NAME };
      const mapper = single(token === undefined ? route : { ...route, proxyAuth: staticToken(token) });
      const dialer = createDialer({ mapper, identity: all.identity, ...options });
      t.after(() => dialer.destroy());
      return dialer;
    },
  };
}

/** What the program prints when it is ready. */
export interface KedgeReady {
  port: number;
  grpcPort?: number;
  debugPort?: number;
}

export interface KedgeProcesses extends Certificates {
  folder: string;
  /** Starts the real program with these files. */
  start(port: number | 'any', flags?: readonly string[]): Promise<NodeProcess<KedgeReady>>;
}

/** The reference kedge as processes of its own, all with the same files. */
export async function kedgeProcesses(t: TestContext, files: Files): Promise<KedgeProcesses> {
  const all = await certificates();
  const folder = await tempDir(t);
  const flags = Object.entries({
    server_tls_cert_file: all.server.cert,
    server_tls_key_file: all.server.key,
    server_tls_client_ca_files: all.ca,
    kedge_config_director_config_path: JSON.stringify(files.director),
    kedge_config_backendpool_config_path: JSON.stringify(files.backendPool),
  }).map(([name, content]) => {
    writeFileSync(join(folder, name), content);
    return `--${name}=${join(folder, name)}`;
  });
  const start = (port: number | 'any', more: readonly string[] = []) =>
    spawnNode<KedgeReady>(t, 'examples/kedge/main.ts', [`--server_http_tls_port=${port}`, ...flags, ...more]);
  return { ...all, folder, start };
}
