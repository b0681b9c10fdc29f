import assert from 'node:assert/strict';
import { once } from 'node:events';
import { readFile, writeFile } from 'node:fs/promises';
import type { ServerResponse } from 'node:http';
import net, { type AddressInfo } from 'node:net';
import { join } from 'node:path';
import { describe, it, type TestContext } from 'node:test';
import { fileURLToPath } from 'node:url';
import { createAuthority } from '../../examples/pki.ts';
import { startGrpcKedge } from '../helpers/grpc-kedge.ts';
import { KEDGE_NAME, type KedgeHandler, startKedge, type TestKedge } from '../helpers/kedge.ts';
import { runNode } from '../helpers/process.ts';
import { startProxy } from '../helpers/proxy.ts';
import { tempDir } from '../helpers/temp.ts';

const MAIN = fileURLToPath(new URL('../../src/cli/main.ts', import.meta.url));
const run = (...args: string[]) => runNode([MAIN, ...args]);

async function files(t: TestContext, kedge: TestKedge): Promise<string[]> {
  const dir = await tempDir(t);
  const { cert, key } = kedge.client;
  const contents = { cert, key, ca: kedge.ca.cert };
  await Promise.all(Object.entries(contents).map(([name, content]) => writeFile(join(dir, name), content)));
  const tls = Object.keys(contents).flatMap((name) => [`--${name}`, join(dir, name)]);
  return ['--kedge', kedge.url, '--server-name', KEDGE_NAME, ...tls];
}

describe('kedge-dialer', () => {
  it('explains without a kedge', async (t) => {
    const dir = await tempDir(t);
    const mapper = join(dir, 'mapper.json');
    const auth = join(dir, 'auth.json');
    const regexp = { exp: '[.](?P<c>[a-z0-9]+)[.]mesh', url: 'https://${c}.example.net' };
    await writeFile(mapper, JSON.stringify({ routes: [{ proxy_auth: 'edge', regexp }] }));
    await writeFile(auth, JSON.stringify({ auth_sources: [{ name: 'edge', token: { token: 'canary-token' } }] }));
    const { status, out } = await run('explain', 'http://a.us1.mesh', '--mapper', mapper, '--auth', auth);
    assert.equal(status, 0, out);
    assert.match(out, /warning: .*routes\[0\]\.regexp: without \^ and \$/);
    assert.match(out, /through a kedge[\s\S]*us1\.example\.net:443[\s\S]*proxy auth +edge/);
    assert.doesNotMatch(out, /canary/);
    const strict = await run('explain', 'http://a.us1.mesh', '--mapper', mapper, '--auth', auth, '--strict');
    assert.equal(strict.status, 2);
    const json = await run(
      'explain',
      'x.us1.prod:90',
      '--grpc',
      '--match',
      '*.prod',
      '--suffix',
      '.k.example.net',
      '--json',
    );
    assert.equal(JSON.parse(json.out).kedges[0].kedge, 'us1.k.example.net:443');
    const refused = await run('explain', 'http://a b', '--kedge', 'https://x.test');
    assert.deepEqual([refused.status, /ERR_KEDGE_TARGET/.test(refused.out)], [1, true]);
  });

  it('checks every stage of the way, on both wires', async (t) => {
    const kedge = await startKedge(t);
    const flags = await files(t, kedge);
    const { status, out } = await run('check', 'http://a.us1:8080', '--path', '/health', ...flags);
    assert.equal(status, 0, out);
    assert.match(out, /ok {3}tcp +\d+ ms {2}127\.0\.0\.1:\d+/);
    assert.match(out, /ok {3}tls .*TLSv1\.3, h2; kedge us1\.kedge\.test until \S+Z; client CN=pod until \S+Z/);
    assert.match(out, /ok {3}request .*status 200/);
    assert.match(out, /a\.us1:8080 can be reached\n$/);
    assert.equal(kedge.seen[0]!.path, '/health');
    assert.equal(kedge.seen[0]!.authority, 'a.us1:8080');
    const rpc = await startGrpcKedge(t);
    const grpc = await run('check', 'a.us1:90', '--grpc', ...(await files(t, rpc)), '--json');
    assert.equal(grpc.status, 0, grpc.out);
    const { ok, steps } = JSON.parse(grpc.out);
    assert.equal(ok, true);
    assert.match(steps.at(-1).detail, /without this service/);
  });

  it('reaches a kedge that asks for no client certificate, with its CA alone', async (t) => {
    const kedge = await startKedge(t, { requireClientCertificate: false });
    const flags = await files(t, kedge);
    const ca = flags.slice(flags.indexOf('--ca'));
    const to = flags.slice(0, flags.indexOf('--cert'));
    const { status, out } = await run('check', 'http://a.us1/', ...to, ...ca);
    assert.equal(status, 0, out);
    assert.match(out, /ok {3}request .*status 200/);
    assert.doesNotMatch(out, /CN=pod/);
    assert.equal(kedge.seen[0]!.clientSubject, 'undefined');
    const unknown = await run('check', 'http://a.us1/', ...to);
    assert.equal(unknown.status, 1, unknown.out);
    assert.match(
      unknown.out,
      /FAIL tls .*ERR_KEDGE_CERTIFICATE.*the identity, the dialer's or the route's, has no `ca`/,
    );
    assert.match(unknown.out, /FAIL tls .*it shows "[^"]+", issued by "test CA", SHA-256 (?:[0-9A-F]{2}:){31}/);
  });

  it('goes the way that calls go through a proxy, and ends where that says nothing', async (t) => {
    const kedge = await startKedge(t, { names: ['k.test'] });
    const flags = (await files(t, kedge)).map((flag) => (flag === kedge.url ? 'https://k.test' : flag));
    const own = flags.filter((flag) => flag !== '--server-name' && flag !== KEDGE_NAME);
    const proxy = await startProxy(t, { 'k.test:443': kedge.port }, 'user:secret');
    const address = proxy.url.replace('//', '//user:secret@');
    const { status, out } = await run('check', 'http://a.us1', ...own, '--proxy', address);
    assert.equal(status, 0, out);
    assert.match(out, /ok {3}tcp .*\n.*ok {3}proxy .*\n.*ok {3}tls .*\n.*ok {3}request .*status 200/);
    assert.doesNotMatch(out, /secret/);
    const refused = await run('check', 'http://a.us1', ...own, '--proxy', proxy.url);
    assert.equal(refused.status, 1);
    assert.match(refused.out, /FAIL proxy .*ERR_KEDGE_CONNECT.*407/);
    const silent = net.createServer((socket) => void socket.on('error', () => {}).resume()).listen(0, '127.0.0.1');
    await once(silent, 'listening');
    t.after(() => silent.close());
    const began = performance.now();
    const mute = await run(
      'check',
      'http://a.us1',
      ...own,
      '--proxy',
      `http://127.0.0.1:${(silent.address() as AddressInfo).port}`,
    );
    assert.equal(mute.status, 1);
    assert.match(mute.out, /FAIL proxy .*ERR_KEDGE_CONNECT/);
    assert.ok(performance.now() - began < 40_000);
  });

  it('says which stage failed and why', async (t) => {
    const kedge = await startKedge(t, {
      handler: (_request, response) => {
        response.statusCode = 502;
        response.setHeader('x-kedge-error', 'unknown route to service');
        response.setHeader('x-kedge-error-type', 'unknown-route-error');
        response.end();
      },
    });
    const flags = await files(t, kedge);
    const reported = await run('check', 'http://a.us1', ...flags);
    assert.equal(reported.status, 1);
    assert.match(reported.out, /FAIL request .*ERR_KEDGE_REPORTED.*unknown route to service/);
    const wrongName = await run(
      'check',
      'http://a.us1',
      ...flags.map((flag) => (flag === KEDGE_NAME ? 'other.test' : flag)),
    );
    assert.equal(wrongName.status, 1);
    assert.match(wrongName.out, /FAIL tls .*ERR_KEDGE_CERTIFICATE.*other\.test/);
    const strange = await (await createAuthority('another CA')).issue({ cn: 'pod' });
    const dir = await tempDir(t);
    await Promise.all([writeFile(join(dir, 'c'), strange.cert), writeFile(join(dir, 'k'), strange.key)]);
    const unknown = [...flags, '--cert', join(dir, 'c'), '--key', join(dir, 'k')];
    const closed = await run('check', 'http://a.us1', ...unknown);
    assert.equal(closed.status, 1);
    assert.match(closed.out, /FAIL tls .*closed the connection right after our certificate/);
    await kedge.close();
    const refused = await run('check', 'http://a.us1', ...flags);
    assert.equal(refused.status, 1);
    assert.match(refused.out, /FAIL tcp .*ECONNREFUSED/);
    const noName = await run('check', 'http://a.us1', '--kedge', 'https://nowhere.invalid');
    assert.match(noName.out, /FAIL dns .*ERR_KEDGE_DNS/);
  });

  it('refuses a target with a path, a query or credentials, says so, and shows no password', async () => {
    const via = ['--kedge', 'https://k.test'];
    for (const [args, reason] of [
      [['explain', 'http://a.us1/v1?key=canary-query'], /a target is a host and a port, without a path or a query/],
      [['check', 'http://ada:canary-word@a.us1/', '--json'], /credentials in a target are not sent/],
      [['check', 'ada:canary-word@a.us1:90', '--grpc'], /credentials in a target are not sent/],
    ] as const) {
      const { status, out } = await run(...args, ...via);
      assert.equal(status, 1, out);
      assert.match(out, /ERR_KEDGE_TARGET/);
      assert.match(out, reason);
      assert.doesNotMatch(out, /canary/);
    }
    assert.match((await run('--help')).out, /path, a query\s+or user:password@ is refused/);
  });

  it('prints its version', async () => {
    const { version } = JSON.parse(await readFile(new URL('../../package.json', import.meta.url), 'utf8'));
    for (const flag of ['--version', '-v']) assert.deepEqual(await run(flag), { status: 0, out: `${version}\n` });
  });

  it('says which command was meant', async () => {
    const hint = async (command: string) => (await run(command, 'http://a.us1')).out.split('\n')[0];
    assert.equal(await hint('explian'), 'kedge-dialer: unknown command explian; did you mean explain?');
    assert.equal(await hint('chek'), 'kedge-dialer: unknown command chek; did you mean check?');
    assert.equal(await hint('dial'), 'kedge-dialer: unknown command dial; there are explain, check and load');
    assert.equal(await hint('http://ada:canary-word@a.us1'), 'kedge-dialer: the command is explain, check or load');
  });

  it('helps, and refuses what makes no sense with status 2', async () => {
    const help = await run('--help');
    assert.equal(help.status, 0);
    assert.match(help.out, /^Usage: kedge-dialer explain/);
    for (const args of [
      [],
      ['explain'],
      ['dial', 'x'],
      ['explain', 'x'],
      ['explain', 'x', 'y', '--kedge', 'https://k'],
      ['explain', 'x', '--kedge', 'https://k', '--mapper', 'm'],
      ['explain', 'x', '--kedge', 'ftp://k'],
      ['explain', 'x', '--mapper', '/nowhere'],
      ['explain', 'x', '--kedge', 'https://k', '--cert', 'c'],
      ['explain', 'x', '--kedge', 'https://k', '--auth', '/nowhere'],
      ['explain', 'x', '--match', '*.prod', '--suffix', '.k.test', '--server-name', 'k.test'],
      ['explain', 'x', '--what'],
    ]) {
      const { status, out } = await run(...args);
      assert.equal(status, 2, `${args} ${out}`);
      assert.match(out, /^kedge-dialer: .+\nTry 'kedge-dialer --help'\.\n$/, out);
    }
  });

  it('ends check where the certificate cannot be read, and where an answer never ends', async (t) => {
    const handler: KedgeHandler = (_request, response) => {
      (response as ServerResponse).write('data: and so on\n\n');
    };
    const kedge = await startKedge(t, { handler });
    const flags = await files(t, kedge);
    const endless = await run('check', 'http://a.us1/', ...flags);
    assert.equal(endless.status, 0, endless.out);
    assert.match(endless.out, /ok {3}request .*status 200, still answering after 5000 ms/);
    const cert = flags[flags.indexOf('--cert') + 1]!;
    const unreadable = await run('check', 'http://a.us1/', ...flags.map((flag) => (flag === cert ? '/nowhere' : flag)));
    assert.equal(unreadable.status, 1, unreadable.out);
    assert.match(unreadable.out, /ERR_KEDGE_IDENTITY/);
  });

  it('says in one line which Node.js it needs', async (t) => {
    const old = join(await tempDir(t), 'old.cjs');
    await writeFile(old, "Object.defineProperty(process.versions, 'node', { value: '20.19.2' });");
    const { status, out } = await runNode(['--require', old, MAIN, '--help']);
    assert.equal(status, 2);
    assert.equal(out, 'kedge-dialer: needs Node.js 22.19 or later; this is 20.19.2\n');
  });
});
