/** Real gateways as kedges: their configurations, and how each is started, reloaded and stopped. */
import { type ChildProcess, execFile, spawn } from 'node:child_process';
import { existsSync } from 'node:fs';
import { mkdir, writeFile } from 'node:fs/promises';
import net from 'node:net';
import { homedir } from 'node:os';
import { delimiter, join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { promisify } from 'node:util';

export interface Setup {
  /** An empty directory of its own, with `kedge.crt`, `kedge.key`, `kedge.pem` (both) and `ca.crt` in it. */
  dir: string;
  port: number;
  backend: { http: number; grpc: number };
  /** nginx: how many requests a connection may carry before it is told to go. */
  keepaliveRequests: number;
}

export interface Gateway {
  readonly port: number;
  reload(): Promise<void>;
  stop(): Promise<void>;
}

export const HTTP_HOST = 'orders.gateway.test';
export const GRPC_HOST = 'greeter.gateway.test';

interface Engine {
  /** The Debian package that has it. */
  readonly package: string;
  find(): string | undefined;
  config(setup: Setup): { file: string; text: string };
  args(file: string): string[];
  reload(child: ChildProcess, path: string, file: string, setup: Setup): Promise<void>;
}

const onPath = (name: string, ...more: string[]) =>
  [...more, ...`${process.env.PATH}:/usr/sbin`.split(delimiter)]
    .map((dir) => join(dir, name))
    .find((path) => existsSync(path));

export const ENGINES: Record<string, Engine> = {
  nginx: {
    package: 'nginx',
    find: () => onPath('nginx'),
    // A reload leaves the old workers up for as long as a stream lives, but for worker_shutdown_timeout.
    config: ({ dir, port, backend, keepaliveRequests }) => ({
      file: join(dir, 'nginx.conf'),
      text: `daemon off;
${process.getuid?.() === 0 ? 'user root;' : ''}
worker_processes 2;
worker_shutdown_timeout 60s;
pid ${dir}/pid;
error_log ${dir}/error.log warn;
events { worker_connections 4096; }
http {
  access_log off;
  client_body_temp_path ${dir}/body;
  proxy_temp_path ${dir}/proxy;
  fastcgi_temp_path ${dir}/fastcgi;
  uwsgi_temp_path ${dir}/uwsgi;
  scgi_temp_path ${dir}/scgi;
  upstream orders { server 127.0.0.1:${backend.http}; keepalive 64; }
  upstream greeter { server 127.0.0.1:${backend.grpc}; keepalive 64; }
  server {
    listen 127.0.0.1:${port} ssl http2 backlog=4096;
    server_name _;
    ssl_certificate ${dir}/kedge.crt;
    ssl_certificate_key ${dir}/kedge.key;
    ssl_verify_client on;
    ssl_client_certificate ${dir}/ca.crt;
    keepalive_timeout 120s;
    keepalive_requests ${keepaliveRequests};
    client_max_body_size 0;
    http2_body_preread_size 1m;
    location / {
      if ($host = ${GRPC_HOST}) { grpc_pass grpc://greeter; }
      proxy_pass http://orders;
      proxy_http_version 1.1;
      proxy_set_header Host $http_host;
      proxy_set_header Connection "";
      proxy_buffering off;
      proxy_request_buffering off;
      proxy_read_timeout 1h;
      proxy_next_upstream off;
      grpc_set_header Host $http_host;
      grpc_read_timeout 1h;
      grpc_next_upstream off;
    }
  }
}
`,
    }),
    args: (file) => ['-c', file],
    reload: async (child) => void child.kill('SIGHUP'),
  },
  haproxy: {
    package: 'haproxy',
    find: () => onPath('haproxy'),
    config: ({ dir, port, backend }) => ({
      file: join(dir, 'haproxy.cfg'),
      text: `global
  stats socket ${dir}/sock mode 600 level admin expose-fd listeners
  hard-stop-after 60s
  tune.h2.initial-window-size 1048576
defaults
  mode http
  timeout connect 2s
  timeout http-request 10s
  timeout http-keep-alive 120s
  timeout client 1h
  timeout server 1h
  option http-no-delay
  retries 0
  http-reuse safe
frontend kedge
  bind 127.0.0.1:${port} ssl crt ${dir}/kedge.pem ca-file ${dir}/ca.crt verify required alpn h2,http/1.1 backlog 4096
  use_backend greeter if { req.hdr(host),field(1,:),lower -m str ${GRPC_HOST} }
  default_backend orders
backend orders
  server o 127.0.0.1:${backend.http}
backend greeter
  server g 127.0.0.1:${backend.grpc} proto h2
`,
    }),
    // A master that survives its workers, so that it can be told to reload.
    args: (file) => ['-W', '-f', file],
    reload: async (child) => void child.kill('SIGUSR2'),
  },
  caddy: {
    package: 'caddy',
    find: () => onPath('caddy', join(homedir(), 'go/bin')),
    // With client_auth, Caddy answers every Host but the SNI with 421 unless told otherwise.
    config: ({ dir, port, backend }) => ({
      file: join(dir, 'Caddyfile'),
      text: `{
  admin unix/${dir}/admin.sock
  auto_https off
  persist_config off
  log {
    output file ${dir}/caddy.log
  }
  grace_period 60s
  servers {
    strict_sni_host insecure_off
    protocols h1 h2
    enable_full_duplex
    timeouts {
      idle 120s
    }
  }
}
https://:${port} {
  bind 127.0.0.1
  tls ${dir}/kedge.crt ${dir}/kedge.key {
    client_auth {
      mode require_and_verify
      trusted_ca_cert_file ${dir}/ca.crt
    }
  }
  @greeter host ${GRPC_HOST}
  handle @greeter {
    reverse_proxy h2c://127.0.0.1:${backend.grpc} {
      stream_close_delay 60s
    }
  }
  handle {
    reverse_proxy 127.0.0.1:${backend.http} {
      flush_interval -1
      lb_retries 0
      stream_close_delay 60s
    }
  }
}
`,
    }),
    args: (file) => ['run', '--adapter', 'caddyfile', '--config', file],
    reload: async (_child, path, file, { dir }) => {
      const args = [
        'reload',
        '--force',
        '--adapter',
        'caddyfile',
        '--config',
        file,
        '--address',
        `unix/${dir}/admin.sock`,
      ];
      await promisify(execFile)(path, args, { env: { ...process.env, XDG_DATA_HOME: dir, XDG_CONFIG_HOME: dir } });
    },
  },
};

/** A port that nobody listens on: these programs cannot tell which one they were given. */
export async function freePort(): Promise<number> {
  const server = net.createServer();
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
  const { port } = server.address() as net.AddressInfo;
  await new Promise((resolve) => server.close(resolve));
  return port;
}

export async function startGateway(name: string, setup: Setup): Promise<Gateway> {
  const engine = ENGINES[name]!;
  const path = engine.find()!;
  const { file, text } = engine.config(setup);
  await mkdir(setup.dir, { recursive: true });
  await writeFile(file, text);
  const env = { ...process.env, XDG_DATA_HOME: setup.dir, XDG_CONFIG_HOME: setup.dir };
  const child = spawn(path, engine.args(file), { env, stdio: ['ignore', 'pipe', 'pipe'] });
  let output = '';
  for (const stream of [child.stdout, child.stderr]) {
    stream.setEncoding('utf8').on('data', (text: string) => {
      output = (output + text).slice(-4000);
    });
  }
  const exited = new Promise<void>((resolve) => child.on('close', () => resolve()));
  for (let attempt = 0; !(await listens(setup.port)); attempt += 1) {
    if (child.exitCode !== null || attempt > 100) throw new Error(`${name} does not listen: ${output}`);
    await sleep(50);
  }
  return {
    port: setup.port,
    reload: () => engine.reload(child, path, file, setup),
    stop: async () => {
      child.kill('SIGTERM');
      const timer = setTimeout(() => child.kill('SIGKILL'), 3000);
      await exited;
      clearTimeout(timer);
    },
  };
}

function listens(port: number): Promise<boolean> {
  return new Promise((resolve) => {
    const socket = net.connect(port, '127.0.0.1', () => {
      socket.destroy();
      resolve(true);
    });
    socket.on('error', () => resolve(false));
  });
}
