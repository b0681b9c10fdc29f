import assert from 'node:assert/strict';
import { spawnSync } from 'node:child_process';
import { readFileSync, renameSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, it, type TestContext } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { inspect } from 'node:util';
import type { Certificate } from '../../examples/pki.ts';
import { pkcs12, pkcs12File } from '../../src/index.ts';
import { authority, startKedge } from '../helpers/kedge.ts';
import { tempDir } from '../helpers/temp.ts';

const ca = await authority();

/** By OpenSSL, as everybody makes them. */
async function container(t: TestContext, { cert, key }: Certificate, passphrase: string): Promise<Buffer> {
  const dir = await tempDir(t);
  writeFileSync(join(dir, 'c.pem'), cert);
  writeFileSync(join(dir, 'k.pem'), key);
  const args = [
    'pkcs12',
    '-export',
    '-in',
    'c.pem',
    '-inkey',
    'k.pem',
    '-out',
    'x.p12',
    '-passout',
    `pass:${passphrase}`,
  ];
  const { status, stderr } = spawnSync('openssl', args, { cwd: dir, encoding: 'utf8' });
  assert.equal(status, 0, stderr);
  return readFileSync(join(dir, 'x.p12'));
}

const hasOpenssl = spawnSync('openssl', ['version']).status === 0;

describe('pkcs12', { skip: hasOpenssl ? false : 'needs the openssl command' }, () => {
  it('shows the certificate of a container to the kedge', async (t) => {
    const kedge = await startKedge(t);
    for (const keyType of ['rsa', 'ec'] as const) {
      const certificate = await ca.issue({ cn: `pod-${keyType}`, keyType });
      const identity = pkcs12({ pfx: await container(t, certificate, 'secret'), passphrase: 'secret', ca: ca.cert });
      const { serial, subject, notAfter } = identity.current();
      assert.deepEqual([serial, subject], [certificate.serial, `CN=pod-${keyType}`]);
      assert.ok(notAfter > new Date());
      assert.equal((await kedge.dialer({ identity }).fetch('http://a.us1/')).status, 200);
      assert.equal(kedge.seen.at(-1)!.clientSerial, serial);
      assert.doesNotMatch(inspect(identity.current(), { showHidden: false }), /secret/);
    }
  });

  it('follows a file that is replaced', async (t) => {
    const dir = await tempDir(t);
    const [one, two] = await Promise.all([ca.issue({ cn: 'pod' }), ca.issue({ cn: 'pod' })]);
    const pfx = join(dir, 'tls.p12');
    writeFileSync(pfx, await container(t, one, 'secret'));
    const identity = pkcs12File({ pfx, passphrase: 'secret' });
    let changes = 0;
    t.after(
      identity.subscribe(() => {
        changes += 1;
      }),
    );
    assert.equal(identity.current().serial, one.serial);
    writeFileSync(`${pfx}.next`, await container(t, two, 'secret'));
    renameSync(`${pfx}.next`, pfx);
    for (let i = 0; i < 100 && changes === 0; i += 1) await sleep(10);
    assert.equal(identity.current().serial, two.serial);
  });

  it('refuses what cannot be opened', async (t) => {
    const pfx = await container(t, await ca.issue({ cn: 'pod' }), 'secret');
    for (const wrong of [
      {},
      { pfx: 'text' },
      { pfx, passphrase: 'wrong' },
      { pfx: Buffer.from('x') },
      { pfx, key: 'x' },
      undefined,
    ]) {
      assert.throws(() => pkcs12(wrong as never), { code: 'ERR_KEDGE_IDENTITY' });
    }
    assert.throws(() => pkcs12({ pfx, passphrase: 'secret', ca: '' }), { code: 'ERR_KEDGE_IDENTITY' });
  });
});
