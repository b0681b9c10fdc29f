import { type FSWatcher, watch } from 'node:fs';
import { dirname } from 'node:path';
import { type FileState, lookAt, readRegularFile } from '../read-file.ts';
import { debug } from '../support/debug.ts';
import { isKedgeError, KedgeError } from '../support/errors.ts';
import { hide } from '../support/redact.ts';
import type { AnySnapshot, Identity } from './identity.ts';
import { Listeners } from './listeners.ts';
import { sameCredentials } from './snapshot.ts';

/** How an identity is made of files. */
export interface FilesIdentityInit<Name extends string, Snapshot extends AnySnapshot> {
  /** What each file is, and where. */
  readonly paths: Readonly<Partial<Record<Name, string>>>;
  /** Makes a snapshot of what the files held at one moment; throws when they do not fit together. */
  readonly snapshot: (contents: Readonly<Partial<Record<Name, Buffer>>>) => Snapshot;
  readonly onWarning: (warning: Error) => void;
}

/** Writers change several files in turn: they are read when nothing has changed for this long, in ms. */
const SETTLE_MS = 30;
/** How often the files are looked at besides: some file systems notify nobody. In ms. */
const POLL_MS = 500;
/** How long a problem lasts before it is worth a warning, in ms. */
const WARN_AFTER_MS = 1000;
/** Reads that begin again because a file changed in between. */
const MAX_READS = 20;

/**
 * A client certificate in files that change under the process. Read by the first use, watched while somebody subscribes.
 * All files are read as they were at one moment, and published only when they fit together; until then the last good
 * snapshot serves. It is the directories that are watched, because files are replaced rather than written: Kubernetes
 * swaps a symbolic link beside them.
 */
export class FilesIdentity<Name extends string, Snapshot extends AnySnapshot> implements Identity<Snapshot> {
  private readonly init: FilesIdentityInit<Name, Snapshot>;
  private readonly listeners = new Listeners();
  private good: Snapshot | undefined;
  /** Of the files as they were when all of them could last be read, whether they fitted together or not. */
  private seen = '';
  private problem: Error | undefined;
  private warned = '';
  private warning: NodeJS.Timeout | undefined;
  private watchers: FSWatcher[] = [];
  private poll: NodeJS.Timeout | undefined;
  private settle: NodeJS.Timeout | undefined;

  constructor(init: FilesIdentityInit<Name, Snapshot>) {
    this.init = init;
    hide(this, `Identity(${Object.values(init.paths).join(', ')})`);
  }

  /** @throws {@link KedgeError} `ERR_KEDGE_IDENTITY` while there has never been a good one */
  current(): Snapshot {
    if (this.good === undefined) this.good = this.read();
    // While nobody watches, whoever asks looks.
    else if (this.listeners.size === 0) this.refresh();
    return this.good;
  }

  subscribe(onChange: () => void): () => void {
    const end = this.listeners.add(onChange);
    if (this.listeners.size === 1) this.start();
    return () => {
      if (end() && this.listeners.size === 0) this.stop();
    };
  }

  private start(): void {
    for (const directory of new Set(this.files().map(([, path]) => dirname(path)))) {
      try {
        const watcher = watch(directory, { persistent: false }, () => this.changed());
        watcher.on('error', (error) => debug.identity('%s is not watched: %s', directory, error.message));
        this.watchers.push(watcher);
      } catch (error) {
        debug.identity('%s is not watched: %s', directory, (error as Error).message);
      }
    }
    this.poll = setInterval(() => this.refresh(), POLL_MS).unref();
    this.changed();
  }

  private stop(): void {
    for (const watcher of this.watchers) watcher.close();
    this.watchers = [];
    clearInterval(this.poll);
    clearTimeout(this.settle);
    this.settle = undefined;
    clearTimeout(this.warning);
    this.warning = undefined;
  }

  private changed(): void {
    // Not put off by further changes, or a busy directory would never be read.
    this.settle ??= setTimeout(() => {
      this.settle = undefined;
      this.refresh();
    }, SETTLE_MS).unref();
  }

  private refresh(): void {
    if (this.look().version === this.seen) return;
    let next: Snapshot;
    try {
      next = this.read();
    } catch (error) {
      this.warn(error as Error);
      return;
    }
    clearTimeout(this.warning);
    this.warning = undefined;
    this.warned = '';
    const old = this.good;
    this.good = next;
    if (old !== undefined && sameCredentials(old, next)) return;
    debug.identity('%s: read', nameOf(next));
    this.listeners.notify((cause) => {
      this.init.onWarning(failure('a subscriber failed', cause));
    });
  }

  /** Once for each problem that lasts: files are half-written for a moment, or wrong for a day. */
  private warn(error: Error): void {
    const last = this.good === undefined ? '' : `; ${nameOf(this.good)} stays in use`;
    debug.identity('%s%s', error.message, last);
    this.problem = error;
    this.warning ??= setTimeout(() => {
      this.warning = undefined;
      const { message } = this.problem!;
      if (message === this.warned) return;
      this.warned = message;
      const reason = isKedgeError(this.problem) ? this.problem.reason : message;
      this.init.onWarning(failure(`the files are not used: ${reason}${last}`, this.problem));
    }, WARN_AFTER_MS).unref();
  }

  /** @throws {@link KedgeError} `ERR_KEDGE_IDENTITY` naming the file */
  private read(): Snapshot {
    // A file that could not be read may be readable the next time without having changed: there was no descriptor, say.
    this.seen = '';
    for (let i = 0; i < MAX_READS; i += 1) {
      const before = this.look();
      const contents: Partial<Record<Name, Buffer>> = {};
      for (const [name, path] of this.files()) contents[name] = this.readFile(name, path);
      // Whatever changed meanwhile changed for all: begin again, until one state was there all the time.
      if (this.look().version !== before.version) continue;
      if (before.settled) this.seen = before.version;
      return this.init.snapshot(contents);
    }
    throw failure('the files change faster than they can be read');
  }

  private readFile(name: Name, path: string): Buffer {
    try {
      return readRegularFile(path);
    } catch (cause) {
      const { code } = cause as NodeJS.ErrnoException;
      throw failure(`\`${name}\`: ${path} cannot be read (${code})`, cause);
    }
  }

  private look(): FileState {
    const states = this.files().map(([, path]) => lookAt(path));
    return {
      version: states.map(({ version }) => version).join('|'),
      settled: states.every(({ settled }) => settled),
    };
  }

  private files(): [Name, string][] {
    return Object.entries(this.init.paths).filter(([, path]) => path !== undefined) as [Name, string][];
  }
}

function failure(reason: string, cause?: unknown): KedgeError {
  return new KedgeError('ERR_KEDGE_IDENTITY', reason, { stage: 'tls', cause });
}

function nameOf({ serial }: AnySnapshot): string {
  return serial === undefined ? 'the last one' : `serial ${serial}`;
}
