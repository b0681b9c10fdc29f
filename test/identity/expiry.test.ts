import assert from 'node:assert/strict';
import { writeFileSync } from 'node:fs';
import type { ServerResponse } from 'node:http';
import { createServer } from 'node:https';
import type { AddressInfo } from 'node:net';
import { join } from 'node:path';
import { describe, it } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { createAuthority } from '../../examples/pki.ts';
import { grpcDialer } from '../../src/grpc/index.ts';
import {
  createDialer,
  type Identity,
  type IdentitySnapshot,
  isKedgeError,
  type KedgeError,
  pem,
  pemFiles,
  single,
} from '../../src/index.ts';
import { echoClient, startGrpcKedge, unary } from '../helpers/grpc-kedge.ts';
import { authority, KEDGE_NAME, startKedge } from '../helpers/kedge.ts';
import { tempDir } from '../helpers/temp.ts';

const ca = await authority();
/** X.509 counts in seconds. */
const second = (ms: number) => new Date(Math.ceil((Date.now() + ms) / 1000) * 1000);

async function lasting(from: number, until: number): Promise<Identity> {
  const { cert, key } = await ca.issue({ cn: 'pod', notBefore: second(from), notAfter: second(until) });
  return pem({ cert, key, ca: ca.cert });
}

const expired = (error: unknown) => {
  const found = isKedgeError(error) ? error : ((error as Error).cause as KedgeError);
  assert.equal(found.code, 'ERR_KEDGE_IDENTITY_EXPIRED');
  assert.match(found.message, /CN=pod/);
  assert.match(found.message, /\d{4}-\d\d-\d\dT/);
  return true;
};

const expiredEarly = ({ code, stage }: KedgeError) => code === 'ERR_KEDGE_IDENTITY_EXPIRED' && stage === 'kedge';

describe('a certificate that expires', () => {
  it('gives a typed error before anything is dialled, on both wires', async (t) => {
    const kedge = await startGrpcKedge(t);
    const dialer = kedge.dialer({ identity: await lasting(-20_000, -1000) });
    await assert.rejects(dialer.fetch('http://a.us1/'), expired);
    await assert.rejects(unary(new (grpcDialer(dialer).wrap(echoClient()))('a.us1:1'), 'x'), expired);
    assert.match(String(dialer.explain('http://a.us1/').warnings), /the client certificate expired at/);
    assert.equal(kedge.handshakes, 0);
  });

  it('in a file that nobody renews ends its connections, and a renewed one brings them back', async (t) => {
    const kedge = await startKedge(t);
    const dir = await tempDir(t);
    const write = async (until: number) => {
      const { cert, key } = await ca.issue({ cn: 'pod', notAfter: second(until) });
      writeFileSync(join(dir, 'c'), cert);
      writeFileSync(join(dir, 'k'), key);
    };
    await write(1500);
    writeFileSync(join(dir, 'ca'), ca.cert);
    const identity = pemFiles({ cert: join(dir, 'c'), key: join(dir, 'k'), ca: join(dir, 'ca') });
    const dialer = kedge.dialer({ identity, onWarning: () => {} });
    assert.equal((await dialer.fetch('http://a.us1/')).status, 200);
    const left = identity.current().notAfter.getTime() - Date.now();
    await sleep(left + 100);
    await assert.rejects(dialer.fetch('http://a.us1/'), expired);
    for (let i = 0; i < 50 && kedge.sockets.size > 0; i += 1) await sleep(10);
    assert.equal(kedge.sockets.size, 0, 'no connection outlives its certificate');
    await write(60_000);
    await sleep(1000);
    assert.equal((await dialer.fetch('http://a.us1/')).status, 200);
  });

  it('takes its connections along, also when its identity gives no other', async (t) => {
    const kedge = await startKedge(t, {
      handler: (_request, response) => void (response as ServerResponse).writeHead(200).write('x'),
    });
    const first = (await lasting(-1000, 1500)).current();
    let isBroken = false;
    const identity = {
      current: () => {
        if (isBroken) throw new Error('no certificate any more');
        return first;
      },
      subscribe: () => () => {},
    };
    const dialer = kedge.dialer({ identity, onWarning: () => {} });
    const response = await dialer.fetch('http://a.us1/');
    isBroken = true;
    const body = assert.rejects(response.text(), (error: Error) => {
      for (let at: unknown = error; at instanceof Error; at = at.cause) if (isKedgeError(at)) return expiredEarly(at);
      return false;
    });
    await sleep(first.notAfter.getTime() - Date.now() + 100);
    await body;
    await assert.rejects(dialer.fetch('http://a.us1/'), expired);
    for (let i = 0; i < 50 && kedge.sockets.size > 0; i += 1) await sleep(10);
    assert.equal(kedge.sockets.size, 0);
  });

  for (const wire of ['h1', 'h2', 'gRPC'] as const) {
    it(`serves the first call after its identity has another, which it need not tell (${wire})`, async (t) => {
      const kedge = await (wire === 'gRPC' ? startGrpcKedge(t) : startKedge(t));
      let current: () => IdentitySnapshot;
      const identity = { current: () => current(), subscribe: () => () => {} };
      const dialer = kedge.dialer({
        identity,
        onWarning: () => {},
        ...(wire === 'gRPC' ? {} : { http: { protocol: wire } }),
      });
      const client = new (grpcDialer(dialer).wrap(echoClient()))('a.us1:1');
      const call = async () =>
        wire === 'gRPC' ? unary(client, 'x') : (await dialer.fetch('http://a.us1/', { method: 'POST' })).text();
      for (const end of ['the same one', 'an error']) {
        const { current: valid } = await lasting(-1000, 1500);
        current = valid;
        await call();
        if (end === 'an error') {
          current = () => {
            throw new Error('no certificate any more');
          };
        }
        await sleep(valid().notAfter.getTime() - Date.now() + 100);
        await assert.rejects(call(), expired);
        await assert.rejects(call(), expired);
      }
      current = (await lasting(-1000, 60_000)).current;
      await call();
      assert.equal(dialer.stats().kedges[0]!.identity!.serial, current().serial);
      assert.equal(kedge.connections.at(-1)!.clientSerial.toLowerCase(), current().serial.toLowerCase());
    });
  }

  it('by a clock that is wrong serves again when that is right, and ends its connections when it expires', async (t) => {
    const kedge = await startGrpcKedge(t);
    const now = Date.now;
    const identity = await lasting(-10_000, 2000);
    let offset = 3600_000;
    t.mock.method(Date, 'now', () => now.call(Date) + offset);
    const dialer = kedge.dialer({ identity, onWarning: () => {}, http: { protocol: 'h1' } });
    const call = () => unary(new (grpcDialer(dialer).wrap(echoClient()))('a.us1:1'), 'x');
    await assert.rejects(dialer.fetch('http://a.us1/'), expired);
    await assert.rejects(call(), expired);
    offset = 0;
    // A failed dial answers for gRPC calls for a moment.
    await sleep(300);
    await (await dialer.fetch('http://a.us1/')).text();
    await call();
    assert.equal(kedge.sockets.size, 2);
    await sleep(identity.current().notAfter.getTime() - now() + 100);
    for (let i = 0; i < 20 && kedge.sockets.size > 0; i += 1) await sleep(10);
    assert.equal(kedge.sockets.size, 0, 'no connection outlives its certificate');
    await assert.rejects(dialer.fetch('http://a.us1/'), expired);
  });

  it('is warned of once, however often its connections are replaced', async (t) => {
    const kedge = await startKedge(t);
    const warnings: Error[] = [];
    const dialer = kedge.dialer({
      identity: await lasting(-60_000, 20_000),
      connect: { maxConnectionAgeMs: 100 },
      onWarning: (warning) => warnings.push(warning),
    });
    for (let i = 0; i < 20; i += 1) {
      await (await dialer.fetch('http://a.us1/')).text();
      await sleep(30);
    }
    assert.ok(dialer.stats().kedges[0]!.generation > 2);
    assert.deepEqual(
      warnings.map(({ message }) => /two thirds/.test(message)),
      [true],
    );
  });

  it('warns at two thirds of its life, once for all kedges, and not after its dialer is closed', async (t) => {
    const [one, two] = await Promise.all([startKedge(t), startKedge(t)]);
    const warnings: Error[] = [];
    const identity = await lasting(-4000, 3000);
    const routes = [single(one.route()), single(two.route())];
    const dialer = one.dialer({
      identity,
      mapper: (target) => routes[target.hostname.startsWith('one') ? 0 : 1]!(target),
      onWarning: (warning) => warnings.push(warning),
    });
    await Promise.all([dialer.fetch('http://one.us1/'), dialer.fetch('http://two.us1/')]);
    const { notBefore, notAfter } = identity.current();
    await sleep(notBefore.getTime() + ((notAfter.getTime() - notBefore.getTime()) * 2) / 3 - Date.now() + 150);
    assert.deepEqual(
      warnings.map(({ message }) => /two thirds/.test(message)),
      [true],
    );
    assert.equal(dialer.stats().kedges[0]!.identity!.serial, identity.current().serial);
    const quiet = one.dialer({ identity: await lasting(-1000, 2000), onWarning: (warning) => warnings.push(warning) });
    await quiet.fetch('http://one.us1/');
    await quiet.close();
    await sleep(1500);
    assert.equal(warnings.length, 1);
  });

  it('warns when an hour is left', async (t) => {
    const kedge = await startKedge(t);
    const warnings: Error[] = [];
    // 3 h of life; two thirds are spent when an hour is left, give or take what the test shows.
    const identity = await lasting(-4 * 3600_000, 3600_000 + 1200);
    const dialer = kedge.dialer({ identity, onWarning: (warning) => warnings.push(warning) });
    await dialer.fetch('http://one.us1/');
    await sleep(2400);
    assert.deepEqual(
      warnings.map(({ message }) => /an hour left|two thirds/.exec(message)?.[0]),
      ['two thirds', 'an hour left'],
    );
  });
});

describe('a CA that is replaced', () => {
  it('first both, then the new one alone, loses no call', async (t) => {
    const dir = await tempDir(t);
    const [old, next] = await Promise.all([createAuthority('old CA'), createAuthority('new CA')]);
    const server = async (by: typeof old, trusts: string) => {
      const { cert, key } = await by.issue({ cn: KEDGE_NAME, dns: [KEDGE_NAME] });
      return { cert, key, ca: trusts };
    };
    const both = `${old.cert}\n${next.cert}`;
    const kedge = createServer(
      { ...(await server(old, old.cert)), requestCert: true, rejectUnauthorized: true },
      (_request, response) => response.end('ok'),
    );
    await new Promise<void>((resolve) => kedge.listen(0, '127.0.0.1', resolve));
    const certificates = new Set<string>();
    kedge.on('secureConnection', (socket) => certificates.add(String(socket.getPeerCertificate().issuer?.CN)));
    const write = async (by: typeof old, trusts: string) => {
      const { cert, key } = await by.issue({ cn: 'pod' });
      for (const [name, content] of Object.entries({ c: cert, k: key, ca: trusts }))
        writeFileSync(join(dir, name), content);
      await sleep(800);
    };
    await write(old, old.cert);
    const dialer = createDialer({
      mapper: single({
        kedge: `https://127.0.0.1:${(kedge.address() as AddressInfo).port}`,
        serverName: KEDGE_NAME,
      }),
      identity: pemFiles({ cert: join(dir, 'c'), key: join(dir, 'k'), ca: join(dir, 'ca') }),
    });
    t.after(() => dialer.destroy());
    t.after(() => kedge.close());
    let isRunning = true;
    let calls = 0;
    const load = Array.from({ length: 5 }, async () => {
      while (isRunning) {
        assert.equal(await (await dialer.fetch('http://a.us1/', { method: 'POST' })).text(), 'ok');
        calls += 1;
        await sleep(5);
      }
    });
    await sleep(100);
    await write(old, both);
    kedge.setSecureContext(await server(old, both));
    await write(next, both);
    kedge.setSecureContext(await server(next, both));
    await write(next, next.cert);
    kedge.setSecureContext(await server(next, next.cert));
    await write(next, next.cert);
    isRunning = false;
    await Promise.all(load);
    assert.ok(calls > 500, `${calls}`);
    assert.deepEqual(certificates, new Set(['old CA', 'new CA']));
  });
});
