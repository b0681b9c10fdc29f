import assert from 'node:assert/strict';
import { execFile } from 'node:child_process';
import { X509Certificate } from 'node:crypto';
import { mkdirSync, readFileSync, renameSync, rmSync, symlinkSync, truncateSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, it, type TestContext } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { inspect, promisify } from 'node:util';
import type { Certificate } from '../../examples/pki.ts';
import { type Identity, type IdentitySnapshot, isKedgeError, pemFiles } from '../../src/index.ts';
import { authority } from '../helpers/kedge.ts';
import { trackLeaks } from '../helpers/leaks.ts';
import { tempDir } from '../helpers/temp.ts';

const ca = await authority();
const issue = (n: number) => Promise.all(Array.from({ length: n }, () => ca.issue({ cn: 'pod' })));

/** As the kubelet writes a Secret: a new directory, then the symbolic link `..data` swapped to it. */
function project(dir: string, version: number, { cert, key }: Certificate): void {
  const own = join(dir, `..${version}`);
  mkdirSync(own);
  writeFileSync(join(own, 'tls.crt'), cert);
  writeFileSync(join(own, 'tls.key'), key);
  writeFileSync(join(own, 'ca.crt'), ca.cert);
  symlinkSync(`..${version}`, join(dir, '..data_tmp'));
  renameSync(join(dir, '..data_tmp'), join(dir, '..data'));
  if (version === 0)
    for (const name of ['tls.crt', 'tls.key', 'ca.crt']) symlinkSync(`..data/${name}`, join(dir, name));
  else rmSync(join(dir, `..${version - 1}`), { recursive: true });
}

function write(dir: string, { cert, key }: Certificate): void {
  writeFileSync(join(dir, 'tls.crt'), cert);
  writeFileSync(join(dir, 'tls.key'), key);
  writeFileSync(join(dir, 'ca.crt'), ca.cert);
}

function files(t: TestContext, dir: string): { identity: Identity; published: IdentitySnapshot[]; warnings: Error[] } {
  const warnings: Error[] = [];
  const paths = { cert: join(dir, 'tls.crt'), key: join(dir, 'tls.key'), ca: join(dir, 'ca.crt') };
  const identity = pemFiles({ ...paths, onWarning: (warning) => warnings.push(warning) });
  const published: IdentitySnapshot[] = [];
  identity.current();
  t.after(identity.subscribe(() => published.push(identity.current())));
  return { identity, published, warnings };
}

async function until(condition: () => boolean, ms: number): Promise<number> {
  const began = performance.now();
  while (!condition()) {
    assert.ok(performance.now() - began < ms, `within ${ms} ms`);
    await sleep(5);
  }
  return performance.now() - began;
}

describe('pemFiles', () => {
  it('publishes no mismatched pair in 3,000 swaps of ..data, and ends with the last', async (t) => {
    const dir = await tempDir(t);
    const certificates = await issue(10);
    project(dir, 0, certificates[0]!);
    const { identity, published, warnings } = files(t, dir);
    for (let i = 1; i <= 3000; i += 1) {
      project(dir, i, certificates[i % 10]!);
      if (i % 5 === 0) await sleep(0);
      if (i % 100 === 0) await sleep(40);
    }
    await until(() => identity.current().serial === certificates[0]!.serial, 1000);
    assert.ok(published.length >= 20, `${published.length} seen`);
    for (const { cert, key } of published) {
      const pair = certificates.find((each) => each.cert === String(cert));
      assert.equal(String(key), pair!.key);
    }
    assert.deepEqual(warnings, []);
  });

  for (const [how, replace] of Object.entries({
    'written in place': (dir: string, next: Certificate) => write(dir, next),
    'renamed into place, key first': (dir: string, { cert, key }: Certificate) => {
      for (const [name, content] of [
        ['tls.key', key],
        ['tls.crt', cert],
      ] as const) {
        writeFileSync(join(dir, `.${name}`), content);
        renameSync(join(dir, `.${name}`), join(dir, name));
      }
    },
  })) {
    it(`notices files that are ${how} within a second`, async (t) => {
      const dir = await tempDir(t);
      const certificates = await issue(4);
      write(dir, certificates[0]!);
      const { identity, published, warnings } = files(t, dir);
      for (const next of certificates.slice(1)) {
        replace(dir, next);
        await until(() => identity.current().serial === next.serial, 1000);
      }
      assert.equal(published.length, 3);
      assert.deepEqual(warnings, []);
    });
  }

  it('keeps the last good one while the files are wrong, warns once, and heals within a second', async (t) => {
    const [good, next, other] = await issue(3);
    const dir = await tempDir(t);
    write(dir, good!);
    const { identity, warnings } = files(t, dir);
    const [cert, key, authorities] = [join(dir, 'tls.crt'), join(dir, 'tls.key'), join(dir, 'ca.crt')];
    const wrong: Record<string, () => void> = {
      'a truncated certificate': () => writeFileSync(cert, next!.cert.slice(0, 200)),
      'a certificate without its key': () => writeFileSync(cert, next!.cert),
      "somebody else's key": () => {
        writeFileSync(cert, next!.cert);
        writeFileSync(key, other!.key);
      },
      'an empty CA file': () => writeFileSync(authorities, ''),
      'a CA file of garbage': () =>
        writeFileSync(authorities, '-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----'),
      'no key at all': () => rmSync(key),
    };
    for (const [what, spoil] of Object.entries(wrong)) {
      spoil();
      await until(() => warnings.length > 0, 2500);
      await sleep(700);
      assert.equal(warnings.length, 1, what);
      assert.ok(isKedgeError(warnings[0]) && warnings[0].code === 'ERR_KEDGE_IDENTITY');
      assert.match(warnings[0].message, new RegExp(`serial ${good!.serial} stays in use`));
      assert.equal(identity.current().serial, good!.serial, what);
      // The fix is another certificate, then the first one again.
      write(dir, next!);
      await until(() => identity.current().serial === next!.serial, 1000);
      write(dir, good!);
      await until(() => identity.current().serial === good!.serial, 1000);
      warnings.length = 0;
    }
    // Dribbled: byte by byte, as a slow writer does.
    for (let at = 0; at <= next!.cert.length; at += 100) {
      writeFileSync(cert, next!.cert.slice(0, at));
      await sleep(10);
    }
    writeFileSync(cert, next!.cert);
    writeFileSync(key, next!.key);
    await until(() => identity.current().serial === next!.serial, 1000);
    assert.deepEqual(warnings, []);
  });

  for (const what of ['no descriptors', 'FIFOs']) {
    it(`is read again after there were ${what} in place of files, and never waits`, async (t) => {
      const dir = await tempDir(t);
      const [one, two] = await issue(2);
      for (const [prefix, { cert, key }, token] of [
        ['', one!, 'token-1'],
        ['next.', two!, 'token-2'],
      ] as const) {
        for (const [name, content] of Object.entries({ 'tls.crt': cert, 'tls.key': key, token }))
          writeFileSync(join(dir, prefix + name), content);
      }
      const program = new URL('../helpers/changing-files.ts', import.meta.url).pathname;
      const command = 'ulimit -n 64; exec timeout -s KILL 20 "$@"';
      const args = ['-c', command, 'sh', process.execPath, program, what, dir];
      const { NODE_TEST_CONTEXT: _, ...env } = process.env;
      const printed = await promisify(execFile)('sh', args, { env });
      const { before, during, after } = JSON.parse(printed.stdout);
      assert.deepEqual(before, { serial: one!.serial, token: 'token-1', warnings: 0 });
      if (what === 'FIFOs') assert.deepEqual(during, { serial: one!.serial, token: 'token-1', warnings: 1 });
      assert.equal(after.serial, two!.serial);
      assert.equal(after.token, 'token-2');
    });
  }

  it('takes only files for files, of a size that certificates have', async (t) => {
    const dir = await tempDir(t);
    const [one] = await issue(1);
    write(dir, one!);
    const paths = { cert: join(dir, 'tls.crt'), key: join(dir, 'tls.key') };
    for (const [cert, code] of [
      [dir, 'EISDIR'],
      ['/dev/zero', 'ERR_NOT_A_REGULAR_FILE'],
      ['/dev/tty', 'ERR_NOT_A_REGULAR_FILE'],
    ] as const) {
      assert.throws(() => pemFiles({ ...paths, cert }).current(), {
        message: new RegExp(`cannot be read \\(${code}\\)`),
      });
    }
    truncateSync(paths.key, 2 ** 40);
    assert.throws(() => pemFiles(paths).current(), { message: /tls\.key cannot be read \(EFBIG\)/ });
  });

  it('notices files that were written twice within one tick of the clock, to the same size', async (t) => {
    const dir = await tempDir(t);
    const [one, two] = await issue(2);
    const keys = [one!, two!].map(({ key }) => key.trimEnd().padEnd(400, '\n'));
    const certs = [one!, two!].map(({ cert }) => cert.trimEnd().padEnd(1200, '\n'));
    for (let i = 0; i < 20; i += 1) {
      write(dir, { ...one!, cert: certs[0]!, key: keys[0]! });
      const { identity } = files(t, dir);
      write(dir, { ...one!, cert: certs[1]!, key: keys[1]! });
      await sleep(i);
      const fresh = pemFiles({ cert: join(dir, 'tls.crt'), key: join(dir, 'tls.key') });
      assert.equal(fresh.current().serial, two!.serial);
      write(dir, { ...one!, cert: certs[0]!, key: keys[0]! });
      assert.equal(fresh.current().serial, one!.serial);
      await until(() => identity.current().serial === one!.serial, 1000);
    }
  });

  it('tells all its subscribers, also beside one that throws, and stops with the last of them', async (t) => {
    const checkLeaks = trackLeaks();
    const dir = await tempDir(t);
    const [one, two, three] = await issue(3);
    write(dir, one!);
    const warnings: Error[] = [];
    const identity = pemFiles({
      cert: join(dir, 'tls.crt'),
      key: join(dir, 'tls.key'),
      onWarning: (warning) => warnings.push(warning),
    });
    identity.current();
    let told = 0;
    const count = () => {
      told += 1;
    };
    const ends = [
      identity.subscribe(() => {
        throw new Error('of the subscriber');
      }),
      identity.subscribe(count),
      identity.subscribe(count),
    ];
    write(dir, two!);
    await until(() => told === 2, 1000);
    assert.deepEqual(
      warnings.map(({ cause }) => (cause as Error).message),
      ['of the subscriber'],
    );
    for (const i of [0, 1, 1, 1]) ends[i]!();
    write(dir, three!);
    await until(() => told === 3, 1000);
    for (const end of ends) end();
    await checkLeaks();
    write(dir, one!);
    assert.equal(identity.current().serial, one!.serial, 'nobody watches any more, so whoever asks looks');
    assert.equal(told, 3);
  });

  it('is read by its first use, and names the file that cannot be', async (t) => {
    const dir = await tempDir(t);
    const paths = { cert: join(dir, 'tls.crt'), key: join(dir, 'tls.key') };
    const identity = pemFiles(paths);
    assert.throws(() => identity.current(), {
      code: 'ERR_KEDGE_IDENTITY',
      message: /`cert`.*tls\.crt cannot be read \(ENOENT\)/,
    });
    const [one, two] = await issue(2);
    write(dir, one!);
    assert.equal(identity.current().serial, one!.serial);
    write(dir, two!);
    assert.equal(identity.current().serial, two!.serial, 'nobody watches, so whoever asks looks');
    for (const wrong of [
      {},
      { cert: 'x' },
      { ...paths, cert: 1 },
      { ...paths, more: 'x' },
      { ...paths, passphrase: 1 },
      undefined,
    ]) {
      assert.throws(() => pemFiles(wrong as never), { code: 'ERR_KEDGE_IDENTITY', stage: 'config' });
    }
    assert.doesNotMatch(inspect(identity, { depth: 9 }) + JSON.stringify(identity.current()), /PRIVATE KEY/);
  });

  it('takes a chain, several CAs, encrypted and other kinds of keys', async (t) => {
    const { createPrivateKey } = await import('node:crypto');
    for (const keyType of ['rsa', 'ec', 'ed25519'] as const) {
      const dir = await tempDir(t);
      const { cert, key, serial } = await ca.issue({ cn: 'pod', keyType });
      const encrypted = createPrivateKey(key).export({
        type: 'pkcs8',
        format: 'pem',
        cipher: 'aes-256-cbc',
        passphrase: 'p',
      });
      write(dir, { cert: `${cert}\n${ca.cert}`, key: String(encrypted), serial });
      writeFileSync(join(dir, 'ca.crt'), `# two\n${ca.cert}\n${cert}`);
      const paths = { cert: join(dir, 'tls.crt'), key: join(dir, 'tls.key'), ca: join(dir, 'ca.crt') };
      assert.equal(pemFiles({ ...paths, passphrase: 'p' }).current().serial, serial);
      assert.throws(() => pemFiles({ ...paths, passphrase: 'wrong' }).current(), { code: 'ERR_KEDGE_IDENTITY' });
      writeFileSync(paths.cert, cert.trimEnd() + ca.cert);
      assert.throws(
        () => pemFiles({ ...paths, passphrase: 'p' }).current(),
        { code: 'ERR_KEDGE_IDENTITY' },
        'no line break',
      );
      writeFileSync(paths.cert, cert);
      assert.equal(new X509Certificate(readFileSync(paths.cert)).serialNumber, serial);
    }
  });
});
