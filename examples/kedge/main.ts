/**
 * The reference kedge: an L7 proxy for the edge of a cluster, with the original's flags and files.
 *
 *   npm run kedge -- --server_tls_cert_file=tls.crt --server_tls_key_file=tls.key --server_tls_client_ca_files=ca.crt \\
 *     --kedge_config_director_config_path=director.json --kedge_config_backendpool_config_path=backendpool.json
 */
import cluster from 'node:cluster';
import { configSource, flagzOf, helpOf, readFlagFile, readFlags } from '../flags.ts';
import { bearerGate, type Gate, oidcGate, openGate } from './auth.ts';
import { clusterOf } from './cluster.ts';
import { startDebug } from './debug.ts';
import { type Files, followFiles } from './files.ts';
import { type Settings, startProgram } from './program.ts';
import { serveAsWorker, startWorkers } from './workers.ts';

const FLAGS = {
  server_bind_address: '127.0.0.1',
  server_http_tls_port: 8443,
  server_grpc_tls_port: 0,
  server_http_port: 0,
  server_tls_cert_file: '',
  server_tls_key_file: '',
  server_tls_client_ca_files: '',
  server_tls_client_crl_files: '',
  server_tls_client_cert_required: true,
  kedge_config_director_config_path: '',
  kedge_config_director_config: '',
  kedge_config_backendpool_config_path: '',
  kedge_config_backendpool_config: '',
  unsafe_bearer_token_proxy_auth: '',
  server_oidc_provider_url: '',
  server_oidc_client_id: '',
  server_oidc_perms_claim: '',
  server_oidc_whitelist_perms: '',
  /** Its name in the original's documentation. */
  server_oidc_required_perm: '',
  server_sigterm_timeout: 10,
  server_metrics_path: '/metrics',
  server_enable_oidc_for_debug_endpoints: false,
  kedge_dynamic_routings_enabled: false,
  discovery_external_domain_suffix: '',
  discovery_label_annotation_prefix: 'kedge.com/',
  k8sclient_kubeapi_url: '',
  k8sclient_ca_file: '',
  k8sclient_tls_insecure: false,
  k8client_token_file: '',
  k8sclient_kubeconfig_path: '',
  k8sclient_kubeconfig_user: '',
  server_http_max_header_bytes: 65_536,
  log_level: 'info',
  /** Processes that serve; an addition of ours. */
  workers: 1,
  help: false,
};
const LOGS = 'logs are lines on stderr, for an agent to collect';
const BUFFERS = 'streams are passed on as they come';
/** What the original has besides, and why it means nothing here. */
const IGNORED = {
  log_backend_resolution_on_addition: 'a backend that does not resolve says so in its answers',
  logstash_hostport: LOGS,
  logstash_log_tags: LOGS,
  logstash_write_buffer_size: LOGS,
  logstash_write_timeout: LOGS,
  server_http_max_read_timeout: 'the head has 10 s, and a body may take as long as it goes on',
  server_http_max_write_timeout: 'an answer may take as long as it goes on',
  server_tracing_grpc_enabled: 'there is no tracing page',
  http_reverseproxy_buffer_count: BUFFERS,
  http_reverseproxy_buffer_size_bytes: BUFFERS,
  http_reverseproxy_flushing_interval: BUFFERS,
  lbtransport_failed_target_backoff_duration: 'an address that cannot be dialled is left out for 2 s',
  lbtransport_trial_dial_timeout: 'TCP and TLS have 5 s together',
  k8sclient_auth_timeout: 'whoever needs the API server asks it again',
  k8sresolver_first_update_timouet: 'the first answer has 5 s',
  k8sresolver_resync_timouet: 'a watch that is silent for 60 s is begun again',
  discovery_resync_timouet: 'a watch that is silent for 60 s is begun again',
};

async function main(): Promise<void> {
  const { values, warnings } = readFlags(FLAGS, IGNORED, process.argv.slice(2));
  if (values.help) {
    console.log(helpOf(FLAGS, IGNORED));
    console.log('When it is ready it prints {"ready":true,"port":...}.');
    return;
  }
  const isQuiet = /^(?:error|fatal|panic)$/i.test(values.log_level);
  const name = cluster.isWorker ? `kedge ${process.pid}` : 'kedge';
  const log = (message: string) => isQuiet || console.error(`${name}: ${message}`);
  const gate = await gateOf(values);
  check(values, gate);
  const settings = settingsOf(values);
  const start = (files: Files) => startProgram(settings, gate, files, log);
  let isDraining = false;
  const endWith = (drain: () => Promise<void> | undefined) => {
    const end = async () => {
      if (isDraining) return;
      isDraining = true;
      await drain();
      process.exit(0);
    };
    for (const signal of ['SIGTERM', 'SIGINT'] as const) process.on(signal, end);
  };
  if (cluster.isWorker) {
    endWith(serveAsWorker(start));
    return;
  }
  for (const warning of warnings) log(warning);
  const origins = originsOf(values);
  const files = { configuration: origins.configuration.read(), certificates: origins.certificates.read() };
  const program = await (values.workers > 1 ? startWorkers(values.workers, files, log) : start(files));
  followFiles(origins, program, log);
  const { server_bind_address: address, server_http_port: debugPort } = values;
  const debug =
    debugPort === 0
      ? undefined
      : await startDebug({
          address,
          port: portOf(debugPort),
          metricsPath: values.server_metrics_path,
          gate: values.server_enable_oidc_for_debug_endpoints ? gate : openGate,
          program,
          flags: flagzOf(FLAGS, values),
          isHealthy: () => !isDraining,
        });
  endWith(() => program.drain());
  const { ports, pids } = program;
  console.log(JSON.stringify({ ready: true, address, ...ports, debugPort: debug?.port, pid: process.pid, pids }));
}

/** Throws where a kedge with these flags would be of no use, or would let everybody in. */
function check(values: typeof FLAGS, gate: Gate): void {
  if (values.server_tls_cert_file === '') throw new Error('--server_tls_cert_file is required');
  if (values.server_tls_key_file === '') throw new Error('--server_tls_key_file is required');
  const isCertRequired = values.server_tls_client_cert_required;
  if (isCertRequired && values.server_tls_client_ca_files === '')
    throw new Error('--server_tls_client_ca_files is required while --server_tls_client_cert_required is true');
  if (values.server_enable_oidc_for_debug_endpoints && gate === openGate)
    throw new Error('--server_enable_oidc_for_debug_endpoints goes with a provider or a token');
  if (!isCertRequired && gate === openGate)
    throw new Error('without required client certificates a token is: this kedge would let everybody in');
  if (values.server_http_tls_port === 0) throw new Error('--server_http_tls_port is required');
  if (values.kedge_dynamic_routings_enabled && values.discovery_external_domain_suffix === '')
    throw new Error('--kedge_dynamic_routings_enabled needs --discovery_external_domain_suffix');
  if (values.workers < 1) throw new Error('--workers is 1 or more');
}

const portOf = (port: number) => (port === -1 ? 0 : port);

function settingsOf(values: typeof FLAGS): Settings {
  const { discovery_external_domain_suffix: suffix, discovery_label_annotation_prefix: prefix } = values;
  return {
    address: values.server_bind_address,
    port: portOf(values.server_http_tls_port),
    grpcPort: values.server_grpc_tls_port === 0 ? undefined : portOf(values.server_grpc_tls_port),
    clientCertRequired: values.server_tls_client_cert_required,
    maxHeaderBytes: values.server_http_max_header_bytes,
    drainMs: values.server_sigterm_timeout * 1000,
    logLevel: values.log_level,
    discovery: values.kedge_dynamic_routings_enabled ? { suffix, prefix } : undefined,
    cluster: () =>
      clusterOf({
        url: values.k8sclient_kubeapi_url,
        caFile: values.k8sclient_ca_file,
        tokenFile: values.k8client_token_file,
        isInsecure: values.k8sclient_tls_insecure,
        kubeconfig: values.k8sclient_kubeconfig_path,
        user: values.k8sclient_kubeconfig_user,
      }),
  };
}

/** Where the files are, and how they are read. */
function originsOf(values: typeof FLAGS) {
  const director = configSource(
    'kedge_config_director_config',
    values.kedge_config_director_config_path,
    values.kedge_config_director_config,
  );
  const pool = configSource(
    'kedge_config_backendpool_config',
    values.kedge_config_backendpool_config_path,
    values.kedge_config_backendpool_config,
  );
  const { server_tls_cert_file: cert, server_tls_key_file: key } = values;
  const clientCas = values.server_tls_client_ca_files.split(',').filter(Boolean);
  const clientCrls = values.server_tls_client_crl_files.split(',').filter(Boolean);
  return {
    configuration: {
      paths: [director.path, pool.path].filter((path) => path !== undefined),
      read: () => ({
        director: { file: director.name, text: director.read() },
        pool: { file: pool.name, text: pool.read() },
      }),
    },
    certificates: {
      paths: [cert, key, ...clientCas, ...clientCrls],
      read: () => ({
        cert: readFlagFile('server_tls_cert_file', cert),
        key: readFlagFile('server_tls_key_file', key),
        clientCas: clientCas.map((path) => readFlagFile('server_tls_client_ca_files', path)),
        clientCrls: clientCrls.map((path) => readFlagFile('server_tls_client_crl_files', path)),
      }),
    },
  };
}

async function gateOf(values: typeof FLAGS): Promise<Gate> {
  const { unsafe_bearer_token_proxy_auth: token, server_oidc_provider_url: providerUrl } = values;
  if (token !== '' && providerUrl !== '')
    throw new Error('--unsafe_bearer_token_proxy_auth and --server_oidc_provider_url exclude each other');
  if (token !== '') return bearerGate(token);
  if (providerUrl === '') return openGate;
  const perms = `${values.server_oidc_whitelist_perms},${values.server_oidc_required_perm}`.split(',').filter(Boolean);
  const { server_oidc_client_id: clientId, server_oidc_perms_claim: permsClaim } = values;
  if (clientId === '' || permsClaim === '' || perms.length === 0)
    throw new Error(
      '--server_oidc_client_id, --server_oidc_perms_claim and --server_oidc_whitelist_perms go with the provider',
    );
  return oidcGate({ providerUrl, clientId, permsClaim, perms });
}

main().catch((error: Error) => {
  console.error(`kedge: ${error.message}`);
  process.exit(2);
});
