import { type ChildProcess, spawn, spawnSync } from 'node:child_process';
import { once } from 'node:events';
import { readdirSync, readFileSync, writeFileSync } from 'node:fs';
import net from 'node:net';
import { join } from 'node:path';
import { createInterface } from 'node:readline';

/** A process that is measured. */
export interface Program {
  readonly port: number;
  /** CPU time of it so far, in microseconds. */
  cpu(): number;
  stop(): void;
}

export function hasNginx(): boolean {
  const isThere = spawnSync('nginx', ['-v']).status === 0;
  if (!isThere) console.error('rows with nginx are left out: test/bench/peers.sh installs it');
  return isThere;
}

export async function startNginx(folder: string, name: string, http: (port: number) => string): Promise<Program> {
  const port = await freePort();
  const config = join(folder, `${name}.conf`);
  const paths = ['client_body', 'proxy', 'fastcgi', 'uwsgi', 'scgi'].map(
    (kind) => `${kind}_temp_path ${folder}/${name}-${kind};`,
  );
  writeFileSync(
    config,
    `daemon off; master_process off; worker_processes 1; error_log stderr warn; pid ${folder}/${name}.pid;
     events { worker_connections 1024; }
     http { access_log off; ${paths.join(' ')} ${http(port)} }`,
  );
  const child = spawn('nginx', ['-p', folder, '-c', config], { stdio: ['ignore', 'inherit', 'inherit'] });
  await listening(port);
  return program(child, port);
}

/** A program of this project. */
export async function startProgram(path: string, args: string[]): Promise<Program> {
  const child = spawn(process.execPath, [path, ...args, '--log_level=error'], { stdio: ['ignore', 'pipe', 'inherit'] });
  const [line] = (await once(createInterface({ input: child.stdout }), 'line')) as [string];
  return program(child, (JSON.parse(line) as { port: number }).port);
}

function program(child: ChildProcess, port: number): Program {
  return {
    port,
    cpu: () => {
      // Documentation/scheduler/sched-stats.rst: nanoseconds on a CPU, of each thread.
      const tasks = readdirSync(`/proc/${child.pid}/task`);
      const times = tasks.map(
        (task) => readFileSync(`/proc/${child.pid}/task/${task}/schedstat`, 'utf8').split(' ')[0],
      );
      return times.reduce((sum, time) => sum + Number(time), 0) / 1000;
    },
    stop: () => void child.kill(),
  };
}

/** A program that says nothing when it is ready. */
export async function startBinary(path: string, port: number, args: string[]): Promise<Program> {
  const child = spawn(path, args, { stdio: 'ignore' });
  await listening(port);
  return program(child, port);
}

export async function freePort(): Promise<number> {
  const listener = net.createServer().listen(0, '127.0.0.1');
  await once(listener, 'listening');
  const { port } = listener.address() as net.AddressInfo;
  await new Promise((resolve) => listener.close(resolve));
  return port;
}

async function listening(port: number): Promise<void> {
  for (let i = 0; i < 200; i += 1) {
    const isUp = await new Promise<boolean>((resolve) => {
      const socket = net.connect(port, '127.0.0.1', () => resolve(true));
      socket.on('error', () => resolve(false));
      socket.on('connect', () => socket.destroy());
    });
    if (isUp) return;
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
  throw new Error(`nothing listens on port ${port}`);
}
