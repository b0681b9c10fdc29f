import assert from 'node:assert/strict';
import { once } from 'node:events';
import { readFileSync } from 'node:fs';
import http from 'node:http';
import http2 from 'node:http2';
import net, { type AddressInfo } from 'node:net';
import type { TestContext } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import tls from 'node:tls';
import { createDialer, type Dialer, pem, single } from '../../src/index.ts';
import { authority, KEDGE_NAME } from './kedge.ts';
import type { NodeProcess } from './process.ts';
import { type KedgeReady, kedgeProcesses } from './reference-kedge.ts';

/** The reference kedge as a process of its own, with backends that watch what reaches them and with clients that only want to be served. */
export interface RawWorld {
  readonly kedge: NodeProcess<KedgeReady>;
  /** For connections as CN=pod, which may not call `/admin`. */
  readonly tls: tls.ConnectionOptions;
  /** What reached the HTTP backend: method, target and subject. */
  readonly seen: string[];
  /** Answers of the backend behind `raw.us1`, by path, as bytes; the connection is closed after those that say so. */
  readonly answers: Map<string, { bytes: string | Buffer; close: boolean }>;
  /** Sends bytes on a connection of its own: the answer until it closes or is quiet. */
  h1(bytes: string | readonly string[], options?: { ms?: number; alpn?: string }): Promise<string>;
  rss(): number;
  /** What went wrong so far, for others and at the backends. */
  readonly violations: string[];
  /** Others were served all the time; asserts it, and that the kedge lives. */
  finish(): Promise<void>;
}

const BYSTANDER_MS = 8_000;
const LARGE = Buffer.alloc(500_000, 'l');

export async function rawWorld(t: TestContext): Promise<RawWorld> {
  const seen: string[] = [];
  const violations: string[] = [];
  const answers: RawWorld['answers'] = new Map();
  const listen = async (server: net.Server) => {
    server.listen(0, '127.0.0.1');
    await once(server, 'listening');
    t.after(() => server.close());
    return (server.address() as AddressInfo).port;
  };

  const ledger = http.createServer((request, response) => {
    const { url = '', method } = request;
    const subject = String(request.headers['x-kedge-client-subject']);
    seen.push(`${method} ${url}`);
    if (subject !== (url === '/other' ? 'CN=other' : 'CN=pod')) violations.push(`the backend was told ${subject}`);
    if (/^\/(?:never|admin)/.test(url)) violations.push(`the backend saw ${method} ${url}`);
    request.on('error', () => {});
    request.on('data', (chunk: Buffer) => {
      // Those who attack send nothing but this as a body; anything else was another's request.
      if (!url.endsWith('?quote') && !/^A*$/.test(chunk.toString('latin1')))
        violations.push(`a body of ${url} holds ${chunk.toString('latin1')}`);
    });
    if (url === '/silent') return;
    if (url === '/endless') {
      const timer = setInterval(() => response.write('more'), 20);
      response.on('close', () => clearInterval(timer));
    } else if (url === '/large') response.end(LARGE);
    else if (url.startsWith('/early')) response.end('early');
    else if (url === '/whole') request.on('end', () => response.end('whole'));
    else response.end(String(request.headers['x-nonce'] ?? 'none'));
  });
  ledger.on('upgrade', (request, socket) => {
    seen.push(`UPGRADE ${request.headers.upgrade} ${request.url}`);
    if (request.headers['content-length'] !== undefined) violations.push('an upgrade with a length');
    socket.on('error', () => {});
    if (request.url === '/ws') {
      socket.write('HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n');
      socket.pipe(socket);
    } else socket.end('HTTP/1.1 403 Forbidden\r\ntransfer-encoding: chunked\r\n\r\n2\r\nno\r\n0\r\n\r\n');
  });
  ledger.keepAliveTimeout = 60_000;

  const raw = net.createServer((socket) => {
    socket.on('error', () => {});
    let head = '';
    socket.on('data', (chunk) => {
      head += chunk.toString('latin1');
      if (!head.includes('\r\n\r\n')) return;
      const answer = answers.get(head.split(' ')[1]!);
      head = '';
      if (answer === undefined) return;
      socket.write(answer.bytes);
      if (answer.close) socket.end();
    });
  });

  const rpc = http2.createServer();
  rpc.on('session', (session) => session.on('error', () => {}));
  rpc.on('stream', (stream, headers) => {
    stream.on('error', () => {});
    const head = { ':status': 200, 'content-type': 'application/grpc' };
    if (headers[':path'] === '/t.T/Late') setTimeout(() => stream.closed || stream.respond(head), 60);
    else if (headers[':path'] === '/t.T/Early') {
      stream.respond({ ...head, 'grpc-status': '3' }, { endStream: true });
    } else if (headers[':path'] === '/t.T/Reset') stream.close(Number(headers['x-code']));
    else if (headers[':path'] === '/t.T/Unavailable') stream.respond({ ':status': 503 }, { endStream: true });
    else {
      stream.respond(head, { waitForTrailers: true });
      stream.on('wantTrailers', () => stream.closed || stream.sendTrailers({ 'grpc-status': '0' }));
      if (headers[':path'] === '/t.T/Open') stream.write('AAAA');
      else stream.pipe(stream);
    }
  });

  const [ledgerPort, rawPort, rpcPort] = await Promise.all([listen(ledger), listen(raw), listen(rpc)]);
  const at = (port: number) => ({ dns_name: '127.0.0.1', port });
  const processes = await kedgeProcesses(t, {
    director: {
      http: {
        routes: [
          {
            backend_name: 'ledger',
            host_matcher: 'app.us1',
            path_rules: ['/admin', '/admin/*'],
            allowed_clients: ['CN=admin'],
          },
          { backend_name: 'ledger', host_matcher: 'app.us1', path_rules: ['/*'] },
          { backend_name: 'ledger', host_matcher: 'open.us1' },
          { backend_name: 'raw', host_matcher: 'raw.us1' },
        ],
      },
      grpc: { routes: [{ backend_name: 'rpc', authority_host_matcher: 'app.us1' }] },
    },
    backendPool: {
      http: {
        backends: [
          { name: 'ledger', host: at(ledgerPort) },
          { name: 'raw', host: at(rawPort) },
        ],
      },
      grpc: { backends: [{ name: 'rpc', host: at(rpcPort) }] },
    },
  });
  const kedge = await processes.start('any');
  const options = {
    host: '127.0.0.1',
    port: kedge.ready.port,
    servername: KEDGE_NAME,
    cert: processes.client.cert,
    key: processes.client.key,
    ca: processes.ca,
  };

  let isOver = false;
  let served = 0;
  const bystander = async (dialer: Dialer) => {
    for (let i = 0; !isOver; i += 1) {
      const nonce = String(Math.random());
      try {
        const signal = AbortSignal.timeout(BYSTANDER_MS);
        const method = i % 3 === 0 ? 'POST' : 'GET';
        const body = method === 'POST' ? 'AAA' : null;
        const answer = await dialer.fetch('http://app.us1/other', {
          method,
          body,
          signal,
          headers: { 'x-nonce': nonce },
        });
        const text = await answer.text();
        if (text !== nonce) violations.push(`another client asked for ${nonce} and got ${answer.status} ${text}`);
        served += 1;
      } catch (error) {
        violations.push(`another client was not served: ${String(error)} ${String((error as Error).cause ?? '')}`);
      }
      await sleep(10);
    }
  };
  const { cert, key } = await (await authority()).issue({ cn: 'other' });
  const identity = pem({ cert, key, ca: processes.ca });
  const bystanders = (['h1', 'h2'] as const).map((protocol) => {
    const route = { kedge: `https://127.0.0.1:${kedge.ready.port}` };
    const dialer = createDialer({ mapper: single(route), identity, http: { protocol, pingIntervalMs: 5_000 } });
    t.after(() => dialer.destroy());
    return bystander(dialer);
  });
  t.after(() => {
    isOver = true;
  });

  return {
    kedge,
    tls: options,
    seen,
    answers,
    violations,
    h1: (bytes, { ms = 4_000, alpn = 'http/1.1' } = {}) => spoken({ ...options, ALPNProtocols: [alpn] }, bytes, ms),
    rss: () => Number(/VmRSS:\s+(\d+)/.exec(readFileSync(`/proc/${kedge.pid}/status`, 'utf8'))![1]) * 1024,
    finish: async () => {
      for (let i = 0; served <= 20 && i < 200; i += 1) await sleep(50);
      isOver = true;
      await Promise.all(bystanders);
      assert.deepEqual(violations, []);
      assert.ok(served > 20, `others were served ${served} times`);
      assert.doesNotMatch(kedge.output, /Warning/);
      assert.doesNotThrow(() => process.kill(kedge.pid, 0), kedge.output);
    },
  };
}

async function spoken(options: tls.ConnectionOptions, bytes: string | readonly string[], ms: number): Promise<string> {
  const socket = tls.connect(options);
  let out = '';
  let quiet: NodeJS.Timeout | undefined;
  socket.setEncoding('latin1');
  const done = new Promise<void>((resolve) => {
    const late = setTimeout(resolve, ms);
    socket.on('data', (text: string) => {
      out += text;
      clearTimeout(quiet);
      // A hint is not the answer yet.
      if (/^(?:HTTP\/1\.1 1(?!01)\d\d[\s\S]*?\r\n\r\n)*HTTP\/1\.1 (?:[2-5]\d\d|101)[\s\S]*?\r\n\r\n/.test(out))
        quiet = setTimeout(resolve, 60);
    });
    socket.on('error', () => {});
    socket.on('close', () => {
      clearTimeout(late);
      resolve();
    });
  });
  await once(socket, 'secureConnect');
  for (const each of [bytes].flat()) {
    socket.write(each as string, 'latin1');
    await sleep(15);
  }
  await done;
  clearTimeout(quiet);
  socket.destroy();
  return out;
}
