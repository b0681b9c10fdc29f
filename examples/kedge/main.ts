/**
 * The reference kedge: an L7 proxy for the edge of a cluster, with the original's flags and files.
 *
 *   npm run kedge -- --server_tls_cert_file=tls.crt --server_tls_key_file=tls.key --server_tls_client_ca_files=ca.crt \
 *     --kedge_config_director_config_path=director.json --kedge_config_backendpool_config_path=backendpool.json
 */
import { readFileSync } from 'node:fs';
import { parseArgs } from 'node:util';
import { readConfig } from './config.ts';
import { startKedge } from './server.ts';

const DRAIN_MS = 10_000;

const flag = (value: string) => ({ type: 'string', default: value }) as const;
const FLAGS = {
  server_bind_address: flag('127.0.0.1'),
  server_http_tls_port: flag('8443'),
  server_tls_cert_file: flag(''),
  server_tls_key_file: flag(''),
  server_tls_client_ca_files: flag(''),
  server_tls_client_cert_required: flag('true'),
  kedge_config_director_config_path: flag(''),
  kedge_config_backendpool_config_path: flag(''),
  unsafe_bearer_token_proxy_auth: flag(''),
  help: { type: 'boolean', default: false },
} as const;

async function main(): Promise<void> {
  const { values } = parseArgs({ options: FLAGS });
  if (values.help) {
    console.log(
      `Flags:\n${Object.keys(FLAGS)
        .map((name) => `  --${name}`)
        .join('\n')}`,
    );
    console.log(
      '--server_http_tls_port=any takes any free port. When it is ready it prints {"ready":true,"port":...}.',
    );
    return;
  }
  const file = (name: keyof typeof FLAGS) => {
    const path = String(values[name]);
    if (path === '') throw new Error(`--${name} is required`);
    return { file: path, text: readFileSync(path, 'utf8') };
  };
  const clientCas = values.server_tls_client_ca_files
    .split(',')
    .filter(Boolean)
    .map((path) => readFileSync(path, 'utf8'));
  const clientCertRequired = bool('server_tls_client_cert_required', values.server_tls_client_cert_required);
  if (clientCertRequired && clientCas.length === 0) {
    throw new Error('--server_tls_client_ca_files is required while --server_tls_client_cert_required is true');
  }
  const port = values.server_http_tls_port === 'any' ? 0 : Number(values.server_http_tls_port);
  if (!Number.isInteger(port) || port < 0 || port > 65_535)
    throw new Error('--server_http_tls_port is a port, or "any"');

  const kedge = await startKedge({
    address: values.server_bind_address,
    port,
    cert: file('server_tls_cert_file').text,
    key: file('server_tls_key_file').text,
    clientCas,
    clientCertRequired,
    config: readConfig(file('kedge_config_director_config_path'), file('kedge_config_backendpool_config_path')),
    bearerToken: values.unsafe_bearer_token_proxy_auth,
  });
  for (const signal of ['SIGTERM', 'SIGINT'] as const) {
    process.once(signal, () => void kedge.close(DRAIN_MS).then(() => process.exit(0)));
  }
  console.log(JSON.stringify({ ready: true, address: values.server_bind_address, port: kedge.port, pid: process.pid }));
}

function bool(name: string, value: string): boolean {
  if (value === 'true' || value === 'false') return value === 'true';
  throw new Error(`--${name} is true or false`);
}

main().catch((error: Error) => {
  console.error(`kedge: ${error.message}`);
  process.exit(2);
});
