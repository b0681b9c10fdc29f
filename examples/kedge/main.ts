/**
 * The reference kedge: an L7 proxy for the edge of a cluster, with the original's flags and files.
 *
 *   npm run kedge -- --server_tls_cert_file=tls.crt --server_tls_key_file=tls.key --server_tls_client_ca_files=ca.crt \\
 *     --kedge_config_director_config_path=director.json --kedge_config_backendpool_config_path=backendpool.json
 */
import { readFileSync, watchFile } from 'node:fs';
import { configSource, helpOf, readFlags } from '../flags.ts';
import { AccessLog } from './access-log.ts';
import { bearerGate, type Gate, oidcGate, openGate } from './auth.ts';
import { clusterOf } from './cluster.ts';
import { startDebug } from './debug.ts';
import { metrics } from './metrics.ts';
import { startKedge } from './server.ts';
import { State } from './state.ts';

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
  help: false,
};
const RENEW_POLL_MS = 500;
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
  const log = (message: string) => isQuiet || console.error(`kedge: ${message}`);
  for (const warning of warnings) log(warning);
  const { server_tls_cert_file: certFile, server_tls_key_file: keyFile } = values;
  if (certFile === '') throw new Error('--server_tls_cert_file is required');
  if (keyFile === '') throw new Error('--server_tls_key_file is required');
  const caFiles = values.server_tls_client_ca_files.split(',').filter(Boolean);
  const crlFiles = values.server_tls_client_crl_files.split(',').filter(Boolean);
  const read = (path: string) => readFileSync(path, 'utf8');
  const certificates = () => ({
    cert: read(certFile),
    key: read(keyFile),
    clientCas: caFiles.map(read),
    clientCrls: crlFiles.map(read),
  });
  const clientCertRequired = values.server_tls_client_cert_required;
  if (clientCertRequired && caFiles.length === 0)
    throw new Error('--server_tls_client_ca_files is required while --server_tls_client_cert_required is true');
  const gate = await gateOf(values);
  if (values.server_enable_oidc_for_debug_endpoints && gate === openGate)
    throw new Error('--server_enable_oidc_for_debug_endpoints goes with a provider or a token');
  if (!clientCertRequired && gate === openGate)
    throw new Error('without required client certificates a token is: this kedge would let everybody in');
  if (values.server_http_tls_port === 0) throw new Error('--server_http_tls_port is required');

  const { discovery_external_domain_suffix: suffix, discovery_label_annotation_prefix: prefix } = values;
  if (values.kedge_dynamic_routings_enabled && suffix === '')
    throw new Error('--kedge_dynamic_routings_enabled needs --discovery_external_domain_suffix');
  const discovery = values.kedge_dynamic_routings_enabled ? { suffix, prefix } : undefined;

  const state = new State(
    configSource(
      'kedge_config_director_config',
      values.kedge_config_director_config_path,
      values.kedge_config_director_config,
    ),
    configSource(
      'kedge_config_backendpool_config',
      values.kedge_config_backendpool_config_path,
      values.kedge_config_backendpool_config,
    ),
    (message) => {
      if (message.startsWith('configuration')) metrics.reloads.inc(String(!message.includes('refused')));
      log(message);
    },
    values.server_http_max_header_bytes,
    {
      discovery,
      cluster: () =>
        clusterOf({
          url: values.k8sclient_kubeapi_url,
          caFile: values.k8sclient_ca_file,
          tokenFile: values.k8client_token_file,
          isInsecure: values.k8sclient_tls_insecure,
          kubeconfig: values.k8sclient_kubeconfig_path,
          user: values.k8sclient_kubeconfig_user,
        }),
    },
  );
  const portOf = (port: number) => (port === -1 ? 0 : port);
  if (discovery !== undefined) await state.discovered;
  const kedge = await startKedge({
    address: values.server_bind_address,
    port: portOf(values.server_http_tls_port),
    grpcPort: values.server_grpc_tls_port === 0 ? undefined : portOf(values.server_grpc_tls_port),
    certificates: certificates(),
    clientCertRequired,
    maxHeaderBytes: values.server_http_max_header_bytes,
    state,
    gate,
    log: new AccessLog(values.log_level),
  });
  // By polling, through symbolic links: certificates are renewed while we run.
  for (const path of [certFile, keyFile, ...caFiles, ...crlFiles]) {
    watchFile(path, { interval: RENEW_POLL_MS, persistent: false }, () => {
      try {
        kedge.renew(certificates());
        log('certificates renewed');
      } catch (error) {
        log(`certificates refused, the old ones stay: ${(error as Error).message}`);
      }
    });
  }
  let isDraining = false;
  const debug =
    values.server_http_port === 0
      ? undefined
      : await startDebug({
          address: values.server_bind_address,
          port: portOf(values.server_http_port),
          metricsPath: values.server_metrics_path,
          gate: values.server_enable_oidc_for_debug_endpoints ? gate : openGate,
          isHealthy: () => !isDraining,
        });
  for (const signal of ['SIGTERM', 'SIGINT'] as const) {
    process.once(signal, async () => {
      isDraining = true;
      await kedge.close(values.server_sigterm_timeout * 1000);
      debug?.close();
      process.exit(0);
    });
  }
  const { port, grpcPort } = kedge;
  const ready = { ready: true, address: values.server_bind_address, port, grpcPort, debugPort: debug?.port };
  console.log(JSON.stringify({ ...ready, pid: process.pid }));
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
