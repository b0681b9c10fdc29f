import assert from 'node:assert/strict';
import { once } from 'node:events';
import { writeFileSync } from 'node:fs';
import http from 'node:http';
import http2 from 'node:http2';
import type { AddressInfo } from 'node:net';
import { join } from 'node:path';
import { describe, it, type TestContext } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import tls from 'node:tls';
import * as grpc from '@grpc/grpc-js';
import { exportJWK, generateKeyPair, SignJWT } from 'jose';
import { oidcGate } from '../../examples/kedge/auth.ts';
import { grpcDialer } from '../../src/grpc/index.ts';
import { createDialer, single } from '../../src/index.ts';
import { echoClient, startEchoServer, unary } from '../helpers/grpc-kedge.ts';
import { authority, KEDGE_NAME } from '../helpers/kedge.ts';
import { kedgeProcesses, startReferenceKedge } from '../helpers/reference-kedge.ts';
import { tempDir } from '../helpers/temp.ts';
import { ApiServer, sliceOf } from './api-server.ts';

async function listen(t: TestContext, server: http.Server | http2.Http2SecureServer): Promise<number> {
  server.listen(0, '127.0.0.1');
  await once(server, 'listening');
  t.after(() => {
    if (server instanceof http.Server) server.closeAllConnections();
    server.close();
  });
  return (server.address() as AddressInfo).port;
}

const backends = (t: TestContext, count: number) => {
  const hits: number[] = Array(count).fill(0);
  const servers = hits.map((_, i) =>
    http.createServer((_request, response) => {
      hits[i]! += 1;
      response.end(String(i));
    }),
  );
  return Promise.all(servers.map((server) => listen(t, server))).then((ports) => ({ ports, hits, servers }));
};

const routes = [{ backend_name: 'orders', host_matcher: 'orders.us1' }];
const at = (port: number) => ({ dns_name: '127.0.0.1', port });

describe('the backend pool', () => {
  it('spreads 1,000 requests over 10 addresses evenly, and does without one that dies', async (t) => {
    const { ports, hits, servers } = await backends(t, 10);
    const api = await ApiServer.start(t);
    const slices = ports.map((port, i) => {
      const slice = sliceOf('orders', 'shop', { http: port });
      return { ...slice, metadata: { ...slice.metadata, name: `orders-${i}` } };
    });
    for (const slice of slices) api.put('endpointslices', slice);
    process.env['KUBECONFIG'] = api.kubeconfig;
    t.after(() => delete process.env['KUBECONFIG']);
    const pool = { http: { backends: [{ name: 'orders', k8s: { dns_port_name: 'orders.shop:http' } }] } };
    const { dialer } = await startReferenceKedge(t, { director: { http: { routes } }, backendPool: pool });
    const dial = dialer();
    const load = async (count: number, concurrency: number) => {
      const statuses: number[] = [];
      let left = count;
      await Promise.all(
        Array.from({ length: concurrency }, async () => {
          while (left > 0) {
            left -= 1;
            const response = await dial.fetch('http://orders.us1/');
            await response.text();
            statuses.push(response.status);
          }
        }),
      );
      return statuses;
    };
    assert.deepEqual(new Set(await load(1000, 50)), new Set([200]));
    for (const count of hits) assert.ok(Math.abs(count - 100) <= 1, String(hits));
    servers[3]!.closeAllConnections();
    servers[3]!.close();
    assert.deepEqual(new Set(await load(500, 20)), new Set([200]), 'no request failed');
    api.remove('endpointslices', slices[4]!);
    await sleep(100);
    const before = hits[4];
    await load(100, 5);
    assert.equal(hits[4], before, 'an endpoint that is gone gets nothing');
  });

  it('verifies TLS backends by their CA and speaks h2 to them, or accepts anything where it is told to', async (t) => {
    const ca = await authority();
    const { cert, key } = await ca.issue({ cn: 'backend', ip: ['127.0.0.1'] });
    const seen: string[] = [];
    const answer = (request: http2.Http2ServerRequest, response: http2.Http2ServerResponse) => {
      seen.push(`${request.httpVersion} ${request.authority || request.headers.host}`);
      response.end(request.httpVersion);
    };
    const h2 = await listen(t, http2.createSecureServer({ cert, key, allowHTTP1: true }, answer));
    const wrongName = await ca.issue({ cn: 'other', dns: ['other.test'] });
    const wrong = await listen(t, http2.createSecureServer({ ...wrongName, allowHTTP1: true }, answer));
    const { createServer } = await import('node:https');
    const h1 = await listen(t, createServer({ cert, key }, answer as never) as never);
    const dir = await tempDir(t);
    writeFileSync(join(dir, 'ca'), ca.cert);
    const backend = (name: string, port: number, security: object) => ({ name, host: at(port), security });
    const names = ['good', 'plain_h1', 'untrusted', 'wrong_name', 'skipped'];
    const pool = {
      http: {
        backends: [
          backend('good', h2, { config_name: 'own' }),
          backend('plain_h1', h1, { config_name: 'own' }),
          backend('untrusted', h2, {}),
          backend('wrong_name', wrong, { config_name: 'own' }),
          backend('skipped', wrong, { insecure_skip_verify: true }),
        ],
      },
      tls_server_configs: [{ name: 'own', ca_file: join(dir, 'ca') }],
    };
    const director = { http: { routes: names.map((name) => ({ backend_name: name, host_matcher: name })) } };
    const { dialer } = await startReferenceKedge(t, { director, backendPool: pool });
    const dial = dialer();
    const get = async (name: string) => {
      const response = await dial.fetch(`http://${name}/`, { method: 'POST', body: 'x' });
      return [
        response.status,
        response.status === 200 ? await response.text() : response.headers.get('x-kedge-error-type'),
      ];
    };
    assert.deepEqual(await get('good'), [200, '2.0']);
    assert.deepEqual(await get('plain_h1'), [200, '1.1']);
    assert.deepEqual(await get('untrusted'), [502, 'no-connection-to-all-resolved-addresses']);
    assert.deepEqual(await get('wrong_name'), [502, 'no-connection-to-all-resolved-addresses']);
    assert.deepEqual(await get('skipped'), [200, '2.0']);
    assert.deepEqual(new Set(seen), new Set(['2.0 good', '1.1 plain_h1', '2.0 skipped']));
  });

  it('follows adhoc rules on both wires, where they allow it', async (t) => {
    const { ports } = await backends(t, 1);
    const rpc = await startEchoServer(t);
    const rule = (port: number, more: object = {}) => ({
      dns_name_matcher: 'localhost',
      port: { default: port, allowed: [port] },
      ...more,
    });
    const allow_cidrs = ['127.0.0.0/8', '::1/128'];
    const open = await startReferenceKedge(t, {
      director: {
        http: { adhoc_rules: [rule(ports[0]!, { allow_cidrs })] },
        grpc: { adhoc_rules: [rule(rpc.port, { allow_cidrs })] },
      },
      backendPool: {},
    });
    const dial = open.dialer();
    const status = async (url: string) => {
      const response = await dial.fetch(url);
      await response.text();
      return [response.status, response.headers.get('x-kedge-error')];
    };
    assert.deepEqual(await status(`http://localhost:${ports[0]}/`), [200, null]);
    assert.deepEqual(await status('http://localhost:81/'), [400, 'adhoc: port 81 is not allowed']);
    assert.deepEqual(await status('http://elsewhere.test/'), [502, 'unknown route to service']);
    const { wrap } = grpcDialer(dial);
    assert.equal((await unary(new (wrap(echoClient()))(`localhost:${rpc.port}`), 'hi')).text, 'hi');
    await assert.rejects(unary(new (wrap(echoClient()))('localhost:9'), 'x'), { code: grpc.status.INVALID_ARGUMENT });
    const closed = await startReferenceKedge(t, {
      director: { http: { adhoc_rules: [rule(ports[0]!)] } },
      backendPool: {},
    });
    const refused = await closed.dialer().fetch('http://localhost/');
    assert.equal(refused.status, 403);
  });

  it("says with the original's error type that an adhoc rule refuses, and that no rule is there", async (t) => {
    const rules = [
      { dns_name_matcher: '*.invalid', port: { default: 80, allowed: [80] } },
      { dns_name_matcher: 'localhost', port: { default: 80, allowed: [80] } },
      {
        dns_name_matcher: '*.replaced.test',
        dns_name_replace: { pattern: '.none.', substitution: '.' },
        port: { default: 80, allowed: [80] },
      },
    ];
    const kedge = await startReferenceKedge(t, {
      director: { http: { adhoc_rules: rules }, grpc: { adhoc_rules: rules } },
      backendPool: {},
    });
    const dial = kedge.dialer();
    const { wrap } = grpcDialer(dial);
    for (const [host, status, code, type, message] of [
      ['localhost:81', 400, 'INVALID_ARGUMENT', 'unknown-route-error', 'adhoc: port 81 is not allowed'],
      [
        'localhost:80',
        403,
        'PERMISSION_DENIED',
        'unknown-route-error',
        'adhoc: the address of localhost is not allowed',
      ],
      ['a.invalid:80', 502, 'NOT_FOUND', 'unknown-route-error', 'adhoc: cannot resolve a.invalid'],
      ['a.replaced.test:80', 502, 'NOT_FOUND', 'unknown-route-error', 'adhoc: a.replaced.test does not hold .none.'],
      ['elsewhere.test:80', 502, 'UNIMPLEMENTED', 'no-route', 'unknown route to service'],
    ] as const) {
      const { status: got, headers } = await dial.fetch(`http://${host}/`);
      const told = [got, headers.get('x-kedge-error-type'), headers.get('x-kedge-error')];
      assert.deepEqual(told, [status, type, message], host);
      await assert.rejects(unary(new (wrap(echoClient()))(host), 'x'), (error: grpc.ServiceError) => {
        assert.deepEqual(
          [error.code, error.details, error.metadata.get('x-kedge-error-type')],
          [grpc.status[code], message, [type]],
          host,
        );
        return true;
      });
    }
  });
});

describe('the gate', () => {
  it('takes tokens of the provider, by signature, audience, time and permission, the scheme in any case', async (t) => {
    const [good, evil] = await Promise.all([generateKeyPair('RS256', { extractable: true }), generateKeyPair('RS256')]);
    let jwksRequests = 0;
    const port = await listen(
      t,
      http.createServer(async (request, response) => {
        response.setHeader('content-type', 'application/json');
        if (request.url === '/.well-known/openid-configuration') {
          response.end(JSON.stringify({ issuer, jwks_uri: `${issuer}/keys` }));
        } else {
          jwksRequests += 1;
          response.end(JSON.stringify({ keys: [{ ...(await exportJWK(good.publicKey)), kid: 'k', alg: 'RS256' }] }));
        }
      }),
    );
    const issuer = `http://127.0.0.1:${port}`;
    const options = { providerUrl: issuer, clientId: 'kedge', permsClaim: 'perms', perms: ['call', 'admin'] };
    const gate = await oidcGate(options);
    const now = Math.floor(Date.now() / 1000);
    const token = (claims: object = {}, header: object = {}, key = good.privateKey) =>
      new SignJWT({ iss: issuer, aud: 'kedge', exp: now + 60, perms: ['call'], ...claims })
        .setProtectedHeader({ alg: 'RS256', kid: 'k', ...header })
        .sign(key);
    assert.equal(await gate.admits(`Bearer ${await token()}`), true);
    assert.equal(await gate.admits(`Bearer ${await token({ perms: 'admin' })}`), true);
    for (const scheme of ['bearer', 'BEARER', 'bEaReR'])
      assert.equal(await gate.admits(`${scheme} ${await token()}`), true, `${scheme}: in any case (RFC 9110 §11.1)`);
    const publicPem = new TextEncoder().encode(JSON.stringify(await exportJWK(good.publicKey)));
    const wrong: Record<string, string | undefined> = {
      'no header': undefined,
      'another scheme': `Basic ${await token()}`,
      garbage: 'Bearer x.y.z',
      'another key': `Bearer ${await token({}, {}, evil.privateKey)}`,
      'another audience': `Bearer ${await token({ aud: 'other' })}`,
      'another issuer': `Bearer ${await token({ iss: 'https://evil.test' })}`,
      expired: `Bearer ${await token({ exp: now - 60 })}`,
      'no expiry': `Bearer ${await token({ exp: undefined })}`,
      'of the future': `Bearer ${await token({ nbf: now + 600 })}`,
      'no permission': `Bearer ${await token({ perms: [] })}`,
      'other permissions': `Bearer ${await token({ perms: ['read'] })}`,
      'a symmetric signature with the public key': `Bearer ${await new SignJWT({ iss: issuer, aud: 'kedge', exp: now + 60, perms: ['call'] }).setProtectedHeader({ alg: 'HS256', kid: 'k' }).sign(publicPem)}`,
      'no signature': `Bearer ${Buffer.from('{"alg":"none"}').toString('base64url')}.${Buffer.from(JSON.stringify({ iss: issuer, aud: 'kedge', exp: now + 60, perms: ['call'] })).toString('base64url')}.`,
    };
    for (const [what, header] of Object.entries(wrong)) assert.equal(await gate.admits(header), false, what);
    const before = jwksRequests;
    const unknown = await token({}, { kid: 'flood' });
    await Promise.all(Array.from({ length: 100 }, () => gate.admits(`Bearer ${unknown}`)));
    assert.ok(jwksRequests - before <= 1, 'unknown keys cause no storm');
    await assert.rejects(oidcGate({ ...options, providerUrl: `http://localhost:${port}` }), /calls itself/);
  });

  it('is one for HTTP, gRPC, upgrades and the forward proxy', async (t) => {
    const { ports } = await backends(t, 1);
    const kedge = await startReferenceKedge(t, {
      director: { http: { routes }, grpc: { routes: [{ backend_name: 'orders' }] } },
      backendPool: {
        http: { backends: [{ name: 'orders', host: at(ports[0]!) }] },
        grpc: { backends: [{ name: 'orders', host: at(1) }] },
      },
      bearerToken: 'right',
    });
    const connect = (lines: string[]) => raw(kedge.kedge.port, kedge, lines);
    for (const [token, status] of [
      ['right', /^HTTP\/1\.1 (?:200|502)/],
      ['wrong', /^HTTP\/1\.1 401/],
      ['', /^HTTP\/1\.1 401/],
    ] as const) {
      for (const line of [
        'GET / HTTP/1.1',
        'GET http://orders.us1/ HTTP/1.1',
        'GET / HTTP/1.1\r\nconnection: upgrade\r\nupgrade: x',
      ]) {
        assert.match(
          await connect([
            line,
            'host: orders.us1',
            `proxy-authorization: Bearer ${token}`,
            'content-type: application/grpc-web',
          ]),
          status,
          `${token} ${line}`,
        );
      }
      const client = new (grpcDialer(kedge.dialer({}, token || undefined)).wrap(echoClient()))('orders.us1:1');
      const expected = token === 'right' ? grpc.status.UNAVAILABLE : grpc.status.UNAUTHENTICATED;
      await assert.rejects(unary(client, 'x'), (error: grpc.ServiceError) => {
        assert.equal(error.code, expected);
        const type = token === 'right' ? 'no-connection-to-all-resolved-addresses' : 'unauthorized';
        assert.deepEqual(error.metadata.get('x-kedge-error-type'), [type]);
        assert.notEqual(error.metadata.get('x-kedge-error')[0], undefined);
        return true;
      });
    }
  });

  it('lets in the clients that a route names', async (t) => {
    const { ports } = await backends(t, 1);
    const host = { name: 'orders', host: at(ports[0]!) };
    const own = (allowed_clients: string[]) => ({
      director: { http: { routes: [{ ...routes[0], allowed_clients }] } },
      backendPool: { http: { backends: [host] } },
    });
    const [open, shut] = await Promise.all([
      startReferenceKedge(t, own(['CN=pod'])),
      startReferenceKedge(t, own(['spiffe://x/y'])),
    ]);
    assert.equal((await open.dialer().fetch('http://orders.us1/')).status, 200);
    assert.equal((await shut.dialer().fetch('http://orders.us1/')).status, 403);
  });
});

/** One request as it is written here, over TLS. */
async function raw(
  port: number,
  { client, ca }: { client: { cert: string; key: string }; ca: string },
  lines: readonly string[],
  body = '',
): Promise<string> {
  const socket = tls.connect({
    port,
    host: '127.0.0.1',
    servername: KEDGE_NAME,
    ...client,
    ca,
    ALPNProtocols: ['http/1.1'],
  });
  socket.on('error', () => {});
  socket.write(`${lines.join('\r\n')}\r\n\r\n${body}`);
  const timer = setTimeout(() => socket.destroy(), 3000);
  let out = '';
  try {
    for await (const chunk of socket) {
      out += chunk;
      if (/\r\n\r\n/.test(out)) break;
    }
  } catch {
    // Refused.
  }
  clearTimeout(timer);
  socket.destroy();
  return out;
}

describe('hostile requests', () => {
  it('on HTTP/1.1 are refused before anything is routed', async (t) => {
    const { ports, hits } = await backends(t, 1);
    const kedge = await startReferenceKedge(t, {
      director: { http: { routes: [{ backend_name: 'orders' }] } },
      backendPool: { http: { backends: [{ name: 'orders', host: at(ports[0]!) }] } },
      bearerToken: 'right',
    });
    const token = 'proxy-authorization: Bearer right';
    const send = (...lines: string[]) => raw(kedge.kedge.port, kedge, [...lines, token]);
    const GET = 'GET / HTTP/1.1';
    for (const lines of [
      [GET, 'host: orders.us1', 'host: evil.us1'],
      [GET, 'host:'],
      [GET],
      ['GET / HTTP/1.0'],
      [GET, 'host: a,b'],
      [GET, 'host: u@a'],
      [GET, 'host: a/b'],
      [GET, 'host: a b'],
      ['GET http://orders.us1/ HTTP/1.1', 'host: evil.us1'],
      ['POST / HTTP/1.1', 'host: a', 'content-length: 5', 'transfer-encoding: chunked'],
      ['POST / HTTP/1.1', 'host: a', 'transfer-encoding: chunked', 'transfer-encoding: identity'],
      ['POST / HTTP/1.1', 'host: a', 'content-length: +1'],
      ['POST / HTTP/1.1', 'host: a', 'content-length: 1', 'content-length: 2'],
      [GET, 'host: a', 'x: 1', ' folded'],
      [`${GET}\nhost: a`],
      [GET, 'host: a', 'proxy-authorization: Bearer wrong'],
      ['CONNECT orders.us1:443 HTTP/1.1', 'host: orders.us1'],
      ['GET evil HTTP/1.1', 'host: a'],
    ]) {
      assert.match(await send(...lines), /^(?:HTTP\/1\.1 4(?:00|05|31) |$)/, lines.join(' | '));
    }
    assert.deepEqual(hits, [0]);
    assert.match(await send(GET, 'host: orders.us1'), /^HTTP\/1\.1 200/);
  });

  it('on HTTP/2 are refused, and clients that begin nothing are closed while others are served', {
    timeout: 40_000,
  }, async (t) => {
    const { ports, hits } = await backends(t, 1);
    const kedge = await startReferenceKedge(t, {
      director: { http: { routes: [{ backend_name: 'orders' }] } },
      backendPool: { http: { backends: [{ name: 'orders', host: at(ports[0]!) }] } },
    });
    const { port } = kedge.kedge;
    const options = { servername: KEDGE_NAME, ...kedge.client, ca: kedge.ca };
    const session = http2.connect(`https://127.0.0.1:${port}`, options);
    t.after(() => session.destroy());
    const status = async (headers: http2.OutgoingHttpHeaders): Promise<string> => {
      const stream = session.request(headers);
      stream.resume();
      try {
        const [head] = (await once(stream, 'response')) as [Record<string, unknown>];
        return head['grpc-status'] === undefined ? String(head[':status']) : `grpc ${head['grpc-status']}`;
      } catch {
        return 'reset';
      }
    };
    const refused = async (headers: http2.OutgoingHttpHeaders) =>
      assert.match(await status(headers), /^(?:400|reset)$/);
    await refused({ ':path': '/', ':scheme': 'file', ':authority': 'a' });
    await refused({ ':path': '/', ':authority': 'a', host: 'b' });
    await refused({ ':path': '/', ':authority': 'u@a' });
    const grpcCall = { ':method': 'POST', 'content-type': 'application/grpc', ':authority': 'a' };
    // nghttp2 may be first.
    assert.match(await status({ ...grpcCall, ':path': 'x' }), /^(?:grpc 3|reset)$/);
    assert.equal(await status({ ...grpcCall, ':path': '/x' }), 'grpc 3');
    for (const type of ['application/grpc-evil', 'application/grpc-web', 'application/GRPC-WEB+proto'])
      assert.equal(await status({ ':path': '/', ':authority': 'a', 'content-type': type }), '200', type);
    assert.deepEqual(hits, [3]);
    // No preface at all, and HEADERS that never end.
    const dial = () => tls.connect({ host: '127.0.0.1', port, ...options, ALPNProtocols: ['h2'] });
    const [mute, slow] = [dial(), dial()];
    for (const socket of [mute, slow]) socket.on('error', () => {}).resume();
    const began = performance.now();
    const closed = Promise.all([once(mute, 'close'), once(slow, 'close')]);
    await once(slow, 'secureConnect');
    slow.write('PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n');
    slow.write(Buffer.from([0, 0, 0, 4, 0, 0, 0, 0, 0]));
    // HEADERS without END_HEADERS, then CONTINUATION after CONTINUATION.
    slow.write(Buffer.from([0, 0, 1, 1, 0, 0, 0, 0, 1, 0x82]));
    const drip = setInterval(() => slow.write(Buffer.from([0, 0, 0, 9, 0, 0, 0, 0, 1])), 1500);
    t.after(() => clearInterval(drip));
    assert.equal(await status({ ':path': '/', ':authority': 'a' }), '200');
    await closed;
    assert.ok(performance.now() - began < 25_000);
    assert.equal(await status({ ':path': '/', ':authority': 'a' }), '200');
  });
});

describe('the program', () => {
  it('refuses a client certificate that its CA has revoked, and one that it revokes later', async (t) => {
    const ca = await authority();
    const processes = await kedgeProcesses(t, { director: {}, backendPool: {} });
    const [revoked, later] = await Promise.all([ca.issue({ cn: 'revoked' }), ca.issue({ cn: 'later' })]);
    const file = join(processes.folder, 'crl');
    writeFileSync(file, await ca.revoke(revoked));
    const kedge = await processes.start('any', [`--server_tls_client_crl_files=${file}`]);
    const ask = async ({ cert, key }: { cert: string; key: string }) => {
      const client = { client: { cert, key }, ca: processes.ca };
      return (await raw(kedge.ready.port, client, ['GET / HTTP/1.1', 'host: x'])).slice(0, 12);
    };
    assert.equal(await ask(revoked), '');
    assert.equal(await ask(later), 'HTTP/1.1 502');
    writeFileSync(file, await ca.revoke(revoked, later));
    for (let i = 0; i < 100 && !/certificates renewed/.test(kedge.output); i += 1) await sleep(30);
    assert.equal(await ask(later), '');
    assert.equal(await ask(processes.client), 'HTTP/1.1 502');
  });

  it('reloads changed files without dropping a request, refuses broken ones, and shows how it is', async (t) => {
    const { ports } = await backends(t, 2);
    const pool = (port: number) => ({ http: { backends: [{ name: 'orders', host: at(port) }] } });
    const processes = await kedgeProcesses(t, { director: { http: { routes } }, backendPool: pool(ports[0]!) });
    const kedge = await processes.start('any', [
      '--server_http_port=any',
      '--server_grpc_tls_port=any',
      '--logstash_hostport=x',
    ]);
    const route = single({ kedge: `https://127.0.0.1:${kedge.ready.port}` });
    const dialer = createDialer({ mapper: route, identity: processes.identity });
    t.after(() => dialer.destroy());
    const ask = async () => {
      const response = await dialer.fetch('http://orders.us1/', { method: 'POST' });
      assert.equal(response.status, 200);
      return response.text();
    };
    let isRunning = true;
    const load = (async () => {
      while (isRunning) await ask();
    })();
    assert.equal(await ask(), '0');
    const file = join(processes.folder, 'kedge_config_backendpool_config_path');
    writeFileSync(file, JSON.stringify(pool(ports[1]!)));
    for (let i = 0; i < 100 && (await ask()) !== '1'; i += 1) await sleep(30);
    assert.equal(await ask(), '1');
    writeFileSync(file, '{"http": {"backends": [{"name": "orders"}]}}');
    for (let i = 0; i < 100 && !/refused/.test(kedge.output); i += 1) await sleep(30);
    assert.match(
      kedge.output,
      /configuration refused, the old one stays: \S+: http\.backends\[0\]: expected one of host, srv and k8s/,
    );
    assert.equal(await ask(), '1');
    isRunning = false;
    await load;
    assert.match(kedge.output, /--logstash_hostport is ignored: logs are lines on stderr/);
    const debug = (path: string) => fetch(`http://127.0.0.1:${kedge.ready.debugPort}${path}`);
    assert.equal((await debug('/_healthz')).status, 200);
    assert.match(await (await debug('/_version')).text(), /Node v/);
    assert.match(await (await debug('/metrics')).text(), /kedge_requests_total\{wire="h2",status="200"\} \d+/);
    assert.equal((await debug('/')).status, 404);
    const rpc = createDialer({
      mapper: single(`https://127.0.0.1:${kedge.ready.grpcPort}`),
      identity: processes.identity,
    });
    t.after(() => rpc.destroy());
    await assert.rejects(unary(new (grpcDialer(rpc).wrap(echoClient()))('x.us1:1'), 'x'), {
      code: grpc.status.UNIMPLEMENTED,
    });
  });

  it('shows a renewed certificate to new connections', async (t) => {
    const ca = await authority();
    const processes = await kedgeProcesses(t, { director: {}, backendPool: {} });
    const kedge = await processes.start('any');
    const serial = async () => {
      const options = { servername: KEDGE_NAME, ...processes.client, ca: processes.ca };
      const socket = tls.connect({ host: '127.0.0.1', port: kedge.ready.port, ...options });
      await once(socket, 'secureConnect');
      const { serialNumber } = socket.getPeerCertificate();
      socket.destroy();
      return serialNumber;
    };
    assert.equal(await serial(), processes.server.serial);
    writeFileSync(join(processes.folder, 'server_tls_key_file'), 'garbage');
    for (let i = 0; i < 100 && !/certificates refused/.test(kedge.output); i += 1) await sleep(30);
    assert.match(kedge.output, /certificates refused, the old ones stay/);
    assert.equal(await serial(), processes.server.serial);
    const next = await ca.issue({ cn: KEDGE_NAME, dns: [KEDGE_NAME] });
    writeFileSync(join(processes.folder, 'server_tls_cert_file'), next.cert);
    writeFileSync(join(processes.folder, 'server_tls_key_file'), next.key);
    for (let i = 0; i < 100 && (await serial()) !== next.serial; i += 1) await sleep(30);
    assert.equal(await serial(), next.serial);
  });

  it('loses no request when it is asked to end at 200 a second', async (t) => {
    const { ports } = await backends(t, 1);
    const rpc = await startEchoServer(t);
    const processes = await kedgeProcesses(t, {
      director: { http: { routes }, grpc: { routes: [{ backend_name: 'orders' }] } },
      backendPool: {
        http: { backends: [{ name: 'orders', host: at(ports[0]!) }] },
        grpc: { backends: [{ name: 'orders', host: at(rpc.port) }] },
      },
    });
    const [one, two] = await Promise.all([processes.start('any'), processes.start('any')]);
    const kedge = [one, two].map(({ ready }) => `https://127.0.0.1:${ready.port}`);
    const dialers = (['h1', 'h2'] as const).map((protocol) => {
      const dialer = createDialer({ mapper: single({ kedge }), identity: processes.identity, http: { protocol } });
      t.after(() => dialer.destroy());
      return dialer;
    });
    const client = new (grpcDialer(dialers[1]!).wrap(echoClient()))('orders.us1:1');
    const calls: Promise<unknown>[] = [];
    const began = performance.now();
    for (let i = 0; i < 400; i += 1) {
      const post = async () => {
        const response = await dialers[i % 2]!.fetch('http://orders.us1/', { method: 'POST', body: String(i) });
        assert.equal(response.status, 200);
        await response.text();
      };
      calls.push(i % 3 === 2 ? unary(client, 'x') : post());
      if (i === 150) void one.stop();
      await sleep(Math.max(0, (i + 1) * 5 - (performance.now() - began)));
    }
    await Promise.all(calls);
    assert.deepEqual(await one.exited, { code: 0, signal: null });
  });

  it('refuses to start where it would let everybody in, or do nothing', async (t) => {
    const processes = await kedgeProcesses(t, { director: {}, backendPool: {} });
    for (const [flags, message] of [
      [['--server_tls_client_cert_required=false'], /this kedge would let everybody in/],
      [['--unsafe_bearer_token_proxy_auth=x', '--server_oidc_provider_url=https://x'], /exclude each other/],
      [['--server_oidc_provider_url=https://x'], /go with the provider/],
      [['--server_http_tls_port=0'], /--server_http_tls_port is required/],
      [['--what=1'], /Unknown option '--what'/],
    ] as const) {
      await assert.rejects(processes.start('any', flags), message);
    }
    await processes.start('any', [
      '--server_tls_client_cert_required',
      'false',
      '--unsafe_bearer_token_proxy_auth',
      'x',
    ]);
  });
});
