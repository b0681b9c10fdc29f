import { spawn } from 'node:child_process';
import { once } from 'node:events';
import net from 'node:net';
import type { TestContext } from 'node:test';

const LISTENER = `
  const server = require('node:net').createServer().listen({ host: '127.0.0.1', port: 0, backlog: 1 }, () => {
    process.stdout.write(String(server.address().port));
  });`;
/** More than the kernel queues for a listener with a backlog of one. */
const FILLERS = 8;

/** A port that never answers a SYN: its owner is stopped, and the kernel's queue of connections is full. Linux only. */
export async function startBlackHole(t: TestContext): Promise<{ port: number; url: string; name: string }> {
  const owner = spawn(process.execPath, ['-e', LISTENER], { stdio: ['ignore', 'pipe', 'inherit'] });
  const sockets: net.Socket[] = [];
  t.after(() => {
    for (const socket of sockets) socket.destroy();
    owner.kill('SIGKILL');
  });
  const [output] = (await once(owner.stdout, 'data')) as [Buffer];
  const port = Number(output.toString());
  owner.kill('SIGSTOP');
  for (let i = 0; i < FILLERS; i += 1) {
    const socket = net.connect({ host: '127.0.0.1', port });
    socket.on('error', () => {});
    sockets.push(socket);
  }
  await new Promise((resolve) => setTimeout(resolve, 50));
  return { port, url: `https://127.0.0.1:${port}`, name: `127.0.0.1:${port}` };
}

/** A TCP relay to `port` that lets nobody through before `open()`. */
export async function startGate(t: TestContext, port: number): Promise<{ url: string; open: () => void }> {
  const { promise: opened, resolve: open } = Promise.withResolvers<void>();
  const sockets = new Set<net.Socket>();
  const server = net.createServer(async (socket) => {
    sockets.add(socket);
    socket.on('error', () => {});
    await opened;
    const onward = net.connect({ host: '127.0.0.1', port });
    sockets.add(onward);
    onward.on('error', () => socket.destroy());
    socket.pipe(onward).pipe(socket);
  });
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
  t.after(() => {
    for (const socket of sockets) socket.destroy();
    server.close();
  });
  return { url: `https://127.0.0.1:${(server.address() as net.AddressInfo).port}`, open };
}
