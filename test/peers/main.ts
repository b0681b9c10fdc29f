/**
 * Clients that nobody here wrote, against the reference kedge and winch: `npm run peers`. What is not installed is left out
 * with a line that says so; `test/bench/peers.sh` installs it on Debian.
 */
import { type ChildProcess, execFile, spawn, spawnSync } from 'node:child_process';
import { once } from 'node:events';
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import http from 'node:http';
import type { AddressInfo } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import * as grpc from '@grpc/grpc-js';
import { createAuthority } from '../../examples/pki.ts';
import { GreeterService } from '../grpc/generated/greeter.ts';

const HOST = 'orders.shop.us1.test';
const TOKEN = 'peers-token';
const TIMEOUT_MS = 120_000;

const folder = mkdtempSync(join(tmpdir(), 'kedge-peers-'));
const children: ChildProcess[] = [];
const file = (name: string, content: string | object) => {
  writeFileSync(join(folder, name), typeof content === 'string' ? content : JSON.stringify(content));
  return join(folder, name);
};

async function start(path: string, flags: Record<string, string>): Promise<{ port: number; grpcPort: number }> {
  const args = Object.entries(flags).map(([name, value]) => `--${name}=${value}`);
  const child = spawn(process.execPath, [path, ...args], { stdio: ['ignore', 'pipe', 'inherit'] });
  children.push(child);
  const [line] = (await once(createInterface({ input: child.stdout }), 'line')) as [string];
  return JSON.parse(line) as { port: number; grpcPort: number };
}

interface Peer {
  readonly name: string;
  readonly command: string;
  readonly args: readonly string[];
  /** What its output must hold. */
  readonly expected: RegExp;
}

try {
  process.exitCode = (await main()) ? 0 : 1;
} finally {
  for (const child of children) child.kill();
  rmSync(folder, { recursive: true, force: true });
}
process.exit();

async function main(): Promise<boolean> {
  const backend = http.createServer((request, response) => {
    response.setHeader('content-type', 'text/html');
    response.end(`<p>orders at ${request.headers.host}</p>`);
  });
  backend.listen(0, '127.0.0.1');
  await once(backend, 'listening');
  const rpc = new grpc.Server();
  rpc.addService(GreeterService, {
    greet: (
      call: grpc.ServerUnaryCall<{ name: string }, { text: string }>,
      done: grpc.sendUnaryData<{ text: string }>,
    ) => done(null, { text: `hello ${call.request.name}` }),
    greetMany: (call: grpc.ServerWritableStream<{ name: string }, { text: string }>) => {
      for (const letter of call.request.name) call.write({ text: letter });
      call.end();
    },
  } as unknown as grpc.UntypedServiceImplementation);
  const rpcPort = await new Promise<number>((resolve, reject) => {
    const credentials = grpc.ServerCredentials.createInsecure();
    rpc.bindAsync('127.0.0.1:0', credentials, (error, port) => (error === null ? resolve(port) : reject(error)));
  });

  const ca = await createAuthority('peers CA');
  const [server, client] = await Promise.all([
    ca.issue({ cn: 'kedge', dns: ['localhost'], ip: ['127.0.0.1'] }),
    ca.issue({ cn: 'peer' }),
  ]);
  const tls = { ca: file('ca.crt', ca.cert), cert: file('peer.crt', client.cert), key: file('peer.key', client.key) };
  const at = (port: number) => ({ dns_name: '127.0.0.1', port });
  const kedge = await start('examples/kedge/main.ts', {
    server_http_tls_port: 'any',
    server_tls_cert_file: file('kedge.crt', server.cert),
    server_tls_key_file: file('kedge.key', server.key),
    server_tls_client_ca_files: tls.ca,
    // h2load and wrk cannot show a certificate; the token keeps everybody else out.
    server_tls_client_cert_required: 'false',
    unsafe_bearer_token_proxy_auth: TOKEN,
    kedge_config_director_config: JSON.stringify({
      http: { routes: [{ backend_name: 'orders', host_matcher: HOST }] },
      grpc: { routes: [{ backend_name: 'greeter', service_name_matcher: 'test.greeter.*' }] },
    }),
    kedge_config_backendpool_config: JSON.stringify({
      http: { backends: [{ name: 'orders', host: at((backend.address() as AddressInfo).port) }] },
      grpc: { backends: [{ name: 'greeter', host: at(rpcPort) }] },
    }),
  });
  const winch = await start('examples/winch/main.ts', {
    server_http_port: 'any',
    server_grpc_port: 'any',
    server_mapper_config: JSON.stringify({
      routes: [
        { proxy_auth: 'edge', regexp: { exp: '^.*[.]us1[.]test(:[0-9]+)?$', url: `https://localhost:${kedge.port}` } },
      ],
    }),
    server_auth_config: JSON.stringify({ auth_sources: [{ name: 'edge', token: { token: TOKEN } }] }),
    client_tls_cert_file: tls.cert,
    client_tls_key_file: tls.key,
    client_tls_root_ca_files: tls.ca,
    pac_redirect_sh_expressions: '*.us1.test',
  });

  const url = `https://localhost:${kedge.port}/`;
  const token = `proxy-authorization: Bearer ${TOKEN}`;
  const curl = [
    '-sS',
    '--cacert',
    tls.ca,
    '--cert',
    tls.cert,
    '--key',
    tls.key,
    '-H',
    `host: ${HOST}`,
    '-H',
    token,
    '-w',
    ' %{http_version} %{http_code}',
    url,
  ];
  const page = new RegExp(`orders at ${HOST.replaceAll('.', '\\.')}`);
  const greeter = [
    '-plaintext',
    '-authority',
    'greeter.shop.us1.test',
    '-import-path',
    'test/grpc/generated',
    '-proto',
    'greeter.proto',
  ];
  const peers: Peer[] = [
    { name: 'curl over HTTP/1.1', command: 'curl', args: ['--http1.1', ...curl], expected: /orders at .* 1\.1 200$/ },
    { name: 'curl over HTTP/2', command: 'curl', args: ['--http2', ...curl], expected: /orders at .* 2 200$/ },
    {
      name: 'curl through winch',
      command: 'curl',
      args: ['-sS', '--proxy', `http://127.0.0.1:${winch.port}`, `http://${HOST}/`],
      expected: page,
    },
    {
      name: 'Chromium by the PAC file',
      command: 'chromium',
      args: [
        '--headless=new',
        '--no-sandbox',
        '--disable-gpu',
        '--disable-background-networking',
        `--user-data-dir=${join(folder, 'chromium')}`,
        `--proxy-pac-url=http://127.0.0.1:${winch.port}/wpad.dat`,
        '--dump-dom',
        `http://${HOST}/`,
      ],
      expected: page,
    },
    {
      name: 'h2load, 5,000 requests',
      command: 'h2load',
      args: ['-n', '5000', '-c', '10', '-m', '20', '-H', `:authority: ${HOST}`, '-H', token, url],
      expected: /status codes: 5000 2xx, 0 3xx, 0 4xx, 0 5xx/,
    },
    {
      name: 'wrk, 3 s',
      command: 'wrk',
      args: ['-t1', '-c20', '-d3s', '-H', `Host: ${HOST}`, '-H', token, url],
      expected: /^(?![\s\S]*(?:Non-2xx|Socket errors))[\s\S]*\d+ requests in/,
    },
    {
      name: 'grpcurl through winch, unary',
      command: grpcurl(),
      args: [...greeter, '-d', '{"name": "you"}', `127.0.0.1:${winch.grpcPort}`, 'test.greeter.Greeter/Greet'],
      expected: /"text": "hello you"/,
    },
    {
      name: 'grpcurl through winch, stream',
      command: grpcurl(),
      args: [...greeter, '-d', '{"name": "ab"}', `127.0.0.1:${winch.grpcPort}`, 'test.greeter.Greeter/GreetMany'],
      expected: /"text": "a"[\s\S]*"text": "b"/,
    },
  ];

  let isGood = true;
  for (const { name, command, args, expected } of peers) {
    if (command === '' || spawnSync('which', [command]).status !== 0) {
      console.log(`skipped  ${name}: not installed`);
      continue;
    }
    const output = await run(command, args);
    const isRight = expected.test(output);
    console.log(`${isRight ? 'ok      ' : 'FAILED  '} ${name}${isRight ? '' : `\n${output}`}`);
    isGood &&= isRight;
  }
  return isGood;
}

function run(command: string, args: readonly string[]): Promise<string> {
  return new Promise((resolve) => {
    execFile(command, [...args], { timeout: TIMEOUT_MS }, (error, stdout, stderr) => {
      resolve(error === null ? stdout.trimEnd() : `${stdout}\n${stderr}\n${error.message}`);
    });
  });
}

/** From the PATH, or by the Go toolchain where there is one. */
function grpcurl(): string {
  if (spawnSync('which', ['grpcurl']).status === 0) return 'grpcurl';
  const bin = join(tmpdir(), 'kedge-peers-go');
  const own = join(bin, 'grpcurl');
  if (spawnSync(own, ['-version']).status === 0) return own;
  const env = { ...process.env, GOBIN: bin };
  const { status } = spawnSync('go', ['install', 'github.com/fullstorydev/grpcurl/cmd/grpcurl@v1.9.3'], {
    env,
    stdio: 'ignore',
  });
  return status === 0 ? own : '';
}
