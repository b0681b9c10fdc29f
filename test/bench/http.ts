import https from 'node:https';
import * as undici from 'undici';
import { AUTHORITY, type Bench, NAME, TARGET } from './bench.ts';
import { overhead } from './dispatch.ts';

const upload = Buffer.alloc(64 * 1024, 'u');

export async function httpRows(bench: Bench): Promise<void> {
  const { server, dial, row, fact, handshakes } = bench;
  const { ca, cert, key } = server;
  const pool = (port: number, options: undici.Pool.Options) =>
    new undici.Pool(`https://127.0.0.1:${port}`, {
      connect: { ca, cert, key, servername: NAME, preferH2: true } as never,
      keepAliveTimeout: 60_000,
      ...options,
    });
  for (const protocol of ['h1', 'h2'] as const) {
    for (const concurrency of [1, 50, 500]) {
      const connections = protocol === 'h1' ? 64 : 4;
      const dialer = dial(server.httpPort, { http: { protocol, connections } });
      const raw = pool(server.httpPort, {
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
            await raw.request({
              path: '/',
              method: 'POST',
              body: upload,
              headers: rawHeaders,
              servername: NAME,
            } as never)
          ).body.text();
        await row(`http ${protocol} POST 64 KiB c=${concurrency}`, 'raw Pool', concurrency, post, rawPost);
        const builtIn = async () => (await fetch(`${TARGET}/`, { dispatcher })).text();
        await row(`http ${protocol} fetch c=${concurrency}`, 'undici request', concurrency, builtIn, get);
      }
      if (protocol === 'h1') {
        const agent = new https.Agent({ keepAlive: true, maxSockets: 64, ca, cert, key, servername: NAME });
        const plain = () =>
          new Promise<void>((resolve, reject) => {
            const options = { host: '127.0.0.1', port: server.httpPort, agent, headers: rawHeaders };
            https.get(options, (response) => response.resume().on('end', resolve)).on('error', reject);
          });
        await row(`http h1 GET c=${concurrency}`, 'node:https Agent', concurrency, get, plain);
        agent.destroy();
      }
      await Promise.all([dialer.close(), raw.close()]);
    }
  }

  await fact('http h2 cold start, 1,000 requests to 20 hosts', 'goal <= 4 handshakes', async () => {
    const dialer = dial(server.httpPort);
    const before = await handshakes();
    await Promise.all(
      Array.from({ length: 1000 }, async (_, i) => (await dialer.fetch(`http://svc${i % 20}.us1:8080/`)).text()),
    );
    await dialer.close();
    return `${(await handshakes()) - before} handshakes`;
  });

  await fact('http h2 over 50 ms, 4 x 8 MiB', "undici's defaults, goal >= 10x", async () => {
    const dialer = dial(server.farHttpPort);
    const raw = pool(server.farHttpPort, { connections: 1, allowH2: true });
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

  await fact('http h2 uploads over 50 ms, 4 x 4 MiB', "undici's defaults", async () => {
    const body = Buffer.alloc(4 << 20, 'u');
    const dialer = dial(server.farHttpPort);
    const raw = pool(server.farHttpPort, { connections: 1, allowH2: true });
    const speed = async (call: () => Promise<undici.Dispatcher.ResponseData>) => {
      await (await call()).body.dump();
      const begin = performance.now();
      await Promise.all(Array.from({ length: 4 }, async () => (await call()).body.dump()));
      return 16 / ((performance.now() - begin) / 1000);
    };
    const upload = { method: 'POST', body } as const;
    const ours = await speed(() => undici.request(`${TARGET}/`, { dispatcher: dialer.dispatcher, ...upload }));
    const theirs = await speed(() =>
      raw.request({ path: '/', headers: { host: AUTHORITY }, servername: NAME, ...upload } as never),
    );
    await dialer.destroy();
    await raw.destroy();
    return `${ours.toFixed(1)} against ${theirs.toFixed(1)} MiB/s: ${(ours / theirs).toFixed(1)}x`;
  });

  await fact('http cold start, 20 hosts', 'one connection for each host', async () => {
    const names = Array.from({ length: 20 }, (_, i) => `svc${i}.us1:8080`);
    const time = async (call: (name: string) => Promise<unknown>) => {
      const begin = performance.now();
      await Promise.all(names.map(call));
      return performance.now() - begin;
    };
    const dialer = dial(server.farHttpPort);
    const ours = await time(async (name) => (await dialer.fetch(`http://${name}/`)).text());
    const pools = new Map(names.map((name) => [name, pool(server.farHttpPort, { connections: 1, allowH2: true })]));
    const theirs = await time(async (name) => {
      const options = { path: '/', method: 'GET', headers: { host: name }, servername: NAME } as never;
      return (await pools.get(name)!.request(options)).body.text();
    });
    await Promise.all([dialer.destroy(), ...[...pools.values()].map((each) => each.destroy())]);
    return `${ours.toFixed(0)} against ${theirs.toFixed(0)} ms over 50 ms of distance`;
  });

  await fact('dispatch overhead, object headers', 'goal <= 100 ns', async () => {
    const dialer = dial(server.httpPort);
    await (await dialer.fetch(`${TARGET}/`)).text();
    const nanos = overhead(dialer);
    await dialer.close();
    return nanos;
  });
}

async function download(call: () => Promise<undici.Dispatcher.ResponseData['body']>): Promise<number> {
  await (await call()).dump({ limit: 0 }).catch(() => {});
  const begin = performance.now();
  const sizes = await Promise.all(
    Array.from({ length: 4 }, async () => (await (await call()).arrayBuffer()).byteLength),
  );
  return sizes.reduce((sum, size) => sum + size, 0) / 1024 / 1024 / ((performance.now() - begin) / 1000);
}
