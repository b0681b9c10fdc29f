import assert from 'node:assert/strict';
import { generateKeyPairSync } from 'node:crypto';
import { once } from 'node:events';
import { chmod, mkdir, rename, rm, symlink, writeFile } from 'node:fs/promises';
import http from 'node:http';
import type { AddressInfo } from 'node:net';
import { join } from 'node:path';
import { describe, it, type TestContext } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { jwtVerify, SignJWT } from 'jose';
import { Bearer } from '../../src/auth/bearer.ts';
import { execToken, fileToken, googleServiceAccountToken, kubeconfigToken, type TokenSource } from '../../src/index.ts';
import { tempDir } from '../helpers/temp.ts';

const jwt = (secondsLeft: number, more: object = {}) =>
  new SignJWT({ ...more })
    .setProtectedHeader({ alg: 'HS256' })
    .setExpirationTime(Math.floor(Date.now() / 1000) + secondsLeft)
    .sign(new Uint8Array(32));

const unavailable = async (source: TokenSource, message: RegExp) => {
  const wait = new Bearer(source).wait(new AbortController().signal);
  await assert.rejects(wait, (error: Error & { code: string }) => {
    assert.equal(error.code, 'ERR_KEDGE_TOKEN_UNAVAILABLE');
    assert.match(error.message, message);
    return true;
  });
};

describe('fileToken', () => {
  it('reads a projected service-account token again when Kubernetes swaps it', async (t) => {
    const dir = await tempDir(t);
    const project = async (version: string, token: string) => {
      await mkdir(join(dir, version));
      await writeFile(join(dir, version, 'token'), `${token}\n`);
      await symlink(version, join(dir, '..next'));
      await rename(join(dir, '..next'), join(dir, '..data'));
    };
    await project('..1', 'first');
    await symlink('..data/token', join(dir, 'token'));
    const source = fileToken(join(dir, 'token'));
    assert.equal(source.peek(), 'first');
    await project('..2', 'second');
    await rm(join(dir, '..1'), { recursive: true });
    assert.equal(source.peek(), 'first', 'looked at once a second');
    await sleep(1050);
    assert.equal(source.peek(), 'second');
    await project('..3', 'third');
    source.invalidate!();
    assert.equal(source.peek(), 'third', 'at once when it was refused');
  });

  it('keeps the last token while the file is missing, and no longer than it is valid', async (t) => {
    const path = join(await tempDir(t), 'token');
    const named = new RegExp(`token source sa: \`path\`: ${path} cannot be read \\(Error ENOENT\\)`);
    await unavailable(fileToken(path, { name: 'sa' }), named);
    await writeFile(path, await jwt(2));
    const source = fileToken(path);
    const token = source.peek();
    await rm(path);
    source.invalidate!();
    assert.equal(source.peek(), token);
    await sleep(2100);
    await unavailable(source, /cannot be read/);
    await writeFile(path, '  \n');
    await unavailable(fileToken(path), /empty/);
    assert.throws(() => fileToken(''), { code: 'ERR_KEDGE_OPTIONS' });
  });
});

describe('execToken', () => {
  const script = async (t: TestContext, body: string) => {
    const path = join(await tempDir(t), 'plugin');
    await writeFile(path, `#!/bin/sh\n${body}\n`);
    await chmod(path, 0o755);
    return path;
  };

  it('speaks the ExecCredential protocol of client-go', async (t) => {
    const expires = new Date(Date.now() + 60_000).toISOString();
    const command = await script(
      t,
      `case "$KUBERNETES_EXEC_INFO" in *ExecCredential*) ;; *) exit 3 ;; esac
       echo '{"apiVersion":"client.authentication.k8s.io/v1","kind":"ExecCredential",
             "status":{"token":"'$1-$EXTRA'","expirationTimestamp":"${expires}"}}'`,
    );
    const source = execToken({ command, args: ['exec'], env: { EXTRA: 'token' } });
    assert.equal(await source.token(), 'exec-token');
    assert.equal(source.peek(), 'exec-token');
  });

  it('takes an expiry of null for none, as client-go does', async (t) => {
    const command = await script(
      t,
      `echo '{"apiVersion":"client.authentication.k8s.io/v1","kind":"ExecCredential",
              "status":{"token":"for-ever","expirationTimestamp":null}}'`,
    );
    const source = execToken({ command });
    assert.equal(await source.token(), 'for-ever');
    assert.equal(source.peek(), 'for-ever');
  });

  it('finds token and expiry where a command such as gcloud prints them', async (t) => {
    const command = await script(
      t,
      `echo '{"credential":{"access_token":"ya29","token_expiry":"2099-01-01T00:00:00Z"}}'`,
    );
    const paths = { tokenPath: '{.credential.access_token}', expiryPath: '{.credential.token_expiry}' };
    assert.equal(await execToken({ command, ...paths }).token(), 'ya29');
    await unavailable(execToken({ command, tokenPath: '.nothing' }), /printed no \.nothing/);
    assert.throws(() => execToken({ command, tokenPath: 'a[0]' }), { code: 'ERR_KEDGE_OPTIONS' });
  });

  it('says what is wrong, and never what was printed', async (t) => {
    await unavailable(execToken({ command: '/nowhere/plugin' }), /ENOENT/);
    await unavailable(execToken({ command: await script(t, 'echo canary >&2; exit 7') }), /exit status 7$/);
    await unavailable(execToken({ command: await script(t, 'echo canary') }), /not JSON$/);
    await unavailable(execToken({ command: await script(t, 'echo {}') }), /no ExecCredential/);
    await unavailable(execToken({ command: await script(t, 'sleep 5'), deadlineMs: 100 }), /no token within 100 ms/);
  });
});

describe('kubeconfigToken', () => {
  it('gives the token of a user, by whichever means it has one', async (t) => {
    const dir = await tempDir(t);
    const path = join(dir, 'config');
    await writeFile(
      path,
      JSON.stringify({
        apiVersion: 'v1',
        kind: 'Config',
        clusters: [{ name: 'c', cluster: { server: 'https://127.0.0.1:6443' } }],
        contexts: [{ name: 'ctx', context: { cluster: 'c', user: 'static' } }],
        'current-context': 'ctx',
        users: [
          { name: 'static', user: { token: 'static-token' } },
          { name: 'none', user: {} },
          { name: 'file', user: { tokenFile: 'token', token: 'other' } },
          { name: 'only-file', user: { tokenFile: join(dir, 'token') } },
          {
            name: 'exec',
            user: {
              exec: {
                apiVersion: 'client.authentication.k8s.io/v1',
                command: 'sh',
                args: [
                  '-c',
                  `echo '{"apiVersion":"client.authentication.k8s.io/v1","kind":"ExecCredential","status":{"token":"from-exec"}}'`,
                ],
                interactiveMode: 'Never',
              },
            },
          },
        ],
      }),
    );
    assert.equal(await kubeconfigToken({ path }).token(), 'static-token');
    assert.equal(await kubeconfigToken({ path, user: 'exec' }).token(), 'from-exec');
    await writeFile(join(dir, 'token'), 'from-file\n');
    assert.equal(await kubeconfigToken({ path, user: 'file' }).token(), 'from-file', 'it wins, and is beside the file');
    assert.equal(await kubeconfigToken({ path, user: 'only-file' }).token(), 'from-file');
    const before = process.env['KUBECONFIG'];
    process.env['KUBECONFIG'] = path;
    t.after(() => {
      if (before === undefined) delete process.env['KUBECONFIG'];
      else process.env['KUBECONFIG'] = before;
    });
    assert.equal(await kubeconfigToken({ user: 'file' }).token(), 'from-file');
    await rm(join(dir, 'token'));
    assert.equal(await kubeconfigToken({ path, user: 'file' }).token(), 'other', 'while it cannot be read');
    await unavailable(kubeconfigToken({ path, user: 'only-file' }), /has no bearer token/);
    await unavailable(kubeconfigToken({ path: '/dev/zero' }), /cannot be read/);
    await unavailable(kubeconfigToken({ path, user: 'none' }), /has no bearer token/);
    await unavailable(kubeconfigToken({ path, user: 'nobody' }), /no user "nobody"/);
    await unavailable(
      kubeconfigToken({ path: join(dir, 'missing') }),
      /`path`: the kubeconfig .*missing cannot be read/,
    );
  });
});

describe('googleServiceAccountToken', () => {
  it('exchanges a signed assertion for an id token', async (t) => {
    const { privateKey, publicKey } = generateKeyPairSync('rsa', { modulusLength: 2048 });
    const idToken = await jwt(3600, { aud: 'kedge' });
    let url = '';
    let refuse = false;
    const server = http.createServer(async (request, response) => {
      const body = new URLSearchParams(Buffer.concat(await request.toArray()).toString());
      assert.equal(body.get('grant_type'), 'urn:ietf:params:oauth:grant-type:jwt-bearer');
      const { payload, protectedHeader } = await jwtVerify(body.get('assertion')!, publicKey, {
        audience: url,
        issuer: 'robot@example.iam.gserviceaccount.com',
      });
      assert.equal(payload['target_audience'], 'kedge');
      assert.equal(payload['scope'], 'email profile');
      assert.equal(protectedHeader.kid, 'k1');
      response.statusCode = refuse ? 400 : 200;
      response.end(JSON.stringify(refuse ? { error: 'invalid_grant' } : { id_token: idToken }));
    });
    await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
    t.after(() => server.close());
    url = `http://127.0.0.1:${(server.address() as AddressInfo).port}/token`;
    const keyFile = join(await tempDir(t), 'key.json');
    await writeFile(
      keyFile,
      JSON.stringify({
        client_email: 'robot@example.iam.gserviceaccount.com',
        private_key: privateKey.export({ type: 'pkcs8', format: 'pem' }),
        private_key_id: 'k1',
        token_uri: url,
      }),
    );
    const options = { keyFile, audience: 'kedge', scopes: ['email', 'profile'] };
    assert.equal(await googleServiceAccountToken(options).token(), idToken);
    refuse = true;
    await unavailable(googleServiceAccountToken(options), /answered 400: invalid_grant/);
    await unavailable(
      googleServiceAccountToken({ ...options, keyFile: '/nowhere' }),
      /`keyFile`: the key file \/nowhere cannot be read \(Error ENOENT\)/,
    );
    server.close();
    server.closeAllConnections();
    await once(server, 'close');
    await unavailable(googleServiceAccountToken(options), /the source failed/);
  });
});
