import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { Pool } from 'undici';
import { AUTHORITY, type Bench, NAME, TARGET } from './bench.ts';
import { load, type Sample, spread } from './measure.ts';
import { hasNginx, type Program, startNginx, startProgram } from './programs.ts';

const ROUNDS = 5;
const ROUND_MS = 1500;

/** The dialer against the same client through a proxy on this machine. */
export async function sidecars(bench: Bench): Promise<void> {
  if (!['sidecar nginx', 'sidecar winch'].some((name) => name.includes(bench.only) || bench.only.startsWith(name)))
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

  if (hasNginx() && wanted('sidecar nginx')) {
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
}

/** As `compare()`, with the CPU time of the programs in between, and with the slowest hundredth. */
async function pair(
  name: string,
  rival: string,
  ours: () => Promise<unknown>,
  theirs: () => Promise<unknown>,
  theirProgram: Program,
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
    const a = await measure(ours, undefined);
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
