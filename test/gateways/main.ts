/**
 * Runs nginx, HAProxy and Caddy as kedges, does through each what users do, and prints a table. Ends with 1 where a
 * promise is broken. `npm run gateways -- [--install] [gateway …]`
 */
import { spawn, spawnSync } from 'node:child_process';
import { mkdir, mkdtemp, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';
import { createAuthority } from '../../examples/pki.ts';
import { createDialer, pem, single } from '../../src/index.ts';
import { ENGINES, freePort, startGateway } from './gateways.ts';
import { largeBodies, type Row, reloads, resets, shortConnections, streams, type World } from './scenarios.ts';

const KEDGE_NAME = 'gateway.kedge.test';
const { values, positionals } = parseArgs({ options: { install: { type: 'boolean' } }, allowPositionals: true });
const names = positionals.length > 0 ? positionals : Object.keys(ENGINES);
const unknown = names.filter((name) => !(name in ENGINES));
if (unknown.length > 0)
  throw new Error(`no such gateway: ${unknown.join(', ')}; there are ${Object.keys(ENGINES).join(', ')}`);
const missing = names.filter((name) => ENGINES[name]!.find() === undefined).map((name) => ENGINES[name]!.package);
if (missing.length > 0) {
  const command = ['apt-get', 'install', '-y', ...missing];
  console.log(
    `not on this machine: ${missing.join(', ')}; ${values.install ? 'running' : 'run, or use --install:'} ${command.join(' ')}`,
  );
  if (!values.install || spawnSync(command[0]!, command.slice(1), { stdio: 'inherit' }).status !== 0) process.exit(2);
}

const root = await mkdtemp(join(tmpdir(), 'kedge-gateways-'));
const ca = await createAuthority('gateway CA');
const [certificate, client] = await Promise.all([
  ca.issue({ cn: KEDGE_NAME, dns: [KEDGE_NAME] }),
  ca.issue({ cn: 'pod' }),
]);
const identity = pem({ cert: client.cert, key: client.key, ca: ca.cert });
const backend = spawn(process.execPath, [fileURLToPath(new URL('backend.ts', import.meta.url))], {
  stdio: ['ignore', 'pipe', 'inherit'],
});
process.on('exit', () => backend.kill('SIGKILL'));
const ports = await new Promise<{ http: number; grpc: number }>((resolve) =>
  createInterface(backend.stdout).once('line', (line) => resolve(JSON.parse(line))),
);

let broken = 0;
/** Runs scenarios through one gateway that is started for them. */
async function run(name: string, keepaliveRequests: number, ...scenarios: ((world: World) => AsyncGenerator<Row>)[]) {
  const dir = join(root, `${name}-${keepaliveRequests}`);
  await mkdir(dir);
  await Promise.all([
    writeFile(join(dir, 'kedge.crt'), certificate.cert),
    writeFile(join(dir, 'kedge.key'), certificate.key, { mode: 0o600 }),
    writeFile(join(dir, 'kedge.pem'), `${certificate.cert}\n${certificate.key}`, { mode: 0o600 }),
    writeFile(join(dir, 'ca.crt'), ca.cert),
  ]);
  const gateway = await startGateway(name, { dir, port: await freePort(), backend: ports, keepaliveRequests });
  const mapper = single({ kedge: `https://127.0.0.1:${gateway.port}`, serverName: KEDGE_NAME });
  const world: World = {
    gateway,
    dialer: (protocol) => createDialer({ mapper, identity, http: { protocol } }),
    ledger: async () => (await (await fetch(`http://127.0.0.1:${ports.http}/ledger`)).json()) as Record<string, number>,
  };
  try {
    for (const scenario of scenarios) {
      for await (const { wire, what, result, kept } of scenario(world)) {
        if (!kept) broken += 1;
        console.log(`${kept ? 'kept  ' : 'BROKEN'} ${name.padEnd(8)} ${wire.padEnd(5)} ${what.padEnd(36)} ${result}`);
      }
    }
  } finally {
    await gateway.stop();
  }
}

const started = performance.now();
try {
  for (const name of names) {
    await run(name, 1_000_000, largeBodies, streams, resets, reloads);
    // The others have no limit of requests for a connection.
    if (name === 'nginx') await run(name, 20, shortConnections);
  }
} finally {
  backend.kill();
  await rm(root, { recursive: true, force: true, maxRetries: 3 });
}
console.log(`${broken} promises broken, ${Math.round((performance.now() - started) / 1000)} s`);
process.exit(broken === 0 ? 0 : 1);
