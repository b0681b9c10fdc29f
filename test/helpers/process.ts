import { type ChildProcess, execFile, spawn } from 'node:child_process';
import { createInterface } from 'node:readline';
import type { TestContext } from 'node:test';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';

export interface SpawnOptions {
  /** Added to this process's own. */
  env?: Readonly<Record<string, string>>;
  /** Another line of Node, such as 22, which npx fetches once. Default: the Node that runs the test. */
  nodeMajor?: number;
}

/** How a process ended: its code, or the signal that ended it. */
export interface Exit {
  code: number | null;
  signal: NodeJS.Signals | null;
}

export interface NodeProcess<Ready> {
  readonly pid: number;
  /** The line of JSON that it printed first. */
  readonly ready: Ready;
  /** Settles when it has ended, in whatever way. */
  readonly exited: Promise<Exit>;
  /** What it has written to stderr, and to stdout after the first line. */
  readonly output: string;
  /** SIGTERM, and SIGKILL where that does not end it; resolves when it has ended. */
  stop(): Promise<Exit>;
  /** SIGKILL: nothing in it runs any more. */
  kill(): Promise<Exit>;
}

/** Runs a program of the project to its end; `out` is stdout and stderr as they came. */
export async function runNode(
  args: readonly string[],
  { env = {}, cwd = ROOT }: { env?: Record<string, string>; cwd?: string } = {},
): Promise<{ status: number | null; out: string }> {
  // A child that has this variable reports to our test runner.
  const { NODE_TEST_CONTEXT: _, ...own } = process.env;
  const child = spawn(process.execPath, args, { cwd, env: { ...own, ...env } });
  running.add(child);
  let out = '';
  for (const stream of [child.stdout, child.stderr]) {
    stream.setEncoding('utf8').on('data', (text: string) => {
      out += text;
    });
  }
  const status = await new Promise<number | null>((resolve) => child.on('close', resolve));
  running.delete(child);
  return { status, out };
}

const ROOT = fileURLToPath(new URL('../..', import.meta.url));
const READY_TIMEOUT_MS = 30_000;
const STOP_TIMEOUT_MS = 5_000;
const running = new Set<ChildProcess>();
const executables = new Map<number, Promise<string>>();

process.on('exit', () => {
  for (const child of running) child.kill('SIGKILL');
});

/**
 * Runs a program, TypeScript or not, in a Node process of its own, and waits until it prints its first line, which is JSON.
 * It is killed when the test is over.
 */
export async function spawnNode<Ready = unknown>(
  t: TestContext,
  file: string | URL,
  args: readonly string[] = [],
  options: SpawnOptions = {},
): Promise<NodeProcess<Ready>> {
  const executable = await nodeExecutable(options.nodeMajor);
  const path = typeof file === 'string' ? file : fileURLToPath(file);
  // A child that has this variable reports to our test runner.
  const { NODE_TEST_CONTEXT: _, ...env } = process.env;
  const child = spawn(executable, [path, ...args], {
    env: { ...env, ...options.env },
    stdio: ['ignore', 'pipe', 'pipe'],
  });
  running.add(child);
  let output = '';
  const ended = Promise.withResolvers<Exit>();
  const ready = Promise.withResolvers<Ready>();
  const fail = (reason: string, cause?: unknown) => {
    ready.reject(new Error(`${path} ${reason}\n${output}`, { cause }));
  };
  child.on('close', (code, signal) => {
    running.delete(child);
    ended.resolve({ code, signal });
    fail(`ended before it was ready, with ${code ?? signal}`);
  });
  child.on('error', (error) => {
    fail('cannot run', error);
    if (child.pid === undefined) ended.resolve({ code: null, signal: null });
  });
  const timer = setTimeout(() => fail(`was not ready within ${READY_TIMEOUT_MS} ms`), READY_TIMEOUT_MS);
  child.stderr.setEncoding('utf8').on('data', (text: string) => {
    output += text;
  });
  let lines = 0;
  createInterface(child.stdout).on('line', (line) => {
    lines += 1;
    if (lines > 1) output += `${line}\n`;
    else {
      try {
        ready.resolve(JSON.parse(line) as Ready);
      } catch (error) {
        fail(`printed no JSON: ${line}`, error);
      }
    }
  });

  const end = async (signal: NodeJS.Signals): Promise<Exit> => {
    if (running.has(child)) child.kill(signal);
    const deadline = setTimeout(() => child.kill('SIGKILL'), STOP_TIMEOUT_MS);
    try {
      return await ended.promise;
    } finally {
      clearTimeout(deadline);
    }
  };
  t.after(() => end('SIGKILL'));
  try {
    const value = await ready.promise;
    return {
      pid: child.pid!,
      ready: value,
      exited: ended.promise,
      get output() {
        return output;
      },
      stop: () => end('SIGTERM'),
      kill: () => end('SIGKILL'),
    };
  } finally {
    clearTimeout(timer);
  }
}

/** The path of the real executable: a signal to npx would not reach its child. */
export function nodeExecutable(major: number | undefined): Promise<string> {
  if (major === undefined || process.versions.node.startsWith(`${major}.`)) return Promise.resolve(process.execPath);
  let found = executables.get(major);
  if (found === undefined) {
    const args = ['--yes', '--package', `node@${major}`, 'node', '--print', 'process.execPath'];
    found = promisify(execFile)('npx', args).then(({ stdout }) => stdout.trim());
    executables.set(major, found);
  }
  return found;
}
