import assert from 'node:assert/strict';
import { renameSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, it } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { inspect } from 'node:util';
import { createAuthority } from '../../examples/pki.ts';
import { grpcDialer } from '../../src/grpc/index.ts';
import { createDialer, type KedgeError, pem, pemFiles, single, staticToken } from '../../src/index.ts';
import { echoClient, startGrpcKedge, unary } from '../helpers/grpc-kedge.ts';
import { authority, startKedge } from '../helpers/kedge.ts';
import { tempDir } from '../helpers/temp.ts';

const causeOf = (code: string) => (error: Error) => {
  assert.equal((error.cause as KedgeError).code, code);
  return true;
};

describe('a CA without a client certificate', () => {
  it('verifies kedges that are called with tokens, given as text and as a file', async (t) => {
    const kedge = await startKedge(t, { requireClientCertificate: false });
    const ca = join(await tempDir(t), 'ca.crt');
    writeFileSync(ca, kedge.ca.cert);
    const mapper = single(kedge.route({ proxyAuth: staticToken('proxy') }));
    for (const identity of [
      pem({ ca: kedge.ca.cert }),
      pem({ ca: Buffer.from(kedge.ca.cert) }),
      pemFiles({ ca }),
      { current: () => ({ ca: kedge.ca.cert }), subscribe: () => () => {} },
    ]) {
      const dialer = createDialer({ mapper, identity });
      t.after(() => dialer.destroy());
      for (let i = 0; i < 3; i += 1) assert.equal((await dialer.fetch('http://a.us1/')).status, 200);
      assert.equal(kedge.seen.at(-1)!.headers['proxy-authorization'], 'Bearer proxy');
      assert.equal(dialer.stats().kedges[0]!.identity, undefined);
      assert.equal(dialer.explain('http://a.us1/').kedges[0]!.identity, undefined);
      assert.deepEqual(dialer.explain('http://a.us1/').warnings, []);
    }
    assert.match(inspect(pem({ ca: kedge.ca.cert }).current()), /no certificate/);
  });

  it('verifies them on the gRPC wire too', async (t) => {
    const kedge = await startGrpcKedge(t, { requireClientCertificate: false });
    const dialer = createDialer({ mapper: single(kedge.route()), identity: pem({ ca: (await authority()).cert }) });
    t.after(() => dialer.destroy());
    const client = new (grpcDialer(dialer).wrap(echoClient()))('a.us1:1');
    for (let i = 0; i < 3; i += 1) assert.equal((await unary(client, 'x')).text, 'x');
  });

  it('is the only one that counts, and shows nothing to a kedge that wants a certificate', async (t) => {
    const [open, strict] = await Promise.all([startKedge(t, { requireClientCertificate: false }), startKedge(t)]);
    const other = await createAuthority('another CA');
    const stranger = createDialer({ mapper: single(open.route()), identity: pem({ ca: other.cert }) });
    await assert.rejects(stranger.fetch('http://a.us1/'), causeOf('ERR_KEDGE_CERTIFICATE'));
    const byRoute = createDialer({ mapper: single(open.route({ identity: pem({ ca: other.cert }) })) });
    const system = createDialer({ mapper: single(open.route()) });
    for (const [dialer, hint] of [
      [stranger, /not from a CA in `ca` of the identity, the dialer's or the route's \(`kedge-dialer check` says/],
      [byRoute, /not from a CA in `ca` of the identity, the dialer's or the route's/],
      [system, /not from a CA of the system, and the identity, the dialer's or the route's, has no `ca`/],
    ] as const) {
      await assert.rejects(dialer.fetch('http://a.us1/'), ({ cause }: Error) => hint.test((cause as Error).message));
      await dialer.destroy();
    }
    const wrongName = createDialer({
      mapper: single(open.route({ serverName: 'other.test' })),
      identity: pem({ ca: open.ca.cert }),
    });
    await assert.rejects(
      wrongName.fetch('http://a.us1/'),
      ({ cause }: Error) => /other\.test/.test(String(cause)) && !/`ca`/.test(String(cause)),
    );
    await wrongName.destroy();
    const nobody = createDialer({ mapper: single(strict.route()), identity: pem({ ca: strict.ca.cert }) });
    await assert.rejects(nobody.fetch('http://a.us1/'), (error: Error) => {
      assert.match(String(error.cause), /refused no client certificate/);
      return true;
    });
    await nobody.destroy();
  });

  it('is followed when its file is replaced, and kept while the file is wrong', async (t) => {
    const kedge = await startKedge(t, { requireClientCertificate: false });
    const other = await createAuthority('another CA');
    const ca = join(await tempDir(t), 'ca.crt');
    const replace = (text: string) => {
      writeFileSync(`${ca}.next`, text);
      renameSync(`${ca}.next`, ca);
    };
    replace(other.cert);
    const warnings: string[] = [];
    const identity = pemFiles({ ca, onWarning: ({ message }) => warnings.push(message) });
    const dialer = createDialer({ mapper: single(kedge.route()), identity });
    t.after(() => dialer.destroy());
    await assert.rejects(dialer.fetch('http://a.us1/'), causeOf('ERR_KEDGE_CERTIFICATE'));
    replace(kedge.ca.cert);
    await sleep(1000);
    assert.equal((await dialer.fetch('http://a.us1/')).status, 200);
    replace('nothing');
    await sleep(1900);
    assert.equal((await dialer.fetch('http://a.us1/')).status, 200);
    assert.equal(warnings.length, 1);
    assert.match(warnings[0]!, /the last one stays in use/);
  });

  it('is refused where it is no CA, or half of an identity', async () => {
    const { cert } = await authority();
    const { key } = await (await authority()).issue({ cn: 'pod' });
    for (const wrong of [
      { ca: '' },
      { ca: 1 },
      { ca: cert, key },
      { ca: cert, cert },
      { ca: cert, passphrase: 'x' },
      {},
    ]) {
      assert.throws(() => pem(wrong as never), { code: 'ERR_KEDGE_IDENTITY', stage: 'config' }, JSON.stringify(wrong));
    }
    for (const wrong of [{ ca: '' }, { ca: 1 }, { ca: 'x', key: 'y' }, { ca: 'x', pfx: 'y' }]) {
      assert.throws(() => pemFiles(wrong as never), { code: 'ERR_KEDGE_IDENTITY', stage: 'config' });
    }
  });
});

describe('an identity of the user', () => {
  it('that is asynchronous, or gives half of a certificate, is an error of each call and of nothing else', async (t) => {
    const kedge = await startKedge(t);
    const rejections: unknown[] = [];
    const note = (error: unknown) => rejections.push(error);
    process.on('unhandledRejection', note);
    t.after(() => process.off('unhandledRejection', note));
    for (const current of [
      () => Promise.reject(new Error('asynchronous')),
      () => undefined,
      () => null,
      () => ({ ca: kedge.ca.cert, cert: kedge.client.cert }),
      () => {
        throw 'a string';
      },
    ]) {
      const identity = { current: current as never, subscribe: () => () => {} };
      const dialer = createDialer({ mapper: single(kedge.route()), identity });
      for (let i = 0; i < 2; i += 1) await assert.rejects(dialer.fetch('http://a.us1/'), causeOf('ERR_KEDGE_IDENTITY'));
      await dialer.close();
    }
    await sleep(20);
    assert.deepEqual(rejections, []);
  });
});
