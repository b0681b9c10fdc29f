import assert from 'node:assert/strict';
import { spawn, spawnSync } from 'node:child_process';
import { readFileSync } from 'node:fs';
import net from 'node:net';
import { describe, it } from 'node:test';
import { fileURLToPath } from 'node:url';
import { tempDir } from '../helpers/temp.ts';

const ROOT = fileURLToPath(new URL('../..', import.meta.url));
const [certificates, programs, curl, check] = [
  ...readFileSync(`${ROOT}/examples/README.md`, 'utf8').matchAll(/```sh\n([\s\S]*?)```/g),
].map(([, code]) => code!);
const hasTools = ['curl --version', 'openssl version', 'bash --version'].every(
  (command) => spawnSync(command, { shell: true }).status === 0,
);

async function freePort(): Promise<number> {
  const server = net.createServer().listen(0, '127.0.0.1');
  await new Promise((resolve) => server.once('listening', resolve));
  const { port } = server.address() as net.AddressInfo;
  await new Promise((resolve) => server.close(resolve));
  return port;
}

describe('the walk in the README of the examples', () => {
  it('can be pasted', { skip: hasTools ? false : 'needs curl, openssl and bash', timeout: 120_000 }, async (t) => {
    const dir = await tempDir(t);
    const ports = new Map(
      await Promise.all(
        ['8088', '8443', '8081', '8070', '8071'].map(async (port) => [port, String(await freePort())] as const),
      ),
    );
    // Another folder and other ports: several of these may run on one machine.
    const own = (text: string) =>
      text.replaceAll('/tmp/walk', dir).replace(/\b(8088|8443|8081|8070|8071)\b/g, (port) => ports.get(port)!);
    const script = [
      own(certificates!),
      // `npm run winch` builds, which would take the package away from the tests that run beside this one.
      own(programs!)
        .replace('npm run --silent winch --', 'node examples/winch/main.ts')
        .replace("'--pac_", `--server_http_port=${ports.get('8070')} --server_grpc_port=${ports.get('8071')} '--pac_`),
      own(curl!),
      own(check!).replace('npx kedge-dialer', 'node dist/cli/main.js'),
    ].join('\n');
    const child = spawn('bash', ['-c', script], { cwd: ROOT, detached: true });
    // A group of its own, and gone with all that it left in the background.
    t.after(() => {
      try {
        process.kill(-child.pid!, 'SIGKILL');
      } catch {}
    });
    let out = '';
    for (const stream of [child.stdout, child.stderr]) {
      stream.on('data', (chunk) => {
        out += chunk;
      });
    }
    const status = await new Promise((resolve) => child.on('exit', resolve));
    assert.equal(status, 0, out);
    assert.match(out, /orders for CN=laptop/);
    assert.match(out, /function FindProxyForURL/);
    assert.match(out, /kedge_requests_total\{wire="h[^}]*status="200"\} 1/);
    assert.match(out, /orders\.shop\.svc\.us1\.example can be reached/);
  });
});
