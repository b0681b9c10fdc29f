import assert from 'node:assert/strict';
import { X509Certificate } from 'node:crypto';
import { once } from 'node:events';
import { existsSync } from 'node:fs';
import { writeFile } from 'node:fs/promises';
import http2 from 'node:http2';
import https from 'node:https';
import net, { type AddressInfo } from 'node:net';
import { join } from 'node:path';
import { json } from 'node:stream/consumers';
import { describe, it, type TestContext } from 'node:test';
import tls from 'node:tls';
import * as grpc from '@grpc/grpc-js';
import { type Certificate, type CertificateRequest, createAuthority, type KeyType } from '../../examples/pki.ts';
import { type Echo, echoClient, startGrpcKedge, unary } from './grpc-kedge.ts';
import { KEDGE_NAME, type Seen, sha256, startKedge, type TestKedge } from './kedge.ts';
import { trackLeaks } from './leaks.ts';
import { spawnNode } from './process.ts';
import { tempDir } from './temp.ts';

describe('certificates', () => {
  const HOUR_MS = 60 * 60 * 1000;
  const keyTypes: KeyType[] = ['ec', 'rsa', 'ed25519'];

  for (const keyType of keyTypes) {
    it(`with ${keyType} keys prove both ends of a connection, by name and by address`, async (t) => {
      const ca = await createAuthority('a CA, Inc.');
      const server = await ca.issue({
        cn: 'kedge',
        dns: ['kedge.test'],
        ip: ['127.0.0.1', '::1'],
        keyType,
        client: false,
      });
      const client = await ca.issue({ cn: 'pod', uri: ['spiffe://test/pod'], keyType, server: false });
      const port = await listen(t, server, ca.cert);
      for (const servername of ['kedge.test', '']) {
        assert.equal(await greet(port, servername, ca.cert, client), `pod URI:spiffe://test/pod ${client.serial}`);
      }
      await assert.rejects(greet(port, 'other.test', ca.cert, client), { code: 'ERR_TLS_CERT_ALTNAME_INVALID' });
    });
  }

  it('have the extensions that strict verifiers ask for', async () => {
    const ca = await createAuthority('a CA');
    const root = new X509Certificate(ca.cert);
    const leaf = new X509Certificate((await ca.issue({ cn: 'leaf', dns: ['leaf.test'] })).cert);
    assert.equal(root.ca, true);
    assert.equal(leaf.ca, false);
    assert.equal(root.subject, 'CN=a CA');
    assert.equal(leaf.checkIssued(root), true);
    assert.equal(leaf.verify(root.publicKey), true);
    assert.deepEqual(leaf.keyUsage, ['1.3.6.1.5.5.7.3.1', '1.3.6.1.5.5.7.3.2']);
    assert.equal(leaf.checkHost('leaf.test'), 'leaf.test');
  });

  const refused: Record<string, [string, Partial<CertificateRequest>, foreign?: boolean]> = {
    'a server-only certificate': ['INVALID_PURPOSE', { client: false }],
    'an expired one': ['CERT_HAS_EXPIRED', { notBefore: ago(2 * HOUR_MS), notAfter: ago(HOUR_MS) }],
    'one of the future': ['CERT_NOT_YET_VALID', { notBefore: ago(-HOUR_MS) }],
    'one of a CA with the same name and another key': ['UNABLE_TO_VERIFY_LEAF_SIGNATURE', {}, true],
  };
  for (const [what, [code, request, foreign]] of Object.entries(refused)) {
    it(`do not let in a client with ${what}`, async (t) => {
      const ca = await createAuthority('a CA');
      const client = await (foreign ? await createAuthority('a CA') : ca).issue({ cn: 'pod', ...request });
      const port = await listen(t, await ca.issue({ cn: 'kedge', dns: ['kedge.test'] }), ca.cert);
      assert.equal(await greet(port, 'kedge.test', ca.cert, client), code);
    });
  }
});

describe('the recording kedge', () => {
  const BODY = 'x'.repeat(100_000);
  const callers = {
    'http/1.1': async (kedge: TestKedge) => {
      const request = https.request({ ...peer(kedge), port: kedge.port, path: '/v1?q=1', method: 'PUT', agent: false });
      request.setHeader('host', 'orders.shop:8080');
      request.setHeader('X-Mixed', 'Case');
      request.end(BODY);
      const [response] = await once(request, 'response');
      return json(response);
    },
    h2: async (kedge: TestKedge) => {
      const session = http2.connect(kedge.url, peer(kedge));
      const stream = session.request({
        ':method': 'PUT',
        ':path': '/v1?q=1',
        ':authority': 'orders.shop:8080',
        'x-mixed': 'Case',
      });
      stream.end(BODY);
      const answer = await json(stream);
      session.close();
      return answer;
    },
  };

  for (const [alpn, call] of Object.entries(callers)) {
    it(`tells what it saw over ${alpn}`, async (t) => {
      trackLeaks(t);
      const kedge = await startKedge(t, { alpn: [alpn] });
      const echo = (await call(kedge)) as Seen & { bytes: number; sha256: string };
      const { headers, rawHeaders, ...rest } = echo;
      assert.deepEqual(rest, {
        alpn,
        method: 'PUT',
        authority: 'orders.shop:8080',
        path: '/v1?q=1',
        sni: KEDGE_NAME,
        clientSubject: 'pod',
        clientSerial: kedge.client.serial,
        resumed: false,
        connection: 1,
        bytes: BODY.length,
        sha256: sha256(BODY),
      });
      assert.equal(headers['x-mixed'], 'Case');
      assert.equal(rawHeaders[rawHeaders.indexOf(alpn === 'h2' ? 'x-mixed' : 'X-Mixed') + 1], 'Case');
      assert.equal(kedge.handshakes, 1);
      assert.equal(kedge.seen.length, 1);
    });
  }

  it('counts no handshake without a client certificate', async (t) => {
    const kedge = await startKedge(t);
    const socket = tls.connect({ ...peer(kedge), port: kedge.port, cert: undefined, key: undefined });
    await assert.rejects(once(socket, 'close'), { code: 'ERR_SSL_TLSV13_ALERT_CERTIFICATE_REQUIRED' });
    assert.equal(kedge.handshakes, 0);
  });
});

describe('the gRPC kedge', () => {
  it('answers calls of every kind for many services, and records them', async (t) => {
    trackLeaks(t);
    const services = Array.from({ length: 20 }, (_, i) => `svc${i}.Echo`);
    const kedge = await startGrpcKedge(t, { services });
    const credentials = grpc.credentials.createSsl(
      Buffer.from(kedge.ca.cert),
      Buffer.from(kedge.client.key),
      Buffer.from(kedge.client.cert),
    );
    for (const service of services) {
      const authority = `${service.toLowerCase()}.shop:9090`;
      const Client = echoClient(service);
      const client = new Client(`127.0.0.1:${kedge.port}`, credentials, {
        'grpc.ssl_target_name_override': KEDGE_NAME,
        'grpc.default_authority': authority,
      });
      t.after(() => client.close());
      assert.deepEqual(await unary(client, 'hi'), { text: 'hi', authority });
      assert.deepEqual(await client.serverStream({ text: 'ab' }).toArray(), [
        { text: 'a', authority },
        { text: 'b', authority },
      ]);
      const bidi = client.bidi();
      bidi.end({ text: 'c' });
      assert.deepEqual(await bidi.toArray(), [{ text: 'c', authority }]);
      const joined = await new Promise<Echo | undefined>((resolve, reject) => {
        const call = client.clientStream(new grpc.Metadata(), (error, reply) =>
          error ? reject(error) : resolve(reply),
        );
        call.write({ text: 'd' });
        call.end({ text: 'e' });
      });
      assert.deepEqual(joined, { text: 'de', authority });
      const { metadata, ...call } = kedge.calls.at(-1)!;
      assert.deepEqual(call, {
        service,
        path: `/${service}/ClientStream`,
        authority,
        clientSubject: 'pod',
        clientSerial: kedge.client.serial,
      });
      assert.match(String(metadata.get('user-agent')), /grpc-node-js/);
      assert.equal(kedge.connections.at(-1)!.sni, KEDGE_NAME);
    }
    assert.equal(kedge.calls.length, 4 * services.length);
  });
});

describe('trackLeaks()', () => {
  it('finds what was left open', async (t) => {
    const check = trackLeaks();
    const server = net.createServer().listen(0, '127.0.0.1');
    t.after(() => server.close());
    await once(server, 'listening');
    await assert.rejects(check(), /TCPServerWrap/);
  });

  it('looks after the test has torn down what it made', async (t) => {
    const order: string[] = [];
    await t.test('a test', (inner) => {
      // Stands in for the check, which would see this test's own resources only by failing it.
      inner.after(() => inner.after(() => void order.push('check')));
      inner.after(() => void order.push('teardown'));
    });
    assert.deepEqual(order, ['teardown', 'check']);
  });
});

describe('spawnNode()', () => {
  const program = `
    const { setTimeout: sleep } = await import('node:timers/promises');
    const version: string = process.version;
    process.on('SIGTERM', () => { console.log('stopping'); process.exit(3); });
    console.log(JSON.stringify({ version, args: process.argv.slice(2), env: process.env.KEDGE_TEST }));
    await sleep(60_000);
  `;

  it('waits until the program is ready, and stops it', async (t) => {
    trackLeaks(t);
    const file = join(await tempDir(t), 'program.mts');
    await writeFile(file, program);
    const child = await spawnNode(t, file, ['a', 'b'], { env: { KEDGE_TEST: 'yes' } });
    assert.deepEqual(child.ready, { version: process.version, args: ['a', 'b'], env: 'yes' });
    assert.deepEqual(await child.stop(), { code: 3, signal: null });
    assert.equal(child.output, 'stopping\n');
  });

  it('kills it at once', async (t) => {
    const file = join(await tempDir(t), 'program.mts');
    await writeFile(file, program);
    const child = await spawnNode(t, file);
    assert.deepEqual(await child.kill(), { code: null, signal: 'SIGKILL' });
    assert.deepEqual(await child.exited, { code: null, signal: 'SIGKILL' });
    assert.throws(() => process.kill(child.pid, 0), { code: 'ESRCH' });
  });

  it('says why a program did not get ready', async (t) => {
    const file = join(await tempDir(t), 'program.mts');
    await writeFile(file, 'throw new Error("broken");');
    await assert.rejects(spawnNode(t, file), /ended before it was ready, with 1.*broken/s);
    await writeFile(file, 'console.log("hello"); setInterval(() => {}, 1000);');
    await assert.rejects(spawnNode(t, file), /printed no JSON: hello/);
  });
});

describe('tempDir()', () => {
  it('is gone after the test', async (t) => {
    let path = '';
    await t.test('a test', async (inner) => {
      path = await tempDir(inner);
      await writeFile(join(path, 'file'), 'x');
    });
    assert.equal(existsSync(path), false);
  });
});

function ago(ms: number): Date {
  return new Date(Date.now() - ms);
}

function peer(kedge: TestKedge) {
  const { cert, key } = kedge.client;
  return { host: '127.0.0.1', servername: KEDGE_NAME, ca: kedge.ca.cert, cert, key, ALPNProtocols: ['h2', 'http/1.1'] };
}

/** A TLS server that answers with what it knows of the client, or with why it does not trust it. */
async function listen(t: TestContext, { cert, key }: Certificate, ca: string): Promise<number> {
  const options = { cert, key, ca, requestCert: true, rejectUnauthorized: false };
  const server = tls.createServer(options, (socket) => {
    const { subject, subjectaltname, serialNumber } = socket.getPeerCertificate();
    socket.on('error', () => {});
    socket.end(
      socket.authorized ? `${subject.CN} ${subjectaltname} ${serialNumber}` : String(socket.authorizationError),
    );
  });
  t.after(() => server.close());
  server.listen(0, '127.0.0.1');
  await once(server, 'listening');
  return (server.address() as AddressInfo).port;
}

async function greet(port: number, servername: string, ca: string, { cert, key }: Certificate): Promise<string> {
  const socket = tls.connect({ host: '127.0.0.1', port, servername, ca, cert, key }).setEncoding('utf8');
  return (await socket.toArray()).join('');
}
