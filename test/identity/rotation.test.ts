import assert from 'node:assert/strict';
import { mkdirSync, renameSync, rmSync, symlinkSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, it } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { grpcDialer } from '../../src/grpc/index.ts';
import { createDialer, hosts, pemFiles } from '../../src/index.ts';
import { echoClient, startGrpcKedge, unary } from '../helpers/grpc-kedge.ts';
import { authority, startKedge } from '../helpers/kedge.ts';
import { tempDir } from '../helpers/temp.ts';

/** A minute in `KEDGE_TEST_ROTATION_SECONDS=60 node --test test/identity/rotation.test.ts`. */
const SECONDS = Number(process.env['KEDGE_TEST_ROTATION_SECONDS'] ?? 10);
const EVERY_MS = 2000;
const WORKERS = 10;

type Write = (dir: string, version: number, files: Record<string, string>) => void;

const inPlace: Write = (dir, _version, files) => {
  for (const [name, content] of Object.entries(files)) writeFileSync(join(dir, name), content);
};

const swapped: Write = (dir, version, files) => {
  mkdirSync(join(dir, `..${version}`));
  inPlace(join(dir, `..${version}`), version, files);
  symlinkSync(`..${version}`, join(dir, '..next'));
  renameSync(join(dir, '..next'), join(dir, '..data'));
  if (version === 0) for (const name of Object.keys(files)) symlinkSync(`..data/${name}`, join(dir, name));
  else rmSync(join(dir, `..${version - 1}`), { recursive: true });
};

for (const [layout, write] of Object.entries({ 'plain files': inPlace, '..data swaps': swapped })) {
  describe(`rotation every 2 s under load, ${layout}`, () => {
    it('loses no call on h1, h2 and gRPC to two kedges', { timeout: (SECONDS + 60) * 1000 }, async (t) => {
      const ca = await authority();
      const [dir, https, rpc] = await Promise.all([
        tempDir(t),
        Promise.all([startKedge(t), startKedge(t)]),
        Promise.all([startGrpcKedge(t), startGrpcKedge(t)]),
      ]);
      const serials: { serial: string; at: number }[] = [];
      const rotate = async () => {
        const { cert, key, serial } = await ca.issue({ cn: 'pod' });
        write(dir, serials.length, { 'tls.crt': cert, 'tls.key': key, 'ca.crt': ca.cert });
        serials.push({ serial, at: performance.now() });
      };
      await rotate();
      const paths = { cert: join(dir, 'tls.crt'), key: join(dir, 'tls.key'), ca: join(dir, 'ca.crt') };
      const warnings: Error[] = [];
      const identity = pemFiles({ ...paths, onWarning: (warning) => warnings.push(warning) });
      const dial = (kedges: readonly { route(): object }[], protocol: 'h1' | 'h2') => {
        const table = { 'one.test': kedges[0]!.route(), 'two.test': kedges[1]!.route() } as never;
        const dialer = createDialer({ mapper: hosts(table), identity, http: { protocol } });
        t.after(() => dialer.destroy());
        return dialer;
      };
      let isRunning = true;
      const calls = { h1: 0, h2: 0, gRPC: 0 };
      // Any failure rejects, and fails the test.
      const worker = async (wire: keyof typeof calls, call: () => Promise<unknown>) => {
        while (isRunning) {
          await call();
          calls[wire] += 1;
          await sleep(5);
        }
      };
      const load: Promise<void>[] = [];
      const names = ['one.test', 'two.test'];
      for (const protocol of ['h1', 'h2'] as const) {
        const dialer = dial(https, protocol);
        for (let i = 0; i < WORKERS; i += 1) {
          const url = `http://${names[i % 2]}/`;
          load.push(worker(protocol, async () => (await dialer.fetch(url, { method: 'POST', body: 'x' })).text()));
        }
      }
      const { wrap } = grpcDialer(dial(rpc, 'h2'));
      const clients = names.map((name) => new (wrap(echoClient()))(`${name}:9090`));
      for (let i = 0; i < WORKERS; i += 1) load.push(worker('gRPC', () => unary(clients[i % 2]!, 'x')));

      for (let i = 0; i < (SECONDS * 1000) / EVERY_MS; i += 1) {
        await sleep(EVERY_MS);
        await rotate();
      }
      await sleep(1500);
      isRunning = false;
      await Promise.all(load);

      for (const [wire, count] of Object.entries(calls)) assert.ok(count > SECONDS * 20, `${count} calls over ${wire}`);
      assert.deepEqual(warnings, []);
      for (const kedge of [...https, ...rpc]) {
        const seen = new Set(kedge.connections.map(({ clientSerial }) => clientSerial));
        assert.deepEqual(seen, new Set(serials.map(({ serial }) => serial)), 'the kedge saw every certificate');
        for (const { clientSerial, at } of kedge.connections) {
          const successor = serials[serials.findIndex(({ serial }) => serial === clientSerial) + 1];
          assert.ok(successor === undefined || at < successor.at + 1000, 'an old certificate on a new connection');
        }
      }
      const connections = [...https, ...rpc].flatMap((kedge) => kedge.connections);
      t.diagnostic(
        `${JSON.stringify(calls)}, 0 failed, ${serials.length} certificates, ${connections.length} connections, ` +
          `${connections.filter(({ resumed }) => resumed).length} resumed within their certificate`,
      );
    });
  });
}
