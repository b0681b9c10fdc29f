/**
 * What the dialer costs, against what it could be replaced by, in one run: `npm run bench [-- --only <words>] [--json]`.
 */
import { fork } from 'node:child_process';
import { once } from 'node:events';
import https from 'node:https';
import os from 'node:os';
import { parseArgs } from 'node:util';
import * as grpc from '@grpc/grpc-js';
import * as undici from 'undici';
import { grpcDialer } from '../../src/grpc/index.ts';
import { createDialer, type DialerOptions, pem, single } from '../../src/index.ts';
import { echoClient, unary } from '../helpers/grpc-kedge.ts';
import { type Call, type Comparison, compare } from './measure.ts';

const { values } = parseArgs({
  options: { only: { type: 'string', default: '' }, json: { type: 'boolean', default: false } },
});
const NAME = 'us1.kedge.test';
const TARGET = 'http://orders.shop.svc.us1:8080';
const AUTHORITY = 'orders.shop.svc.us1:8080';

const child = fork(new URL('./server.ts', import.meta.url), { execArgv: [] });
const [server] = (await once(child, 'message')) as [Record<string, never> & { ca: string; cert: string; key: string }];
const { ca, cert, key } = server;

const handshakes = async () => {
  child.send('count');
  return ((await once(child, 'message')) as [{ handshakes: number }])[0].handshakes;
};
const dial = (port: number, options: Partial<DialerOptions> = {}) =>
  createDialer({
    mapper: single({ kedge: `https://127.0.0.1:${port}`, serverName: NAME }),
    identity: pem({ cert, key, ca }),
    ...options,
  });
const pool = (port: number, options: undici.Pool.Options) =>
  new undici.Pool(`https://127.0.0.1:${port}`, {
    connect: { ca, cert, key, servername: NAME, preferH2: true } as never,
    keepAliveTimeout: 60_000,
    ...options,
  });

interface Row {
  name: string;
  rival: string;
  comparison?: Comparison;
  value?: string;
}

const rows: Row[] = [];
const wanted = (name: string) => name.includes(values.only);
async function row(name: string, rival: string, concurrency: number, ours: Call, theirs: Call): Promise<void> {
  if (wanted(name)) rows.push({ name, rival, comparison: await compare(ours, theirs, concurrency) });
}
async function fact(name: string, rival: string, measure: () => Promise<string>): Promise<void> {
  if (wanted(name)) rows.push({ name, rival, value: await measure() });
}

const upload = Buffer.alloc(64 * 1024, 'u');
for (const protocol of ['h1', 'h2'] as const) {
  for (const concurrency of [1, 50, 500]) {
    const connections = protocol === 'h1' ? 64 : 4;
    const dialer = dial(server['httpPort']!, { http: { protocol, connections } });
    const raw = pool(server['httpPort']!, {
      connections,
      allowH2: protocol === 'h2',
      h2Options: { maxConcurrentStreams: 1000, initialWindowSize: 8 << 20, connectionWindowSize: 8 << 20 } as never,
    });
    const { dispatcher } = dialer;
    const headers = { accept: 'application/json', 'user-agent': 'bench' };
    const rawHeaders = { ...headers, host: AUTHORITY };
    const get = async () =>
      (await dispatcher.request({ origin: TARGET, path: '/', method: 'GET', headers })).body.text();
    const rawGet = async () =>
      (await raw.request({ path: '/', method: 'GET', headers: rawHeaders, servername: NAME } as never)).body.text();
    await row(`http ${protocol} GET c=${concurrency}`, 'raw Pool', concurrency, get, rawGet);
    if (concurrency === 50) {
      const post = async () =>
        (await dispatcher.request({ origin: TARGET, path: '/', method: 'POST', body: upload, headers })).body.text();
      const rawPost = async () =>
        (
          await raw.request({ path: '/', method: 'POST', body: upload, headers: rawHeaders, servername: NAME } as never)
        ).body.text();
      await row(`http ${protocol} POST 64 KiB c=${concurrency}`, 'raw Pool', concurrency, post, rawPost);
      const builtIn = async () => (await fetch(`${TARGET}/`, { dispatcher })).text();
      await row(`http ${protocol} fetch c=${concurrency}`, 'undici request', concurrency, builtIn, get);
    }
    if (protocol === 'h1') {
      const agent = new https.Agent({ keepAlive: true, maxSockets: 64, ca, cert, key, servername: NAME });
      const plain = () =>
        new Promise<void>((resolve, reject) => {
          const options = { host: '127.0.0.1', port: server['httpPort']!, agent, headers: rawHeaders };
          https.get(options, (response) => response.resume().on('end', resolve)).on('error', reject);
        });
      await row(`http h1 GET c=${concurrency}`, 'node:https Agent', concurrency, get, plain);
      agent.destroy();
    }
    await Promise.all([dialer.close(), raw.close()]);
  }
}

await fact('http h2 cold start, 1,000 requests to 20 hosts', 'goal <= 4 handshakes', async () => {
  const dialer = dial(server['httpPort']!);
  const before = await handshakes();
  await Promise.all(
    Array.from({ length: 1000 }, async (_, i) => (await dialer.fetch(`http://svc${i % 20}.us1:8080/`)).text()),
  );
  await dialer.close();
  return `${(await handshakes()) - before} handshakes`;
});

async function download(call: () => Promise<undici.Dispatcher.ResponseData['body']>): Promise<number> {
  await (await call()).dump({ limit: 0 }).catch(() => {});
  const begin = performance.now();
  const sizes = await Promise.all(
    Array.from({ length: 4 }, async () => (await (await call()).arrayBuffer()).byteLength),
  );
  return sizes.reduce((sum, size) => sum + size, 0) / 1024 / 1024 / ((performance.now() - begin) / 1000);
}
await fact('http h2 over 50 ms, 4 x 8 MiB', "undici's defaults, goal >= 10x", async () => {
  const dialer = dial(server['farHttpPort']!);
  const raw = pool(server['farHttpPort']!, { connections: 1, allowH2: true });
  const ours = await download(
    async () => (await undici.request(`${TARGET}/blob`, { dispatcher: dialer.dispatcher })).body,
  );
  const theirs = await download(
    async () =>
      (await raw.request({ path: '/blob', method: 'GET', headers: { host: AUTHORITY }, servername: NAME } as never))
        .body,
  );
  await dialer.destroy();
  await raw.destroy();
  return `${ours.toFixed(0)} against ${theirs.toFixed(1)} MiB/s: ${(ours / theirs).toFixed(1)}x`;
});

await fact('dispatch overhead, object headers', 'goal <= 100 ns', async () => {
  const dialer = dial(server['httpPort']!);
  await (await dialer.fetch(`${TARGET}/`)).text();
  const { overhead } = await import('./dispatch.ts');
  const nanos = overhead(dialer);
  await dialer.close();
  return nanos;
});

for (const concurrency of [1, 100, 500]) {
  const dialer = dial(server['grpcPort']!);
  const client = new (grpcDialer(dialer).wrap(echoClient('svc0.Echo')))(AUTHORITY);
  const credentials = grpc.credentials.createSsl(Buffer.from(ca), Buffer.from(key), Buffer.from(cert));
  const rawClient = new (echoClient('svc0.Echo'))(`127.0.0.1:${server['grpcPort']}`, credentials, {
    'grpc.ssl_target_name_override': NAME,
    'grpc-node.flow_control_window': 8 << 20,
  });
  const host = { host: AUTHORITY };
  await row(
    `grpc unary c=${concurrency}`,
    'raw channel',
    concurrency,
    () => unary(client, 'x'),
    () => unary(rawClient, 'x', undefined, host),
  );
  rawClient.close();
  await dialer.close();
}
await fact('grpc over 50 ms, 4 x 2 MiB', "grpc-js's defaults, goal >= 20x", async () => {
  const dialer = dial(server['farGrpcPort']!);
  const client = new (grpcDialer(dialer).wrap(echoClient('svc0.Echo')))(AUTHORITY);
  const credentials = grpc.credentials.createSsl(Buffer.from(ca), Buffer.from(key), Buffer.from(cert));
  const rawClient = new (echoClient('svc0.Echo'))(`127.0.0.1:${server['farGrpcPort']}`, credentials, {
    'grpc.ssl_target_name_override': NAME,
  });
  const speed = async (call: () => Promise<{ text: string }>) => {
    const begin = performance.now();
    const replies = await Promise.all(Array.from({ length: 4 }, call));
    const bytes = replies.reduce((sum, { text }) => sum + text.length, 0);
    return bytes / 1024 / 1024 / ((performance.now() - begin) / 1000);
  };
  await unary(client, 'x');
  await unary(rawClient, 'x', undefined, { host: AUTHORITY });
  const ours = await speed(() => unary(client, 'blob'));
  const theirs = await speed(() => unary(rawClient, 'blob', undefined, { host: AUTHORITY }));
  rawClient.close();
  await dialer.close();
  return `${ours.toFixed(1)} against ${theirs.toFixed(2)} MiB/s: ${(ours / theirs).toFixed(1)}x`;
});
child.disconnect();

if (values.json) console.log(JSON.stringify({ node: process.version, cpus: os.cpus().length, rows }, null, 2));
else print();

function print(): void {
  const table = rows.map(({ name, rival, comparison, value }) => {
    if (comparison === undefined) return [name, rival, value!, '', '', ''];
    const { ours, theirs, ratio } = comparison;
    return [
      name,
      rival,
      `${ratio.median.toFixed(2)} (${ratio.min.toFixed(2)}-${ratio.max.toFixed(2)})`,
      ours.perSecond.toFixed(0),
      theirs.perSecond.toFixed(0),
      `${ours.cpuMicros.toFixed(0)} / ${theirs.cpuMicros.toFixed(0)}`,
    ];
  });
  const head = ['row', 'against', 'ratio, median (min-max)', 'ours/s', 'theirs/s', 'CPU us a call'];
  console.log(
    `Node ${process.version}, ${os.cpus().length} x ${os.cpus()[0]?.model}, ${new Date().toISOString().slice(0, 10)}\n`,
  );
  for (const line of [head, head.map(() => '---'), ...table]) console.log(`| ${line.join(' | ')} |`);
}
