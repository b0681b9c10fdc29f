import net, { type AddressInfo } from 'node:net';
import type { TestContext } from 'node:test';

/** A TCP relay to `port` that refuses new connections (`down`), leaves them without an answer (`stalled`), and cuts those there are. */
export async function startRelay(t: TestContext, port: number) {
  const sockets = new Set<net.Socket>();
  const relay = { url: '', is: 'up' as 'up' | 'down' | 'stalled', cut: () => {} };
  relay.cut = () => {
    for (const socket of sockets) socket.destroy();
  };
  const track = (socket: net.Socket) => {
    sockets.add(socket);
    socket.on('error', () => {});
    socket.once('close', () => sockets.delete(socket));
  };
  const server = net.createServer((socket) => {
    track(socket);
    if (relay.is === 'down') socket.destroy();
    if (relay.is !== 'up') return;
    const onward = net.connect(port, '127.0.0.1');
    track(onward);
    onward.once('close', () => socket.destroy());
    socket.once('close', () => onward.destroy());
    socket.pipe(onward).pipe(socket);
  });
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
  relay.url = `https://127.0.0.1:${(server.address() as AddressInfo).port}`;
  t.after(() => {
    relay.cut();
    server.close();
  });
  return relay;
}
