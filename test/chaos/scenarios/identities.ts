/** Client certificates that expire, rotate, and are written badly. */
import { createPrivateKey, X509Certificate } from 'node:crypto';
import { mkdirSync, renameSync, rmSync, symlinkSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { createAuthority } from '../../../examples/pki.ts';
import { type Identity, pem, pemFiles } from '../../../src/index.ts';
import { authority } from '../../helpers/kedge.ts';
import { rotating } from '../../helpers/rotating.ts';
import { tempDir } from '../../helpers/temp.ts';
import { failures, noneFailed, tally, typed } from '../asserts.ts';
import { startFaulty, startPair, until } from '../kedges.ts';
import type { Scenario } from '../run.ts';
import type { World } from '../world.ts';

const NOTICE_MS = 1000;
/** For the handshake and a busy machine. */
const SLACK_MS = 500;

interface Files {
  'tls.crt': string;
  'tls.key': string;
  'ca.crt': string;
}

async function issue(world: World): Promise<Files & { serial: string }> {
  const ca = await authority();
  const { cert, key, serial } = await ca.issue({ cn: 'pod' });
  world.secrets.add(key);
  return { 'tls.crt': cert, 'tls.key': key, 'ca.crt': ca.cert, serial };
}

const NAMES = ['tls.crt', 'tls.key', 'ca.crt'] as const;

function write(dir: string, files: Files): void {
  for (const name of NAMES) writeFileSync(join(dir, name), files[name]);
}

/** As the kubelet does: a new directory, and one rename that makes it count. */
function swap(dir: string, version: number, files: Files): void {
  mkdirSync(join(dir, `..${version}`));
  write(join(dir, `..${version}`), files);
  symlinkSync(`..${version}`, join(dir, '..next'));
  renameSync(join(dir, '..next'), join(dir, '..data'));
  if (version === 0) for (const name of NAMES) symlinkSync(`..data/${name}`, join(dir, name));
  else rmSync(join(dir, `..${version - 1}`), { recursive: true });
}

function identityOf(world: World, dir: string): { identity: Identity; warnings: Error[] } {
  const warnings: Error[] = [];
  const [cert, key, ca] = NAMES.map((name) => join(dir, name)) as [string, string, string];
  const identity = pemFiles({ cert, key, ca, onWarning: (warning) => warnings.push(warning) });
  world.after(() => {
    for (const warning of warnings) world.secrets.inspect('a warning', warning);
  });
  return { identity, warnings };
}

const expiry: Scenario = {
  name: 'certificate expires mid-run',
  run: async (world) => {
    const pair = await startPair(world);
    const ca = await authority();
    const short = async (ms: number) => {
      const { cert, key } = await ca.issue({ cn: 'pod', notAfter: new Date(Date.now() + ms) });
      world.secrets.add(key);
      return { 'tls.crt': cert, 'tls.key': key, 'ca.crt': ca.cert };
    };
    // Certificates count whole seconds.
    const life = Math.max(6000 * world.scale, 4000);
    const dir = await tempDir(world.asTest);
    write(dir, await short(life));
    world.identity = identityOf(world, dir).identity;
    const load = world.load(world.clients(pair.urls), { rate: 30 });
    for (let i = 0; i < 3; i += 1) {
      await sleep(life * 0.4);
      write(dir, await short(i === 2 ? 86_400_000 : life));
    }
    await sleep(life * 0.8);
    await load.stop();
    noneFailed(world, load.calls);

    const files = await short(2000);
    const { 'tls.crt': cert, 'tls.key': key } = files;
    world.identity = pem({ cert, key, ca: ca.cert });
    const unrenewed = world.load(world.clients(pair.urls), { rate: 30 });
    await sleep(2200);
    // What was open when it expired is closed by now, or is here.
    for (const relay of pair.relays) relay.reset();
    await sleep(100);
    const since = unrenewed.calls.length;
    await sleep(1000);
    await unrenewed.stop();
    const after = unrenewed.calls.slice(since);
    world.check(failures(after).length === after.length, 'calls went on with a certificate that is past its date');
    typed(world, after, ['ERR_KEDGE_IDENTITY_EXPIRED']);
    world.note(`not renewed: ${tally(after)}`);
  },
};

const rotation: Scenario = {
  name: 'rotation every 2 s under load',
  run: async (world) => {
    const kedges = await Promise.all([startFaulty(world), startFaulty(world)]);
    const identity = rotating(kedges[0]!);
    const began: { serial: string; at: number }[] = [];
    // Both kedges are the first for somebody.
    const urls = kedges.map(({ url }) => url);
    const clients = [
      ...world.clients(urls, { dialer: { identity } }),
      ...world.clients(urls.toReversed(), { dialer: { identity } }),
    ];
    const load = world.load(clients, { rate: 40 });
    await sleep(500);
    for (let i = 0; i < world.times(10, 2); i += 1) {
      const at = performance.now();
      const serial = await identity.rotate();
      began.push({ serial, at: performance.now() });
      const seen = () =>
        kedges.every(({ connections }) => connections.some(({ clientSerial }) => clientSerial === serial));
      world.check(
        await until(seen, NOTICE_MS + SLACK_MS),
        `a new certificate was not on new connections within ${NOTICE_MS} ms`,
      );
      world.recovered(performance.now() - began.at(-1)!.at);
      world.secrets.add(String(identity.current().key));
      await sleep(2000 - (performance.now() - at));
    }
    const last = began.at(-1)!.serial;
    const old = () =>
      kedges
        .flatMap(({ sockets }) => [...sockets])
        .filter((socket) => socket.getPeerCertificate().serialNumber !== last);
    world.check(await until(() => old().length === 0, 3000), `${old().length} old connections are not drained`);
    await load.stop();
    noneFailed(world, load.calls);
    for (const { connections } of kedges) {
      for (const [i, { resumed, clientSerial, at }] of connections.entries()) {
        const next = began[began.findIndex(({ serial }) => serial === clientSerial) + 1];
        const isLate = next !== undefined && at > next.at + NOTICE_MS + SLACK_MS;
        world.check(!isLate, 'a new connection carried an old certificate');
        const first = connections.findIndex((each) => each.clientSerial === clientSerial) === i;
        world.check(!(resumed && first), 'a session was resumed across a rotation');
      }
    }
    world.note(
      `${began.length} rotations, ${kedges.reduce((sum, { connections }) => sum + connections.length, 0)} connections`,
    );
  },
};

/** Looks at a pair as often as it can. */
function pairs(world: World, identity: Identity) {
  let looks = 0;
  let mismatches = 0;
  const timer = setInterval(() => {
    const { cert, key } = identity.current();
    looks += 1;
    if (!new X509Certificate(cert!).checkPrivateKey(createPrivateKey(String(key)))) mismatches += 1;
  }, 5);
  world.after(() => clearInterval(timer));
  return () => {
    clearInterval(timer);
    world.check(mismatches === 0, `${mismatches} of ${looks} pairs did not match`);
    return looks;
  };
}

const symlinks: Scenario = {
  name: 'Kubernetes `..data` symlink swap',
  run: async (world) => {
    const pair = await startPair(world);
    const dir = await tempDir(world.asTest);
    let version = 0;
    swap(dir, version, await issue(world));
    const { identity, warnings } = identityOf(world, dir);
    world.identity = identity;
    const load = world.load(world.clients(pair.urls), { rate: 20 });
    await sleep(300);
    const looked = pairs(world, identity);
    const next = async () => {
      const files = await issue(world);
      version += 1;
      swap(dir, version, files);
      const at = performance.now();
      return { at, seen: () => identity.current().serial === files.serial };
    };
    for (let i = 0; i < world.times(15, 3); i += 1) {
      const { at, seen } = await next();
      world.check(await until(seen, NOTICE_MS + SLACK_MS), `a swap was not noticed within ${NOTICE_MS} ms`);
      world.recovered(performance.now() - at);
      await sleep(100 * world.random());
    }
    // As fast as they can be made; only the last has to be noticed.
    let last = await next();
    for (let i = 0; i < world.times(600, 50); i += 1) last = await next();
    world.check(await until(last.seen, NOTICE_MS + SLACK_MS), 'the last of many swaps was not noticed');
    await load.stop();
    noneFailed(world, load.calls);
    world.check(warnings.length === 0, `${warnings.length} warnings: ${warnings[0]?.message}`);
    world.note(`${version} swaps, ${looked()} looks, no mismatch`);
  },
};

const badFiles: Scenario = {
  name: 'truncated, dribbled, mismatched or wrong-CA files',
  run: async (world) => {
    const pair = await startPair(world);
    const dir = await tempDir(world.asTest);
    const good = await issue(world);
    write(dir, good);
    const { identity, warnings } = identityOf(world, dir);
    world.identity = identity;
    const load = world.load(world.clients(pair.urls), { rate: 20 });
    await sleep(300);
    const looked = pairs(world, identity);
    const [next, other, stranger] = await Promise.all([issue(world), issue(world), createAuthority('stranger')]);
    const spoil = (name: keyof Files, content: string) => () => writeFileSync(join(dir, name), content);
    const wrong: Record<string, () => void> = {
      'a truncated certificate': spoil('tls.crt', next['tls.crt'].slice(0, 200)),
      'a truncated key': spoil('tls.key', next['tls.key'].slice(0, 80)),
      'a mismatched key': spoil('tls.key', other['tls.key']),
      'an empty CA file': spoil('ca.crt', ''),
      'a truncated CA file': spoil('ca.crt', stranger.cert.slice(0, 200)),
    };
    for (const [what, spoiled] of Object.entries(wrong)) {
      warnings.length = 0;
      spoiled();
      await until(() => warnings.length > 0, 3000);
      await sleep(500);
      world.check(warnings.length === 1, `${warnings.length} warnings of ${what}`);
      world.check(identity.current().serial === good.serial, `${what} did not leave the last good one`);
      const at = performance.now();
      write(dir, next);
      const healed = await until(() => identity.current().serial === next.serial, NOTICE_MS + SLACK_MS);
      world.check(healed, `the fix of ${what} was not noticed`);
      world.recovered(performance.now() - at);
      write(dir, good);
      world.check(await until(() => identity.current().serial === good.serial, NOTICE_MS + SLACK_MS), 'back again');
    }
    for (const name of ['tls.crt', 'tls.key'] as const) {
      for (let at = 0; at < next[name].length; at += 60) {
        writeFileSync(join(dir, name), next[name].slice(0, at));
        await sleep(5);
      }
      writeFileSync(join(dir, name), next[name]);
    }
    const whole = await until(() => identity.current().serial === next.serial, NOTICE_MS + SLACK_MS);
    world.check(whole, 'dribbled files were not taken when they were whole');
    await load.stop();
    noneFailed(world, load.calls);
    looked();

    // A CA that is whole and another one: kedges are refused with a typed error, and the right one heals.
    writeFileSync(join(dir, 'ca.crt'), stranger.cert);
    await sleep(NOTICE_MS);
    const clients = world.clients(pair.urls);
    const distrusted = await Promise.all(clients.map((client) => world.call(client)));
    world.check(failures(distrusted).length === distrusted.length, 'a kedge of an unknown CA was trusted');
    typed(world, distrusted, ['ERR_KEDGE_CERTIFICATE']);
    write(dir, good);
    await sleep(2 * NOTICE_MS);
    noneFailed(world, await Promise.all(clients.map((client) => world.call(client))));
  },
};

export const identities: readonly Scenario[] = [expiry, rotation, symlinks, badFiles];
