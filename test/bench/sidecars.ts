import { type ChildProcess, spawn, spawnSync } from 'node:child_process';
import { once } from 'node:events';
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import net from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { Pool } from 'undici';
import { AUTHORITY, type Bench, NAME, TARGET } from './bench.ts';
import { load, type Sample, spread } from './measure.ts';

const ROUNDS = 5;
const ROUND_MS = 1500;
const HERTZ = 100;

interface Program {
  readonly port: number;
  /** CPU time of it and its children so far, in microseconds. */
  cpu(): number;
  stop(): void;
}

/** The dialer against the same client through a proxy on this machine, and the reference kedge against nginx in its place. */
export async function sidecars(bench: Bench): Promise<void> {
  if (
    !['sidecar nginx', 'sidecar winch', 'gateway'].some(
      (name) => name.includes(bench.only) || bench.only.startsWith(name),
    )
  )
    return;
  const folder = mkdtempSync(join(tmpdir(), 'kedge-bench-'));
  try {
    await compareAll(bench, folder);
  } finally {
    rmSync(folder, { recursive: true });
  }
}

async function compareAll(bench: Bench, folder: string): Promise<void> {
  const { server, rows, dial, only } = bench;
  const wanted = (name: string) => name.includes(only) || only.startsWith(name);
  const { ca, cert, key, httpPort } = server;
  const file = (name: string, content: string) => {
    writeFileSync(join(folder, name), content);
    return join(folder, name);
  };
  const tls = { ca: file('ca', ca), cert: file('cert', cert), key: file('key', key) };
  const kedgeTls = { cert: file('kedge.crt', server.kedgeCert), key: file('kedge.key', server.kedgeKey) };
  const hasNginx = spawnSync('nginx', ['-v']).status === 0;
  if (!hasNginx) console.error('rows with nginx are left out: test/bench/peers.sh installs it');

  const get = (port: number, options: object = {}) => {
    const dialer = dial(port, options);
    const call = async () =>
      (await dialer.dispatcher.request({ origin: TARGET, path: '/', method: 'GET' })).body.text();
    return { call: call as () => Promise<unknown>, stop: () => dialer.close() };
  };
  const plain = (port: number) => {
    const pool = new Pool(`http://127.0.0.1:${port}`, { connections: 64 });
    const call = async () =>
      (await pool.request({ path: '/', method: 'GET', headers: { host: AUTHORITY } })).body.text();
    return { call, stop: () => pool.close() };
  };
  const viaWinch = (port: number) => {
    const pool = new Pool(`http://127.0.0.1:${port}`, { connections: 64 });
    // As a client speaks to a proxy: with the whole URL in the request line.
    const call = async () =>
      (await pool.request({ path: `${TARGET}/`, method: 'GET', headers: { host: AUTHORITY } })).body.text();
    return { call, stop: () => pool.close() };
  };

  if (hasNginx && wanted('sidecar nginx')) {
    const nginx = await startNginx(
      folder,
      'sidecar',
      (port) => `
      upstream kedge { server 127.0.0.1:${httpPort}; keepalive 64; }
      server {
        listen 127.0.0.1:${port};
        location / {
          proxy_pass https://kedge; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_set_header Host $http_host;
          proxy_ssl_certificate ${tls.cert}; proxy_ssl_certificate_key ${tls.key}; proxy_ssl_trusted_certificate ${tls.ca};
          proxy_ssl_verify on; proxy_ssl_name ${NAME}; proxy_ssl_server_name on; proxy_ssl_session_reuse on;
        }
      }`,
    );
    for (const protocol of ['h1', 'h2'] as const) {
      const ours = get(httpPort, { http: { protocol } });
      const theirs = plain(nginx.port);
      rows.push(
        await pair(
          `sidecar nginx, dialer on ${protocol} c=50`,
          'the same client through nginx',
          ours.call,
          theirs.call,
          nginx,
        ),
      );
      await Promise.all([ours.stop(), theirs.stop()]);
    }
    nginx.stop();
  }

  if (wanted('sidecar winch')) {
    const mapper = { routes: [{ regexp: { exp: '.*', url: `https://localhost:${httpPort}` } }] };
    const winch = await startProgram('examples/winch/main.ts', [
      '--server_http_port=any',
      '--server_grpc_port=0',
      `--server_mapper_config=${JSON.stringify(mapper)}`,
      `--client_tls_cert_file=${tls.cert}`,
      `--client_tls_key_file=${tls.key}`,
      `--client_tls_root_ca_files=${tls.ca}`,
    ]);
    const ours = get(httpPort);
    const theirs = viaWinch(winch.port);
    rows.push(await pair('sidecar winch, dialer c=50', 'the same client through winch', ours.call, theirs.call, winch));
    await Promise.all([ours.stop(), theirs.stop()]);
    winch.stop();
  }

  if (hasNginx && wanted('gateway')) {
    const nginx = await startNginx(
      folder,
      'gateway',
      (port) => `
      upstream backend { server 127.0.0.1:${server.plainPort}; keepalive 64; }
      server {
        listen 127.0.0.1:${port} ssl http2;
        ssl_certificate ${kedgeTls.cert}; ssl_certificate_key ${kedgeTls.key};
        ssl_client_certificate ${tls.ca}; ssl_verify_client on;
        keepalive_requests 10000000;
        location / { proxy_pass http://backend; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_set_header Host $http_host; }
      }`,
    );
    const files = {
      director: { http: { routes: [{ backend_name: 'orders' }] } },
      pool: { http: { backends: [{ name: 'orders', host: { dns_name: '127.0.0.1', port: server.plainPort } }] } },
    };
    const kedge = await startProgram('examples/kedge/main.ts', [
      '--server_http_tls_port=any',
      `--server_tls_cert_file=${kedgeTls.cert}`,
      `--server_tls_key_file=${kedgeTls.key}`,
      `--server_tls_client_ca_files=${tls.ca}`,
      `--kedge_config_director_config=${JSON.stringify(files.director)}`,
      `--kedge_config_backendpool_config=${JSON.stringify(files.pool)}`,
    ]);
    for (const protocol of ['h1', 'h2'] as const) {
      const ours = get(kedge.port, { http: { protocol } });
      const theirs = get(nginx.port, { http: { protocol } });
      rows.push(
        await pair(
          `gateway, reference kedge on ${protocol} c=50`,
          'nginx in its place',
          ours.call,
          theirs.call,
          nginx,
          kedge,
        ),
      );
      await Promise.all([ours.stop(), theirs.stop()]);
    }
    nginx.stop();
    kedge.stop();
  }
}

/** As `compare()`, with the CPU time of the programs in between, and with the slowest hundredth. */
async function pair(
  name: string,
  rival: string,
  ours: () => Promise<unknown>,
  theirs: () => Promise<unknown>,
  theirProgram: Program,
  ourProgram?: Program,
) {
  const samples: [Sample, Sample][] = [];
  const p99s: [number, number][] = [];
  const measure = async (call: () => Promise<unknown>, program: Program | undefined) => {
    const times: number[] = [];
    const timed = async () => {
      const began = performance.now();
      await call();
      times.push(performance.now() - began);
    };
    const before = program?.cpu() ?? 0;
    const sample = await load(timed, 50, ROUND_MS);
    const cpuMicros = sample.cpuMicros + ((program?.cpu() ?? 0) - before) / times.length;
    times.sort((a, b) => a - b);
    return { sample: { ...sample, cpuMicros }, p99: times[Math.floor(times.length * 0.99)]! };
  };
  for (let round = -1; round < ROUNDS; round += 1) {
    const a = await measure(ours, ourProgram);
    const b = await measure(theirs, theirProgram);
    if (round < 0) continue;
    samples.push([a.sample, b.sample]);
    p99s.push([a.p99, b.p99]);
  }
  const median = (values: number[]) => spread(values).median;
  const side = (i: 0 | 1): Sample => ({
    perSecond: median(samples.map((each) => each[i].perSecond)),
    cpuMicros: median(samples.map((each) => each[i].cpuMicros)),
  });
  const p99 = (i: 0 | 1) => median(p99s.map((each) => each[i])).toFixed(1);
  return {
    name: `${name}, p99 ${p99(0)} / ${p99(1)} ms`,
    rival,
    comparison: { ours: side(0), theirs: side(1), ratio: spread(samples.map(([a, b]) => a.perSecond / b.perSecond)) },
  };
}

async function startNginx(folder: string, name: string, http: (port: number) => string): Promise<Program> {
  const listener = net.createServer().listen(0, '127.0.0.1');
  await once(listener, 'listening');
  const { port } = listener.address() as net.AddressInfo;
  await new Promise((resolve) => listener.close(resolve));
  const config = join(folder, `${name}.conf`);
  const paths = ['client_body', 'proxy', 'fastcgi', 'uwsgi', 'scgi'].map(
    (kind) => `${kind}_temp_path ${folder}/${name}-${kind};`,
  );
  writeFileSync(
    config,
    `daemon off; master_process off; worker_processes 1; error_log stderr warn; pid ${folder}/${name}.pid;
     events { worker_connections 1024; }
     http { access_log off; ${paths.join(' ')} ${http(port)} }`,
  );
  const child = spawn('nginx', ['-p', folder, '-c', config], { stdio: ['ignore', 'inherit', 'inherit'] });
  for (let i = 0; i < 100; i += 1) {
    const isUp = await new Promise<boolean>((resolve) => {
      const socket = net.connect(port, '127.0.0.1', () => resolve(true));
      socket.on('error', () => resolve(false));
      socket.on('connect', () => socket.destroy());
    });
    if (isUp) break;
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
  return program(child, port);
}

async function startProgram(path: string, args: string[]): Promise<Program> {
  const child = spawn(process.execPath, [path, ...args, '--log_level=error'], { stdio: ['ignore', 'pipe', 'inherit'] });
  const [line] = (await once(createInterface({ input: child.stdout }), 'line')) as [string];
  return program(child, (JSON.parse(line) as { port: number }).port);
}

function program(child: ChildProcess, port: number): Program {
  return {
    port,
    cpu: () => {
      // proc(5): user and system time, in ticks.
      const fields = readFileSync(`/proc/${child.pid}/stat`, 'utf8').split(') ')[1]!.split(' ');
      return ((Number(fields[11]) + Number(fields[12])) / HERTZ) * 1e6;
    },
    stop: () => void child.kill(),
  };
}
