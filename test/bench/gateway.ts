import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { type Bench, TARGET } from './bench.ts';
import { load, type Sample, spread } from './measure.ts';
import { freePort, hasNginx, type Program, startBinary, startNginx, startProgram } from './programs.ts';

const ROUNDS = 9;
const ROUND_MS = 1_000;
/** Calls before anything counts: code is compiled by then, however busy the machine is. */
const WARM_CALLS = 15_000;
const PATIENCE_MS = 5_000;
const NAME = 'gateway, reference kedge';
const WHO = ['the kedge', 'nginx', 'bare node:http', 'the original'];

/**
 * The reference kedge against nginx as the same gateway, which says the same to the backend and the client, and against the
 * original's binary where `KEDGE_ORIGINAL` names one. All rows of a wire are measured in turn, in one run.
 */
export async function gateways(bench: Bench): Promise<void> {
  if (!bench.wanted(NAME) || !hasNginx()) return;
  const folder = mkdtempSync(join(tmpdir(), 'kedge-bench-'));
  const programs: Program[] = [];
  try {
    const started = await startAll(bench, folder, programs);
    for (const protocol of ['h1', 'h2'] as const) {
      const sides = started.map((program) => ({ program, dialer: bench.dial(program.port, { http: { protocol } }) }));
      const failed: string[] = [];
      const calls = sides
        .map(({ dialer }, i) => async () => {
          const { statusCode, body } = await dialer.dispatcher.request({ origin: TARGET, path: '/', method: 'GET' });
          await body.text();
          if (statusCode !== 200) failed.push(`${WHO[i]}: status ${statusCode}`);
        })
        .map((call, i) => () => call().catch((error: Error) => void failed.push(`${WHO[i]}: ${error.message}`)));
      for (const call of calls) await warm(call);
      const samples: Sample[][] = calls.map(() => []);
      for (let round = 0; round < ROUNDS; round += 1)
        for (const [i, call] of calls.entries()) samples[i]!.push(await measured(call, sides[i]!.program));
      for (const [i, rival] of [
        'nginx in its place',
        'node:http and undici alone',
        'the original in its place',
      ].entries()) {
        const theirs = samples[i + 1];
        if (theirs === undefined) continue;
        const ratio = spread(samples[0]!.map((ours, round) => ours.perSecond / theirs[round]!.perSecond));
        const comparison = { ours: medianOf(samples[0]!), theirs: medianOf(theirs), ratio };
        bench.rows.push({ name: `${NAME} on ${protocol} c=50`, rival, comparison });
      }
      for (const each of new Set(failed))
        console.error(`${protocol}: ${each}, ${failed.filter((other) => other === each).length} times`);
      await Promise.all(sides.map(({ dialer }) => dialer.close()));
    }
  } finally {
    for (const program of programs) program.stop();
    rmSync(folder, { recursive: true });
  }
}

async function warm(call: () => Promise<unknown>): Promise<void> {
  let left = WARM_CALLS;
  const worker = async () => {
    for (; left > 0; left -= 1) await call();
  };
  await Promise.all(Array.from({ length: 50 }, worker));
}

/** CPU time is that of the gateway alone. */
async function measured(call: () => Promise<unknown>, program: Program): Promise<Sample> {
  const before = program.cpu();
  let calls = 0;
  const { perSecond } = await load(() => call().then(() => (calls += 1)), 50, ROUND_MS);
  return { perSecond, cpuMicros: (program.cpu() - before) / calls };
}

function medianOf(samples: readonly Sample[]): Sample {
  const median = (key: keyof Sample) => spread(samples.map((each) => each[key])).median;
  return { perSecond: median('perSecond'), cpuMicros: median('cpuMicros') };
}

async function startAll({ server, dial }: Bench, folder: string, programs: Program[]) {
  const file = (name: string, content: string) => {
    writeFileSync(join(folder, name), content);
    return join(folder, name);
  };
  const [cert, key, ca] = [
    file('kedge.crt', server.kedgeCert),
    file('kedge.key', server.kedgeKey),
    file('ca', server.ca),
  ];
  const started = async (starting: Promise<Program>) => {
    const program = await starting;
    programs.push(program);
    return program;
  };
  const nginx = await started(
    startNginx(
      folder,
      'gateway',
      (port) => `
      upstream backend { server 127.0.0.1:${server.plainPort}; keepalive 64; }
      server {
        listen 127.0.0.1:${port} ssl http2;
        ssl_certificate ${cert}; ssl_certificate_key ${key}; ssl_client_certificate ${ca}; ssl_verify_client on;
        keepalive_requests 10000000;
        location / {
          proxy_pass http://backend; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_set_header Host $http_host;
          proxy_set_header Via "1.1 kedge"; proxy_set_header X-Forwarded-Proto https; proxy_set_header X-Forwarded-For $remote_addr;
          proxy_set_header X-Forwarded-Host $http_host; proxy_set_header X-Kedge-Client-Subject $ssl_client_s_dn;
          add_header x-kedge-backend-name orders;
        }
      }`,
    ),
  );
  const director = { grpc: {}, http: { routes: [{ backend_name: 'orders' }] } };
  const backends = [{ name: 'orders', host: { dns_name: '127.0.0.1', port: server.plainPort } }];
  const pool = { grpc: {}, http: { backends } };
  const flags = [
    `--server_tls_cert_file=${cert}`,
    `--server_tls_key_file=${key}`,
    `--server_tls_client_ca_files=${ca}`,
    `--kedge_config_director_config_path=${file('director.json', JSON.stringify(director))}`,
    `--kedge_config_backendpool_config_path=${file('backendpool.json', JSON.stringify(pool))}`,
    '--log_level=error',
  ];
  const kedge = await started(startProgram('examples/kedge/main.ts', ['--server_http_tls_port=any', ...flags]));
  const bare = await started(startProgram('test/bench/bare.ts', flags));
  const { KEDGE_ORIGINAL: binary } = process.env;
  if (binary === undefined) return [kedge, nginx, bare];
  const port = await freePort();
  const own = [
    `--server_http_tls_port=${port}`,
    '--server_grpc_tls_port=0',
    '--server_http_port=0',
    '--server_bind_address=127.0.0.1',
    '--server_tls_client_cert_required=true',
  ];
  const original = await started(startBinary(binary, port, [...own, ...flags]));
  const dialer = dial(port);
  const first = { origin: TARGET, path: '/', method: 'GET', headersTimeout: PATIENCE_MS } as const;
  const status = await dialer.dispatcher
    .request(first)
    .then(({ statusCode }) => statusCode)
    .catch(({ message }) => message);
  await dialer.destroy();
  if (status !== 200) console.error(`rows with the original are left out, its first answer is: ${status}`);
  return status === 200 ? [kedge, nginx, bare, original] : [kedge, nginx, bare];
}
