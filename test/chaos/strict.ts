import { spawn } from 'node:child_process';
import { writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { authority, KEDGE_NAME } from '../helpers/kedge.ts';
import { tempDir } from '../helpers/temp.ts';
import type { World } from './world.ts';

const START_MS = 5000;

/**
 * A TLS server that says why it refuses a client certificate, as kedges in Go do; node:tls closes without an alert. The
 * port, or undefined where there is no openssl.
 */
export async function startStrict(world: World): Promise<number | undefined> {
  const ca = await authority();
  const [dir, { cert, key }] = await Promise.all([
    tempDir(world.asTest),
    ca.issue({ cn: KEDGE_NAME, dns: [KEDGE_NAME] }),
  ]);
  const path = (name: string, content: string) => {
    writeFileSync(join(dir, name), content);
    return join(dir, name);
  };
  const files = ['-cert', path('crt', cert), '-key', path('key', key), '-CAfile', path('ca', ca.cert)];
  const flags = ['-Verify', '2', '-verify_return_error', '-alpn', 'h2,http/1.1'];
  const server = spawn('openssl', ['s_server', '-accept', '127.0.0.1:0', ...files, ...flags], {
    stdio: ['pipe', 'pipe', 'ignore'],
  });
  world.after(() => server.kill('SIGKILL'));
  return await new Promise((resolve) => {
    const late = setTimeout(() => resolve(undefined), START_MS);
    const settle = (port: number | undefined) => {
      clearTimeout(late);
      resolve(port);
    };
    server.on('error', () => settle(undefined));
    let out = '';
    server.stdout.on('data', (data: Buffer) => {
      out = (out + data).slice(-1000);
      const port = /ACCEPT 127\.0\.0\.1:(\d+)/.exec(out)?.[1];
      if (port !== undefined) settle(Number(port));
    });
  });
}
