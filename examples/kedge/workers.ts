import cluster, { type Worker } from 'node:cluster';
import { once } from 'node:events';
import { AggregatorRegistry } from 'prom-client';
import type { Files } from './files.ts';
import { registry } from './metrics.ts';
import type { Program } from './program.ts';

/** What the primary process asks of a worker, and what it is answered. */
interface Question {
  readonly id: number;
  readonly call: 'start' | 'check' | 'take' | 'routes' | 'metrics';
  readonly files: Partial<Files>;
}
interface Answer {
  readonly id: number;
  readonly result?: unknown;
  readonly error?: string;
}

const AGAIN_MS = 1_000;

/**
 * Kedges in `count` processes on the same ports. What one of them finds wrong is taken by none; one that ends is replaced, by
 * one with the files that the others have. Rejects when the first ones cannot start.
 */
export async function startWorkers(count: number, files: Files, log: (message: string) => void): Promise<Program> {
  const serving = new Set<Worker>();
  const waiting = new Map<number, { readonly worker: Worker; settle(answer: Answer): void }>();
  let known = files;
  let isEnding = false;
  let lastId = 0;

  /** Undefined where the worker ended before it answered. */
  const ask = (worker: Worker, call: Question['call'], files: Partial<Files> = {}) =>
    new Promise<unknown>((resolve, reject) => {
      lastId += 1;
      const id = lastId;
      const settle = ({ result, error }: Answer) => {
        waiting.delete(id);
        if (error === undefined) resolve(result);
        else reject(new Error(error));
      };
      waiting.set(id, { worker, settle });
      worker.send({ id, call, files } satisfies Question, (error) => error !== null && settle({ id }));
    });
  const all = (call: Question['call'], files?: Partial<Files>) => {
    if (serving.size === 0) throw new Error('there is no worker at the moment');
    return Promise.all([...serving].map((worker) => ask(worker, call, files)));
  };
  const start = async () => {
    let own = known;
    const worker = cluster.fork();
    const ports = (await ask(worker, 'start', own)) as Program['ports'] | undefined;
    if (ports === undefined) throw new Error('a worker ended before it was ready');
    while (own !== known) {
      own = known;
      await ask(worker, 'take', own);
    }
    serving.add(worker);
    return ports;
  };
  cluster.on('message', (_worker, answer: Answer) => waiting.get(answer.id)?.settle(answer));
  cluster.on('exit', (worker, code, signal) => {
    const wasServing = serving.delete(worker);
    for (const each of waiting.values()) if (each.worker === worker) each.settle({ id: 0 });
    if (isEnding) return;
    log(`worker ${worker.process.pid} ended with ${signal ?? code}: another one starts`);
    const again = () =>
      start().then(
        () => log(`${serving.size} workers serve`),
        ({ message }: Error) => log(`a worker cannot start: ${message}`),
      );
    setTimeout(again, wasServing ? 0 : AGAIN_MS);
  });

  const [ports] = await Promise.all(Array.from({ length: count }, start));
  return {
    ports: ports!,
    get pids() {
      return [...serving].map((worker) => worker.process.pid!);
    },
    check: (changed) => all('check', changed),
    take: (changed) => {
      known = { ...known, ...changed };
      return all('take', changed);
    },
    drain: async () => {
      isEnding = true;
      const workers = Object.values(cluster.workers ?? {}).filter((worker) => worker !== undefined);
      const ended = workers.map((worker) => once(worker, 'exit'));
      for (const worker of workers) worker.process.kill('SIGTERM');
      await Promise.all(ended);
    },
    routes: async () => (await all('routes'))[0],
    metrics: async () => {
      const each = (await all('metrics')).filter((one) => one !== undefined) as object[][];
      return AggregatorRegistry.aggregate(each).metrics();
    },
  };
}

/** The worker's side: it starts when it is told with which files. Returns what lets it finish. */
export function serveAsWorker(startProgram: (files: Files) => Promise<Program>): () => Promise<void> | undefined {
  let program: Program | undefined;
  const calls: Record<Question['call'], (files: Partial<Files>) => unknown> = {
    start: async (files) => {
      program = await startProgram(files as Files);
      return program.ports;
    },
    check: (files) => program!.check(files),
    take: (files) => program!.take(files),
    routes: () => program!.routes(),
    metrics: () => registry.getMetricsAsJSON(),
  };
  process.on('message', async ({ id, call, files }: Question) => {
    try {
      const result = await calls[call](files);
      process.send!({ id, result } satisfies Answer);
    } catch (error) {
      const answer: Answer = { id, error: (error as Error).message };
      process.send!(answer, () => call === 'start' && process.exit(2));
    }
  });
  return () => program?.drain();
}
