/**
 * winch, the local proxy of the original: HTTP and plaintext gRPC on this machine, through kedges, with the original's
 * flags and files.
 *
 *   npm run winch -- --server_mapper_config_path=mapper.json --server_auth_config_path=auth.json \
 *     --client_tls_cert_file=tls.crt --client_tls_key_file=tls.key --client_tls_root_ca_files=ca.crt
 */
import { once } from 'node:events';
import http from 'node:http';
import type { AddressInfo } from 'node:net';
import { createDialer, type DialerOptions, loadWinchConfig, pem, pemFiles } from 'kedge-dialer';
import { Counter, Registry } from 'prom-client';
import { configSource, helpOf, readFlagFile, readFlags } from '../flags.ts';
import { Cors } from './cors.ts';
import { createGrpcProxy } from './grpc-proxy.ts';
import { httpProxy, refuse } from './http-proxy.ts';
import { Logins } from './logins.ts';
import { pacOf, pages, startMonitoring } from './pages.ts';

const FLAGS = {
  server_http_port: 8070,
  server_grpc_port: 8071,
  server_mapper_config_path: '',
  server_mapper_config: '',
  server_auth_config_path: '',
  server_auth_config: '',
  client_tls_cert_file: '',
  client_tls_key_file: '',
  client_tls_root_ca_files: '',
  client_insecure: false,
  pac_redirect_sh_expressions: '',
  pac_file: '',
  cors_allowed_origin: '',
  debug_mode: false,
  server_metrics_path: '/metrics',
  server_http_monitoring_address: '',
  log_level: 'info',
  help: false,
};
const BUFFERS = 'streams are passed on as they come';
/** What the original has besides, and why it means nothing here. */
const IGNORED = {
  server_auth_timeout: 'a token has as long as its call',
  server_http_max_read_timeout: 'the head has 10 s, and a body may take as long as it goes on',
  server_http_max_write_timeout: 'an answer may take as long as it goes on',
  winch_reverseproxy_buffer_count: BUFFERS,
  winch_reverseproxy_buffer_size_bytes: BUFFERS,
  winch_reverseproxy_flushing_interval: BUFFERS,
};
const LIMITS = { headersTimeout: 10_000, connectionsCheckingInterval: 1_000, maxHeaderSize: 65_536 };

async function main(): Promise<void> {
  const { values, warnings } = readFlags(FLAGS, IGNORED, process.argv.slice(2));
  if (values.help) {
    console.log(helpOf(FLAGS, IGNORED));
    return;
  }
  const isQuiet = /^(?:error|fatal|panic)$/i.test(values.log_level);
  const log = (message: string) => isQuiet || console.error(`winch: ${message}`);
  const server = http.createServer(LIMITS);
  const port = await listen(server, values.server_http_port);
  const logins = new Logins();
  const { server_auth_config_path: authPath, server_auth_config: auth } = values;
  const config = loadWinchConfig({
    mapper: parsed('mapper', values.server_mapper_config_path, values.server_mapper_config),
    ...(authPath + auth === '' ? {} : { auth: parsed('auth', authPath, auth) }),
    login: { origin: `http://127.0.0.1:${port}`, open: logins.open },
  });
  for (const warning of [...warnings, ...config.warnings]) log(warning);
  if (config.routes === 0) throw new Error('the mapper has no routes');
  if (values.client_insecure && config.tokenSources.size > 0)
    throw new Error('--client_insecure with auth sources would hand their tokens to anybody');
  const { client_tls_cert_file: cert, client_tls_key_file: key, client_tls_root_ca_files: cas } = values;
  const dialer = createDialer({
    mapper: config.mapper,
    ...identityOf(cert, key, listOf(cas)),
    ...(values.client_insecure ? { peer: { dangerouslySkipVerification: true } } : {}),
    onWarning: (warning) => log(warning.message),
  });

  const registry = new Registry();
  const help = 'Proxied HTTP requests by status';
  const requests = new Counter({ name: 'winch_requests_total', help, labelNames: ['status'], registers: [registry] });
  const { debug_mode: debug, server_http_monitoring_address: elsewhere, server_metrics_path: path } = values;
  const cors = new Cors(listOf(values.cors_allowed_origin));
  const proxy = httpProxy({ dialer, log, debug, cors, count: (status) => requests.inc({ status }) });
  const pac = pacOf(values.pac_file, listOf(values.pac_redirect_sh_expressions), port);
  const metrics = { registry, path };
  const { tokenSources } = config;
  const own = pages({ port, pac, tokenSources, logins, metrics: elsewhere === '' ? metrics : undefined });
  server.on('request', (request, response) => {
    const served = request.url!.startsWith('/') ? own(request, response) : proxy.handle(request, response);
    served.catch((error) => log(refuse(response, error)));
  });
  server.on('upgrade', proxy.upgrade).on('connect', proxy.connect);
  const grpcServer = createGrpcProxy(dialer, debug, log);
  const grpcPort = values.server_grpc_port === 0 ? undefined : await listen(grpcServer, values.server_grpc_port);
  const monitoring = elsewhere === '' ? undefined : await startMonitoring(elsewhere, metrics);

  for (const signal of ['SIGTERM', 'SIGINT'] as const) {
    process.once(signal, async () => {
      for (const each of [server, grpcServer, monitoring]) each?.close();
      await dialer.close();
      process.exit(0);
    });
  }
  console.log(JSON.stringify({ ready: true, port, grpcPort, pid: process.pid }));
}

/** On this machine only, whatever the flags say. */
async function listen(server: http.Server | ReturnType<typeof createGrpcProxy>, port: number): Promise<number> {
  server.listen(port === -1 ? 0 : port, '127.0.0.1');
  await once(server, 'listening');
  return (server.address() as AddressInfo).port;
}

/** A path as it is, so that errors name the file. */
function parsed(name: string, path: string, inline: string): string | object {
  const source = configSource(`server_${name}_config`, path, inline);
  return source.path ?? (JSON.parse(source.read()) as object);
}

/** One file of CAs is watched, with the certificate; several are read once. A file that is not there is an error now. */
function identityOf(certFile: string, keyFile: string, cas: string[]): Pick<DialerOptions, 'identity'> {
  const shows = certFile !== '' || keyFile !== '';
  const ca = cas.map((path) => readFlagFile('client_tls_root_ca_files', path)).join('\n');
  if (!shows) return cas.length === 0 ? {} : { identity: cas.length === 1 ? pemFiles({ ca: cas[0]! }) : pem({ ca }) };
  const cert = readFlagFile('client_tls_cert_file', certFile);
  const key = readFlagFile('client_tls_key_file', keyFile);
  if (cas.length > 1) return { identity: pem({ cert, key, ca }) };
  const trust = cas.length === 0 ? {} : { ca: cas[0]! };
  return { identity: pemFiles({ cert: certFile, key: keyFile, ...trust }) };
}

function listOf(text: string): string[] {
  return text.split(/[\s,]+/).filter(Boolean);
}

main().catch((error: Error) => {
  console.error(`winch: ${error.message}`);
  process.exit(2);
});
