import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import {
  lstatSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  renameSync,
  rmSync,
  symlinkSync,
  watch,
  writeFileSync,
} from 'node:fs';
import { join } from 'node:path';
import { describe, it } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import type { Certificate } from '../../examples/pki.ts';
import { type Identity, isKedgeError, pemFiles } from '../../src/index.ts';
import { authority } from '../helpers/kedge.ts';
import { trackLeaks } from '../helpers/leaks.ts';
import { random } from '../helpers/random.ts';
import { tempDir } from '../helpers/temp.ts';

const SEED = Number(process.env['KEDGE_TEST_SEED'] ?? Date.now() % 1_000_000);
/** Files take their time: a step is some ms, so the walks go side by side. */
const STEPS = Number(process.env['KEDGE_TEST_MODEL_FILES'] ?? 4000);
const WALKS = 60;
/** From the last write to the certificate in use; the promise is a second, the rest is for a machine with more to do. */
const BOUND_MS = 5000;
const WARN_AFTER_MS = 1000;
const NAMES = ['tls.crt', 'tls.key', 'ca.crt'] as const;
type Name = (typeof NAMES)[number];

const ca = await authority();
const certificates = await Promise.all(Array.from({ length: 12 }, () => ca.issue({ cn: 'pod' })));
const isPair = (cert: unknown, key: unknown) =>
  certificates.some((each) => each.cert === String(cert) && each.key === String(key));

/** A directory as Kubernetes lays it out, what happens to it, and an identity of its files. */
class Walk {
  private readonly dir: string;
  private readonly pick: (n: number) => number;
  private readonly where: string;
  readonly identity: Identity;
  private version = 0;
  private readonly warnings: Error[] = [];
  private ends: (() => void)[] = [];
  private published = '';
  private violation: string | undefined;

  constructor(dir: string, seed: number) {
    this.dir = dir;
    this.where = `seed ${SEED}, walk ${seed - SEED}`;
    const next = random(seed);
    this.pick = (n) => Math.floor(next() * n);
    const [cert, key, authorities] = NAMES.map((name) => join(dir, name)) as [string, string, string];
    for (const name of NAMES) symlinkSync(`..data/${name}`, join(dir, name));
    this.swap(certificates[0]!);
    const onWarning = (warning: Error) => this.warnings.push(warning);
    this.identity = pemFiles({ cert, key, ca: authorities, onWarning });
    this.identity.current();
    this.subscribe();
  }

  private choose<T>(all: readonly T[]): T {
    return all[this.pick(all.length)]!;
  }

  private at(name: Name): string {
    return join(this.dir, '..data', name);
  }

  private subscribe(): void {
    let end = () => {};
    end = this.identity.subscribe(() => {
      const { serial, ca: authorities } = this.identity.current();
      const now = `${serial} ${authorities}`;
      // The first subscriber speaks for all.
      if (end !== this.ends[0]) return;
      // Thrown here it would be told as a warning.
      if (now === this.published) this.violation = `${this.where}: told without a change`;
      this.published = now;
    });
    this.ends.push(end);
    if (this.ends.length === 1) this.published = '';
  }

  /** Everything anew, in one step. */
  private swap({ cert, key }: Certificate): void {
    const own = `..${this.version}`;
    this.version += 1;
    mkdirSync(join(this.dir, own));
    for (const [i, content] of [cert, key, ca.cert].entries()) writeFileSync(join(this.dir, own, NAMES[i]!), content);
    symlinkSync(own, join(this.dir, '..next'));
    renameSync(join(this.dir, '..next'), join(this.dir, '..data'));
    if (this.version > 1) rmSync(join(this.dir, `..${this.version - 2}`), { recursive: true });
  }

  private place(name: Name, make: (path: string) => void): void {
    const path = join(this.dir, `.${name}`);
    rmSync(path, { recursive: true, force: true });
    make(path);
    rmSync(this.at(name), { recursive: true, force: true });
    renameSync(path, this.at(name));
  }

  private async replace({ cert, key }: Certificate): Promise<void> {
    const files: [Name, string][] = [
      ['tls.crt', cert],
      ['tls.key', key],
      ['ca.crt', ca.cert],
    ];
    if (this.pick(2) === 0) files.reverse();
    const inPlace = this.pick(2) === 0;
    for (const [name, content] of files) {
      if (inPlace) this.write(name, content);
      else this.place(name, (path) => writeFileSync(path, content));
      if (this.pick(4) === 0) await sleep(this.pick(60));
    }
  }

  private write(name: Name, content: string): void {
    // Where there is no file, it cannot be written in place: a FIFO would wait for its reader.
    if (lstatSync(this.at(name), { throwIfNoEntry: false })?.isFile() === true) writeFileSync(this.at(name), content);
    else this.place(name, (path) => writeFileSync(path, content));
  }

  private async dribble(name: Name, content: string): Promise<void> {
    rmSync(this.at(name), { recursive: true, force: true });
    for (let at = 0; at < content.length; at += 300) {
      writeFileSync(this.at(name), content.slice(0, at));
      await sleep(this.pick(15));
    }
    writeFileSync(this.at(name), content);
  }

  /** One file that is of no use, whatever the others hold. */
  private spoil(): void {
    const name = this.choose(NAMES);
    const kind = this.pick(name === 'ca.crt' ? 7 : 8);
    if (kind === 0) rmSync(this.at(name), { recursive: true, force: true });
    else if (kind === 1) this.place(name, (path) => mkdirSync(path));
    else if (kind === 2) this.place(name, (path) => execFileSync('mkfifo', [path]));
    else if (kind === 3) this.place(name, (path) => symlinkSync(name, path));
    else if (kind === 4) this.place(name, (path) => symlinkSync('nowhere', path));
    else if (kind === 5) this.write(name, '');
    else if (kind === 6) this.write(name, '-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n');
    else this.write(name, this.choose(certificates).cert.slice(0, 100 + this.pick(200)));
  }

  async step(): Promise<void> {
    const kind = this.pick(100);
    const certificate = this.choose(certificates);
    if (kind < 20) this.swap(certificate);
    else if (kind < 40) await this.replace(certificate);
    else if (kind < 48) await this.dribble('tls.crt', certificate.cert);
    else if (kind < 56) this.write('tls.key', certificate.key);
    else if (kind < 75) this.spoil();
    else if (kind < 79) this.subscribe();
    else if (kind < 84) {
      const end = this.ends.splice(this.pick(this.ends.length), 1)[0];
      end?.();
      end?.();
    } else if (kind < 88) await this.staysBad();
    else if (kind < 96) await this.comesRight();
    this.check();
    await sleep(this.pick(4) === 0 ? this.pick(100) : 0);
    this.check();
  }

  check(): void {
    assert.equal(this.violation, undefined);
    const { cert, key, ca: authorities } = this.identity.current();
    assert.ok(isPair(cert, key), `${this.where}: certificate and key do not belong together`);
    assert.equal(String(authorities), ca.cert, `${this.where}: a CA that never was`);
  }

  /** However it was, the newest is in use soon. */
  async comesRight(): Promise<void> {
    const certificate = this.choose(certificates);
    if (this.pick(2) === 0) this.swap(certificate);
    else await this.replace(certificate);
    const began = performance.now();
    while (this.identity.current().serial !== certificate.serial) {
      assert.ok(performance.now() - began < BOUND_MS, `${this.where}: not in use after ${BOUND_MS} ms`);
      this.check();
      await sleep(20);
    }
  }

  private async staysBad(): Promise<void> {
    await this.comesRight();
    const { serial } = this.identity.current();
    // A good one that is noticed late would end the problem.
    await sleep(600);
    this.warnings.length = 0;
    this.spoil();
    const began = performance.now();
    // While nobody subscribes, whoever asks looks.
    while (this.warnings.length === 0) {
      assert.ok(performance.now() - began < BOUND_MS, `${this.where}: no warning after ${BOUND_MS} ms`);
      this.check();
      await sleep(50);
    }
    await sleep(WARN_AFTER_MS + 600);
    this.check();
    assert.deepEqual(
      this.warnings.map((warning) => isKedgeError(warning) && warning.code),
      ['ERR_KEDGE_IDENTITY'],
      `${this.where}: one warning for one bad state`,
    );
    assert.match(this.warnings[0]!.message, new RegExp(`serial ${serial} stays in use`));
  }

  async end(): Promise<void> {
    await this.comesRight();
    for (const end of this.ends) end();
    this.ends = [];
    await this.comesRight();
  }
}

/** What inotify watches for this process, by the kernel's account; they hold no process, so that Node does not tell of them. */
function watched(): number {
  if (process.platform !== 'linux') return 0;
  const descriptors = readdirSync('/proc/self/fdinfo').map((fd) => {
    try {
      return readFileSync(`/proc/self/fdinfo/${fd}`, 'utf8');
    } catch {
      return ''; // That of the look itself.
    }
  });
  return [...descriptors.join('').matchAll(/^inotify wd/gm)].length;
}

describe('pemFiles, by seeded random walks', () => {
  it(`has a pair that fits, the newest good one soon, and one warning for what is wrong (seed ${SEED})`, async (t) => {
    // The first watcher of a process opens a descriptor that stays.
    watch(await tempDir(t)).close();
    const descriptors = () => readdirSync('/proc/self/fd').length;
    const before = descriptors();
    const intervals = new Set<unknown>();
    const { setInterval: set, clearInterval: clear } = globalThis;
    t.mock.method(globalThis, 'setInterval', ((...args: Parameters<typeof set>) => {
      const timer = set(...args);
      intervals.add(timer);
      return timer;
    }) as typeof set);
    t.mock.method(globalThis, 'clearInterval', ((timer: Parameters<typeof clear>[0]) => {
      intervals.delete(timer);
      clear(timer);
    }) as typeof clear);
    const checkLeaks = trackLeaks();
    let steps = 0;
    await Promise.all(
      Array.from({ length: WALKS }, async (_, i) => {
        const walk = new Walk(await tempDir(t), SEED + i);
        for (; steps < STEPS; steps += 1) await walk.step();
        await walk.end();
      }),
    );
    await sleep(WARN_AFTER_MS + 100);
    await checkLeaks();
    assert.deepEqual([watched(), intervals.size], [0, 0], 'a watch is left');
    if (process.platform === 'linux') assert.ok(descriptors() <= before, 'a descriptor is left');
    t.diagnostic(`seed ${SEED}: ${steps} steps in ${WALKS} walks`);
  });
});
