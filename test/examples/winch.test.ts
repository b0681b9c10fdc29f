import assert from 'node:assert/strict';
import { spawnSync } from 'node:child_process';
import { once } from 'node:events';
import { writeFile } from 'node:fs/promises';
import http from 'node:http';
import http2 from 'node:http2';
import net, { type AddressInfo } from 'node:net';
import { join } from 'node:path';
import { text } from 'node:stream/consumers';
import { before, describe, it, type TestContext } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import vm from 'node:vm';
import * as grpc from '@grpc/grpc-js';
import { type Echo, echoClient, startEchoServer, unary } from '../helpers/grpc-kedge.ts';
import { startKedge, type TestKedge } from '../helpers/kedge.ts';
import { type NodeProcess, runNode, spawnNode } from '../helpers/process.ts';
import { kedgeProcesses } from '../helpers/reference-kedge.ts';
import { tempDir } from '../helpers/temp.ts';

const MAIN = 'examples/winch/main.ts';
const EchoClient = echoClient();

interface Answer {
  status: number;
  headers: http.IncomingHttpHeaders;
  trailers: NodeJS.Dict<string>;
  body: string;
}

/** As a browser asks a proxy. */
function ask(port: number, url: string, options: http.RequestOptions & { body?: string } = {}): Promise<Answer> {
  const { body, ...rest } = options;
  return new Promise((resolve, reject) => {
    const headers = { ...(url.startsWith('/') ? {} : { host: new URL(url).host }), ...rest.headers };
    const request = http.request({ ...rest, host: '127.0.0.1', port, path: url, agent: false, headers });
    request.on('response', async (response) => {
      try {
        const chunks = await response.toArray();
        const { statusCode, headers, trailers } = response;
        resolve({ status: statusCode!, headers, trailers, body: Buffer.concat(chunks).toString() });
      } catch (error) {
        reject(error);
      }
    });
    request.on('error', reject);
    request.end(body);
  });
}

interface Chain {
  winch: NodeProcess<{ port: number; grpcPort: number }>;
  port: number;
  /** A gRPC client that speaks to winch in the clear, as in-house tools do. */
  client(authority: string): InstanceType<typeof EchoClient>;
  direct: string;
}

/** client -> winch -> kedge -> backends, each a process of its own but for the backends. */
async function startChain(t: TestContext, flags: readonly string[] = []): Promise<Chain> {
  const backend = http.createServer({ maxHeaderSize: 65_536 }, (request, response) => {
    if (request.url === '/trailers') {
      response.writeHead(200, { trailer: 'x-sum' });
      response.write('one ');
      request.resume().on('end', () => {
        response.addTrailers({ 'x-sum': 'abc' });
        response.end('two');
      });
      return;
    }
    if (request.url === '/killer') {
      response.writeHead(200, { 'content-length': '1000' });
      response.write('cut');
      setTimeout(() => response.destroy(), 50);
      return;
    }
    response.setHeader('x-winch-error', 'forged');
    response.setHeader('vary', 'Accept-Language');
    response.setHeader('set-cookie', ['a=1', 'b=2']);
    request.pipe(response.setHeader('x-seen', JSON.stringify({ ...request.headers, url: request.url })));
  });
  backend.on('upgrade', (_request, socket) => {
    socket.write('HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n');
    socket.pipe(socket);
  });
  backend.listen(0, '127.0.0.1');
  await once(backend, 'listening');
  t.after(() => {
    backend.closeAllConnections();
    backend.close();
  });
  const { port: backendPort } = backend.address() as AddressInfo;
  const rpc = await startEchoServer(t);
  const at = (port: number) => ({ dns_name: '127.0.0.1', port });
  const routes = (wire: 'http' | 'grpc') => {
    const host = wire === 'http' ? 'host_matcher' : 'authority_host_matcher';
    return ['orders', 'gone'].map((name) => ({ backend_name: name, [host]: `${name}.us1.test` }));
  };
  const processes = await kedgeProcesses(t, {
    director: { http: { routes: routes('http') }, grpc: { routes: routes('grpc') } },
    backendPool: {
      http: {
        backends: [
          { name: 'orders', host: at(backendPort) },
          { name: 'gone', host: at(1) },
        ],
      },
      grpc: {
        backends: [
          { name: 'orders', host: at(rpc.port) },
          { name: 'gone', host: at(1) },
        ],
      },
    },
  });
  const kedge = await processes.start('any', ['--unsafe_bearer_token_proxy_auth=proxy-secret']);
  const dir = await tempDir(t);
  const url = `https://127.0.0.1:${kedge.ready.port}`;
  const exp = (name: string) => ({ exp: `^${name}[.]us1[.]test(:[0-9]+)?$`, url });
  const files = {
    mapper: {
      routes: [
        { proxy_auth: 'proxy', backend_auth: 'backend', regexp: exp('orders') },
        { proxy_auth: 'wrong', regexp: exp('wrong') },
        { proxy_auth: 'proxy', backend_auth: 'broken', regexp: exp('nokey') },
        { proxyAuth: 'proxy', regexp: exp('[a-z]+') },
      ],
    },
    auth: {
      auth_sources: [
        { name: 'proxy', token: { token: 'proxy-secret' } },
        { name: 'wrong', token: { token: 'not-the-secret' } },
        { name: 'backend', token: { token: 'backend-secret' } },
        { name: 'broken', kube: { user: 'nobody', path: join(dir, 'kubeconfig') } },
      ],
    },
    kubeconfig: '{"apiVersion":"v1","kind":"Config","users":[]}',
    cert: processes.client.cert,
    key: processes.client.key,
    ca: processes.ca,
  };
  for (const [name, content] of Object.entries(files))
    await writeFile(join(dir, name), typeof content === 'string' ? content : JSON.stringify(content));
  const winch: Chain['winch'] = await spawnNode(t, MAIN, [
    '--server_http_port=any',
    '--server_grpc_port=any',
    `--server_mapper_config_path=${join(dir, 'mapper')}`,
    `--server_auth_config_path=${join(dir, 'auth')}`,
    `--client_tls_cert_file=${join(dir, 'cert')}`,
    `--client_tls_key_file=${join(dir, 'key')}`,
    `--client_tls_root_ca_files=${join(dir, 'ca')}`,
    ...flags,
  ]);
  return {
    winch,
    port: winch.ready.port,
    direct: `http://127.0.0.1:${backendPort}`,
    client: (authority) => {
      const client = new EchoClient(`127.0.0.1:${winch.ready.grpcPort}`, grpc.credentials.createInsecure(), {
        'grpc.default_authority': authority,
      });
      t.after(() => client.close());
      return client;
    },
  };
}

/** What a browser makes of a PAC script. */
function evaluated(script: string): (url: string) => string {
  const shExpMatch = (text: string, pattern: string) =>
    new RegExp(`^${pattern.replace(/[.+?^$()[\]\\|]/g, '\\$&').replaceAll('*', '.*')}$`).test(text);
  const context = vm.createContext({ shExpMatch, isPlainHostName: (host: string) => !host.includes('.') });
  vm.runInContext(script, context);
  return (url) =>
    vm.runInContext(`FindProxyForURL(${JSON.stringify(url)}, ${JSON.stringify(new URL(url).hostname)})`, context);
}

/** Winch in front of a kedge of the test's own: every name with a dot is behind it, which is called localhost. */
async function startBefore(t: TestContext, kedge: TestKedge, flags: readonly string[] = [], proxyAuth = {}) {
  const dir = await tempDir(t);
  const files = { cert: kedge.client.cert, key: kedge.client.key, ca: kedge.ca.cert };
  for (const [name, content] of Object.entries(files)) await writeFile(join(dir, name), content);
  const route = { ...proxyAuth, regexp: { exp: '^.*[.].*$', url: `https://localhost:${kedge.port}` } };
  return spawnNode<{ port: number; grpcPort: number }>(t, MAIN, [
    '--server_http_port=any',
    '--server_grpc_port=any',
    `--server_mapper_config=${JSON.stringify({ routes: [route] })}`,
    `--client_tls_cert_file=${join(dir, 'cert')}`,
    `--client_tls_key_file=${join(dir, 'key')}`,
    `--client_tls_root_ca_files=${join(dir, 'ca')}`,
    ...flags,
  ]);
}

describe('winch', () => {
  before(async () => {
    const { status, out } = await runNode(['node_modules/typescript/bin/tsc', '-p', '.']);
    assert.equal(status, 0, out);
  });

  it('takes HTTP through the kedge to the backend, with both tokens', async (t) => {
    const { port, winch } = await startChain(t, ['--debug_mode']);
    const { status, headers, body } = await ask(port, 'http://orders.us1.test:8080/path?q=1', {
      method: 'POST',
      body: 'hello',
      headers: { authorization: 'Basic mine', 'proxy-authorization': 'Basic mine', 'content-length': 5 },
    });
    assert.deepEqual([status, body], [200, 'hello']);
    const seen = JSON.parse(String(headers['x-seen']));
    assert.equal(seen.host, 'orders.us1.test:8080');
    assert.equal(seen.url, '/path?q=1');
    assert.equal(seen.authorization, 'Bearer backend-secret', "the file's backend_auth wins, as in the original");
    assert.equal(seen['proxy-authorization'], undefined, 'the kedge consumes it');
    assert.match(seen['x-kedge-request-id'], /^winch-[0-9a-f-]{36}$/);
    assert.equal(seen['x-kedge-info-logs'], 'true');
    assert.equal(headers['x-winch-error'], undefined);
    assert.deepEqual(headers['set-cookie'], ['a=1', 'b=2']);
    assert.doesNotMatch(winch.output, /secret/);
  });

  it('passes trailers on, and what asks for 100 Continue', async (t) => {
    const { port } = await startChain(t);
    for (const body of [undefined, 'a body']) {
      const answer = await ask(port, 'http://orders.us1.test/trailers', {
        method: body === undefined ? 'GET' : 'POST',
        ...(body === undefined ? {} : { body, headers: { expect: '100-continue', 'content-length': body.length } }),
      });
      assert.deepEqual([answer.status, answer.body, answer.trailers], [200, 'one two', { 'x-sum': 'abc' }]);
    }
    const long = await ask(port, 'http://orders.us1.test/trailers', { headers: { 'x-long': 'l'.repeat(20_000) } });
    assert.equal(long.status, 200);
  });

  it('leaves the port of a gRPC call as it was named, 80 too', async (t) => {
    const { client } = await startChain(t);
    for (const [authority, seen] of [
      ['orders.us1.test:80', 'orders.us1.test:80'],
      ['orders.us1.test:443', 'orders.us1.test:443'],
      ['orders.us1.test:9090', 'orders.us1.test:9090'],
      ['orders.us1.test', 'orders.us1.test:443'],
    ] as const)
      assert.equal((await unary(client(authority), 'x')).authority, seen);
  });

  it('takes gRPC of every kind', async (t) => {
    const { client } = await startChain(t);
    const orders = client('orders.us1.test:9090');
    assert.equal((await unary(orders, 'hi')).text, 'hi');
    const letters: string[] = [];
    for await (const { text } of orders.serverStream({ text: 'abc' }) as AsyncIterable<Echo>) letters.push(text);
    const chat = orders.bidi();
    chat.write({ text: '1' });
    chat.end({ text: '2' });
    for await (const { text } of chat as AsyncIterable<Echo>) letters.push(text);
    assert.deepEqual(letters, ['a', 'b', 'c', '1', '2']);
    await assert.rejects(unary(orders, 'x'.repeat(10), undefined, { deadline: Date.now() - 1 }), {
      code: grpc.status.DEADLINE_EXCEEDED,
    });
    await assert.rejects(unary(client('gone.us1.test'), 'x'), { code: grpc.status.UNAVAILABLE });
    await assert.rejects(unary(client('nobody.us1.test'), 'x'), {
      code: grpc.status.UNIMPLEMENTED,
      details: 'unknown route to service',
    });
    await assert.rejects(unary(client('wrong.us1.test'), 'x'), { code: grpc.status.UNAUTHENTICATED });
    await assert.rejects(unary(client('elsewhere.test'), 'x'), {
      code: grpc.status.UNIMPLEMENTED,
      details: 'elsewhere.test is not a kedge destination',
    });
    await assert.rejects(unary(client('nokey.us1.test'), 'x'), {
      code: grpc.status.INTERNAL,
      details: /^transport: cannot get token: .*token source broken: /,
    });
  });

  it('lives through every reset of a gRPC client, before, during and after the answer, and serves the next call', async (t) => {
    const rpc = http2.createServer();
    const open = new Set<http2.ServerHttp2Stream>();
    const resets = new Map<string, Set<string>>();
    rpc.on('session', (session) => session.on('error', () => {}));
    rpc.on('stream', (stream, { ':path': path, 'x-code': code }) => {
      const head = { ':status': 200, 'content-type': 'application/grpc' };
      open.add(stream);
      stream.on('error', () => {}).on('close', () => open.delete(stream));
      stream.on('aborted', () => resets.set(path!, (resets.get(path!) ?? new Set()).add(String(code))));
      if (path === '/t.T/After') {
        stream.respond({ ...head, 'grpc-status': '3' }, { endStream: true });
        return;
      }
      if (path === '/t.T/Before') {
        stream.resume();
        setTimeout(() => stream.closed || stream.respond(head, { endStream: true }), 300);
        return;
      }
      stream.respond(head, { waitForTrailers: true });
      stream.on('wantTrailers', () => stream.closed || stream.sendTrailers({ 'grpc-status': '0' }));
      stream.write('AAAA');
      stream.pipe(stream);
    });
    const kedge = await startKedge(t, { names: ['localhost'], onH2: (socket) => rpc.emit('connection', socket) });
    const winch = await startBefore(t, kedge);
    const call = (path: string, code: number) => {
      const session = http2.connect(`http://127.0.0.1:${winch.ready.grpcPort}`);
      t.after(() => session.destroy());
      const request = { ':method': 'POST', ':path': path, ':authority': 'a.us1:90', 'x-code': code };
      const stream = session.on('error', () => {}).request({ ...request, 'content-type': 'application/grpc' });
      return stream.on('error', () => {});
    };
    const codes = [...Array(14).keys(), 0xdead];
    for (const path of ['/t.T/Before', '/t.T/During', '/t.T/After']) {
      await Promise.all(
        codes.map(async (code) => {
          const stream = call(path, code);
          // Node says 0 once it has sent the rest: that fits in a window.
          stream.write(Buffer.alloc(code === 0 ? 10_000 : 200_000));
          const closed = new Promise((resolve) => stream.on('close', resolve));
          if (path === '/t.T/Before') await sleep(100);
          else await once(stream, path === '/t.T/During' ? 'data' : 'response');
          stream.resume().close(code);
          await closed;
        }),
      );
      for (let i = 0; open.size > 0 && i < 250; i += 1) await sleep(20);
      assert.equal(open.size, 0, `${path}: streams that nobody wants are still open at the kedge`);
      const next = call('/t.T/Next', 0);
      next.end('hi');
      const [trailers, echo] = await Promise.all([once(next, 'trailers'), text(next)]);
      assert.deepEqual([trailers[0]['grpc-status'], echo], ['0', 'AAAAhi'], path);
    }
    for (const path of ['/t.T/Before', '/t.T/During'])
      assert.deepEqual(
        [...resets.get(path)!].map(Number).sort((a, b) => a - b),
        codes,
        `${path}: the kedge was told`,
      );
    assert.deepEqual(await winch.stop(), { code: 0, signal: null }, 'it waits for nothing that is in flight');
  });

  it("passes on a backend's 407 where a route has no proxy_auth, and says itself that its token was refused", async (t) => {
    const kedge = await startKedge(t, {
      names: ['localhost'],
      handler: (_request, response) => {
        response.statusCode = 407;
        response.setHeader('x-own', 'kept');
        response.end('who?');
      },
    });
    const sources = JSON.stringify({ auth_sources: [{ name: 'us', token: { token: 'secret' } }] });
    const plain = await startBefore(t, kedge);
    for (const method of ['GET', 'POST']) {
      const options = method === 'GET' ? {} : { method, body: 'x' };
      const { status, headers, body } = await ask(plain.ready.port, 'http://orders.us1.test/', options);
      assert.deepEqual([status, headers['x-own'], body], [407, 'kept', 'who?'], method);
      assert.equal(headers['x-winch-error'], undefined);
    }
    const token = await startBefore(t, kedge, [`--server_auth_config=${sources}`], { proxy_auth: 'us' });
    const refused = await ask(token.ready.port, 'http://orders.us1.test/');
    assert.deepEqual([refused.status, refused.headers['x-winch-error-type']], [502, 'unauthorized']);
  });

  it('says what went wrong, and where', async (t) => {
    const { port, direct } = await startChain(t);
    const unknown = await ask(port, 'http://nobody.us1.test/');
    assert.deepEqual([unknown.status, unknown.headers['x-kedge-error']], [502, 'unknown route to service']);
    const gone = await ask(port, 'http://gone.us1.test/');
    assert.deepEqual(
      [gone.status, gone.headers['x-kedge-error-type']],
      [502, 'no-connection-to-all-resolved-addresses'],
    );
    const wrong = await ask(port, 'http://wrong.us1.test/');
    assert.deepEqual([wrong.status, wrong.headers['x-kedge-error-type']], [401, 'unauthorized']);
    await assert.rejects(ask(port, 'http://orders.us1.test/killer'), /aborted|ECONNRESET/);
    assert.equal((await ask(port, 'http://a..b/')).status, 400);
    const dead = await ask(port, 'http://127.0.0.1:1/');
    assert.deepEqual([dead.status, dead.headers['x-winch-error-type']], [502, 'transport-unknown-error']);
    // Unmapped: straight there, with nothing of ours.
    const plain = await ask(port, `${direct}/x`);
    assert.equal(plain.status, 200);
    assert.doesNotMatch(String(plain.headers['x-seen']), /secret/);
  });

  it('joins upgrades, tunnels to unmapped hosts only', async (t) => {
    const { port, direct } = await startChain(t);
    const send = async (text: string, until: RegExp) => {
      const socket = net.connect(port, '127.0.0.1');
      t.after(() => socket.destroy());
      socket.write(text);
      let out = '';
      for await (const chunk of socket) {
        out += chunk;
        if (until.test(out)) break;
      }
      return out;
    };
    const upgraded = await send(
      'GET http://orders.us1.test/ HTTP/1.1\r\nhost: orders.us1.test\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\nping',
      /ping/,
    );
    assert.match(upgraded, /^HTTP\/1\.1 101 [\s\S]*\r\n\r\nping$/);
    const { host } = new URL(direct);
    const tunnel = await send(`CONNECT ${host} HTTP/1.1\r\nhost: ${host}\r\n\r\nGET /t HTTP/1.0\r\n\r\n`, /x-seen/);
    assert.match(tunnel, /^HTTP\/1\.1 200 Connection Established\r\n\r\nHTTP\/1\.1 200 OK/);
    const refused = await send('CONNECT orders.us1.test:443 HTTP/1.1\r\nhost: orders.us1.test:443\r\n\r\n', /$^/);
    assert.match(
      refused,
      /^HTTP\/1\.1 405 .*\r\nallow: GET, [\s\S]*\r\n\r\nwinch: orders\.us1\.test is behind a kedge: ask for it with http:/,
    );
    assert.match(await send('CONNECT a b HTTP/1.1\r\nhost: x\r\n\r\n', /$^/), /^HTTP\/1\.1 400/);
    assert.match(await send('CONNECT 127.0.0.1:1 HTTP/1.1\r\nhost: x\r\n\r\n', /$^/), /^HTTP\/1\.1 502/);
  });

  it('shows its own pages to this machine by name, and to nobody whose name resolves here', async (t) => {
    const flags = ['--pac_redirect_sh_expressions=*.us1.test, *.us2.test'];
    const { port } = await startChain(t, flags);
    const pac = await ask(port, '/wpad.dat');
    assert.equal(pac.headers['content-type'], 'application/x-ns-proxy-autoconfig');
    const find = evaluated(pac.body);
    assert.equal(find('http://orders.us1.test/'), `PROXY 127.0.0.1:${port}; DIRECT`);
    for (const url of ['https://orders.us1.test/', 'ftp://orders.us1.test/', 'http://orders/', 'http://example.com/'])
      assert.equal(find(url), 'DIRECT', url);
    assert.match((await ask(port, '/version')).body, /winch/);
    assert.equal((await ask(port, '/winch/cleartoken/proxy')).status, 200);
    assert.equal((await ask(port, '/winch/cleartoken/none')).status, 404);
    for (const site of ['cross-site', 'same-site'])
      assert.equal((await ask(port, '/winch/cleartoken/proxy', { headers: { 'sec-fetch-site': site } })).status, 403);
    await ask(port, 'http://orders.us1.test/');
    assert.match((await ask(port, '/metrics')).body, /winch_requests_total\{status="200"\} 1/);
    for (const host of ['evil.test', `evil.test:${port}`, `127.0.0.1:${port}.evil.test`, '127.0.0.1'])
      assert.equal((await ask(port, '/winch/cleartoken/proxy', { headers: { host } })).status, 403, host);
  });

  it('sends browsers to itself for every dotted host over http:, or with expressions for those hosts alone', async (t) => {
    const kedge = await startKedge(t);
    const dotted = ['http://orders.us1.test/', 'http://orders.us2.test:8080/x', 'http://example.com/?q=1'];
    const never = ['https://orders.us1.test/', 'ftp://orders.us1.test/', 'ws://orders.us1.test/', 'http://orders/'];
    for (const [flags, proxied] of [
      [[], dotted],
      [['--pac_redirect_sh_expressions=*.us1.test', '--pac_redirect_sh_expressions=*.us2.test'], dotted.slice(0, 2)],
    ] as const) {
      const { ready } = await startBefore(t, kedge, flags);
      const find = evaluated((await ask(ready.port, '/wpad.dat')).body);
      for (const url of [...dotted, ...never]) {
        const wanted = (proxied as readonly string[]).includes(url)
          ? `PROXY 127.0.0.1:${ready.port}; DIRECT`
          : 'DIRECT';
        assert.equal(find(url), wanted, `${url} with ${flags.join(' ') || 'no expressions'}`);
      }
    }
  });

  it('gives pages elsewhere what the original gives them, and no more', async (t) => {
    const { port, direct } = await startChain(t, [
      '--cors_allowed_origin=http://tool.test,http://*.wild.test',
      '--cors_allowed_origin=http://more.test:8080',
    ]);
    const url = 'http://orders.us1.test/';
    const from = (origin: string, options: Parameters<typeof ask>[2] = {}, to = url) =>
      ask(port, to, { ...options, headers: { origin, ...options.headers } });
    const allowed = ({ headers }: Answer) =>
      Object.fromEntries(Object.entries(headers).filter(([name]) => name.startsWith('access-control-')));
    for (const origin of ['http://tool.test', 'http://a.wild.test', 'http://a.b.wild.test', 'http://more.test:8080']) {
      const answer = await from(origin);
      assert.deepEqual([answer.status, allowed(answer)], [200, { 'access-control-allow-origin': origin }]);
      assert.equal(answer.headers.vary, 'Accept-Language, Origin', "the backend's is kept");
      assert.equal((await from(origin, { method: 'POST', body: 'x' })).status, 200);
      const preflight = await from(origin, {
        method: 'OPTIONS',
        headers: { 'access-control-request-method': 'POST', 'access-control-request-headers': 'content-type, accept' },
      });
      assert.equal(preflight.status, 204);
      assert.deepEqual(allowed(preflight), {
        'access-control-allow-origin': origin,
        'access-control-allow-methods': 'POST',
        'access-control-allow-headers': 'content-type, accept',
      });
      assert.match(String(preflight.headers.vary), /^Origin, Access-Control-Request-Method/);
    }
    const ask4 = (method: string, headers: string) => ({
      method: 'OPTIONS',
      headers: { 'access-control-request-method': method, 'access-control-request-headers': headers },
    });
    for (const options of [ask4('DELETE', 'accept'), ask4('POST', 'authorization')])
      assert.deepEqual(allowed(await from('http://tool.test', options)), {});
    for (const origin of [
      'http://evil.test',
      'http://tool.test.evil.test',
      'http://.wild.test',
      'http://wild.test',
      'null',
    ]) {
      const answer = await from(origin);
      assert.deepEqual([answer.status, allowed(answer), answer.headers.vary], [200, {}, 'Accept-Language, Origin']);
      assert.deepEqual(allowed(await from(origin, ask4('POST', 'accept'))), {});
      for (const method of ['POST', 'PUT', 'DELETE']) {
        const forged = await from(origin, { method, ...(method === 'DELETE' ? {} : { body: 'x' }) });
        assert.equal(forged.status, 403, `${method} of ${origin}`);
        assert.match(String(forged.headers['x-winch-error']), /a page elsewhere/);
      }
      const socket = { headers: { connection: 'upgrade', upgrade: 'websocket' } };
      assert.equal((await from(origin, socket)).status, 403);
      // Nothing of ours would be added there.
      assert.equal((await from(origin, { method: 'POST', body: 'x' }, `${direct}/`)).status, 200);
    }
    const inside = await from('http://wrong.us1.test:8080', { method: 'POST', body: 'x' });
    assert.equal(inside.status, 200, 'a page that is behind a kedge itself');
    assert.equal((await ask(port, url)).headers.vary, 'Accept-Language, Origin');
  });

  it('ends a log-in with the state that it began with, and with no other', async (t) => {
    const codes: string[] = [];
    const provider = http.createServer(async (request, response) => {
      response.setHeader('content-type', 'application/json');
      if (request.url !== '/token') {
        const endpoints = { authorization_endpoint: `${issuer}/authorize`, token_endpoint: `${issuer}/token` };
        response.end(JSON.stringify({ issuer, ...endpoints, response_types_supported: ['code'] }));
        return;
      }
      const body = new URLSearchParams(Buffer.concat(await request.toArray()).toString());
      codes.push(String(body.get('code')));
      response.end(JSON.stringify({ access_token: 'from-the-provider', token_type: 'Bearer', expires_in: 600 }));
    });
    provider.listen(0, '127.0.0.1');
    await once(provider, 'listening');
    t.after(() => provider.close().closeAllConnections());
    const issuer = `http://127.0.0.1:${(provider.address() as AddressInfo).port}`;
    const dir = await tempDir(t);
    const oidc = { provider: issuer, client_id: 'laptop', secret: 's', path: join(dir, 'tokens') };
    const route = { proxy_auth: 'me', direct: { key: 'a.test:80', url: 'https://127.0.0.1:1' } };
    const other = { proxy_auth: 'me2', direct: { key: 'b.test:80', url: 'https://127.0.0.1:1' } };
    const winch: NodeProcess<{ port: number }> = await spawnNode(t, MAIN, [
      '--server_http_port=any',
      '--server_grpc_port=0',
      `--server_mapper_config=${JSON.stringify({ routes: [route, other] })}`,
      `--server_auth_config=${JSON.stringify({
        auth_sources: [
          { name: 'me', oidc: { ...oidc, login_callback_path: '/callback' } },
          { name: 'me2', oidc: { ...oidc, path: join(dir, 'other-tokens'), login_callback_path: '/callback' } },
        ],
      })}`,
    ]);
    const { port } = winch.ready;
    let isAnswered = false;
    const waiting = ask(port, 'http://a.test/').finally(() => {
      isAnswered = true;
    });
    const stateOf = async (source: string) => {
      const asked = new RegExp(`log in for ${source}: (\\S+)\n`);
      for (let i = 0; i < 200 && !asked.test(winch.output); i += 1) await sleep(20);
      return new URL(asked.exec(winch.output)![1]!).searchParams.get('state')!;
    };
    const state = await stateOf('me');
    const waitingToo = ask(port, 'http://b.test/');
    const otherState = await stateOf('me2');
    for (const forged of ['?state=x', '?code=stolen', `?state=${state}x&code=stolen`, ''])
      assert.equal((await ask(port, `/callback${forged}`)).status, 404, forged);
    await sleep(200);
    assert.deepEqual([isAnswered, codes], [false, []]);
    const right = await ask(port, `/callback?state=${state}&code=right`);
    assert.equal(right.body, 'You are logged in. This page can be closed.\n');
    assert.equal((await waiting).status, 502, 'nobody is at the kedge');
    assert.deepEqual(codes, ['right']);
    assert.equal((await ask(port, `/callback?state=${state}&code=again`)).status, 404);
    assert.equal((await ask(port, `/other?state=${otherState}&code=elsewhere`)).status, 404);
    assert.equal((await ask(port, `/callback?state=${otherState}&code=second`)).status, 200);
    assert.equal((await waitingToo).status, 502);
    assert.deepEqual(codes, ['right', 'second']);
  });

  it('is a proxy that curl can use', {
    skip: spawnSync('curl', ['--version']).status === 0 ? false : 'needs curl',
  }, async (t) => {
    const { port } = await startChain(t);
    const args = ['-sS', '--proxy', `http://127.0.0.1:${port}`, '-d', 'from curl', 'http://orders.us1.test:8080/'];
    const { stdout, stderr } = await new Promise<{ stdout: string; stderr: string }>((resolve) => {
      import('node:child_process').then(({ execFile }) =>
        execFile('curl', args, (_error, stdout, stderr) => resolve({ stdout, stderr })),
      );
    });
    assert.equal(stdout, 'from curl', stderr);
  });

  it('starts only when that makes sense', async (t) => {
    const dir = await tempDir(t);
    const mapper = `--server_mapper_config=${JSON.stringify({ routes: [{ direct: { key: 'a.test:80', url: 'https://x.test' } }] })}`;
    const auth = `--server_auth_config=${JSON.stringify({ auth_sources: [{ name: 'x', token: { token: 'canary' } }] })}`;
    const ports = ['--server_http_port=any', '--server_grpc_port=any'];
    for (const [flags, message] of [
      [[], /either --server_mapper_config_path or --server_mapper_config is required/],
      [['--server_mapper_config={"routes":[]}'], /the mapper has no routes/],
      [[`--server_mapper_config_path=${join(dir, 'none')}`], /none: cannot be read \(ENOENT\)/],
      [[mapper, '--what'], /Unknown option '--what'/],
      [[mapper, auth, '--client_insecure'], /--client_insecure with auth sources/],
      [[mapper, '--client_tls_cert_file=x'], /^winch: --client_tls_cert_file: x cannot be read \(ENOENT\)$/m],
      [[mapper, '--client_tls_root_ca_files=x'], /^winch: --client_tls_root_ca_files: x cannot be read \(ENOENT\)$/m],
      [
        [mapper, '--client_tls_cert_file=/nowhere/c', '--client_tls_key_file=k'],
        /^winch: --client_tls_cert_file: \/nowhere\/c cannot be read \(ENOENT\)$/m,
      ],
      [
        [mapper, `--pac_file=${join(dir, 'none')}`, '--pac_redirect_sh_expressions=*.test'],
        /^winch: --pac_file and --pac_redirect_sh_expressions are /m,
      ],
      [[mapper, '--debug_mode=maybe'], /--debug_mode is true or false/],
    ] as const) {
      const { status, out } = await runNode([MAIN, ...ports, ...flags]);
      assert.equal(status, 2, out);
      assert.match(out, message);
      assert.doesNotMatch(out, /canary/);
    }
    const winch = await spawnNode<{ grpcPort: number }>(t, MAIN, [
      ...ports,
      mapper,
      '--server_http_max_read_timeout',
      '10s',
      '--client_insecure',
      'true',
    ]);
    assert.match(winch.output, /--server_http_max_read_timeout is ignored: the head has 10 s/);
    const session = http2.connect(`http://127.0.0.1:${winch.ready.grpcPort}`);
    const request = session.request({ ':path': '/' });
    const [headers] = await once(request, 'response');
    assert.equal(headers[':status'], 415);
    assert.match(await text(request), /^winch: this port takes gRPC only.*\n$/);
    session.close();
    assert.deepEqual(await winch.stop(), { code: 0, signal: null });
  });
});
