import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import tls from 'node:tls';
import { createAuthority } from '../../examples/pki.ts';
import { pemFiles } from '../../src/index.ts';
import { type Bench, NAME, TARGET } from './bench.ts';
import { spread } from './measure.ts';

const DIALS = 200;

/** What connections and certificates cost. */
export async function connections(bench: Bench): Promise<void> {
  const { server, dial, fact } = bench;
  const { ca, cert, key, httpPort } = server;

  await fact('connections, one SecureContext for all', 'one for each', async () => {
    const shared = tls.createSecureContext({ ca, cert, key });
    const handshake = (secureContext: tls.SecureContext) =>
      new Promise<void>((resolve, reject) => {
        const socket = tls.connect({ host: '127.0.0.1', port: httpPort, servername: NAME, secureContext }, () => {
          socket.destroy();
          resolve();
        });
        socket.on('error', reject);
      });
    const perSecond = async (context: () => tls.SecureContext) => {
      const began = performance.now();
      for (let i = 0; i < DIALS; i += 1) await handshake(context());
      return DIALS / ((performance.now() - began) / 1000);
    };
    await perSecond(() => shared);
    const one = await perSecond(() => shared);
    const each = await perSecond(() => tls.createSecureContext({ ca, cert, key }));
    return `${one.toFixed(0)} against ${each.toFixed(0)} handshakes/s: ${(one / each).toFixed(2)}x`;
  });

  await fact('rotation: from a changed file to the first call with it', 'goal <= 1000 ms', async () => {
    const dir = mkdtempSync(join(tmpdir(), 'kedge-bench-'));
    const own = await createAuthority('rotating CA');
    const paths = { cert: join(dir, 'cert'), key: join(dir, 'key'), ca: join(dir, 'ca') };
    // The bench's server asks for a certificate and takes any, as nothing here depends on who calls.
    const write = async () => {
      const issued = await own.issue({ cn: 'pod' });
      writeFileSync(paths.cert, issued.cert);
      writeFileSync(paths.key, issued.key);
      return issued.serial;
    };
    writeFileSync(paths.ca, ca);
    await write();
    const dialer = dial(httpPort, { identity: pemFiles(paths) });
    const times: number[] = [];
    try {
      const request = async () => (await dialer.fetch(`${TARGET}/`)).text();
      await request();
      for (let i = 0; i < 10; i += 1) {
        const serial = await write();
        const began = performance.now();
        while (dialer.stats().kedges[0]!.identity!.serial !== serial)
          await new Promise((resolve) => setTimeout(resolve, 1));
        await request();
        times.push(performance.now() - began);
      }
    } finally {
      await dialer.destroy();
      rmSync(dir, { recursive: true });
    }
    const { min, median, max } = spread(times);
    return `${median.toFixed(0)} ms (${min.toFixed(0)}-${max.toFixed(0)})`;
  });
}
