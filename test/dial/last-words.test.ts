import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { describe, it } from 'node:test';
import tls from 'node:tls';
import { createAuthority } from '../../examples/pki.ts';
import { readBeforeEnd } from '../../src/dial/last-words.ts';

/** Talks without a pause, in a process of its own: what it says arrives whatever the other end is doing. */
const TALKER = `
  const server = require('node:tls').createServer(JSON.parse(process.env.KEY_PAIR), (socket) => {
    socket.on('error', () => {});
    const talk = () => {
      if (socket.destroyed) return;
      for (let i = 0; i < 5; i += 1) socket.write(Buffer.alloc(143));
      setImmediate(talk);
    };
    talk();
  });
  server.listen(0, '127.0.0.1', () => process.stdout.write(String(server.address().port)));`;

describe('a connection that ends by a failed write', () => {
  it('ends, and not the process, while there is more to be read than a last word', async (t) => {
    const thrown: unknown[] = [];
    const note = (error: unknown) => thrown.push(error);
    process.on('uncaughtException', note);
    t.after(() => process.off('uncaughtException', note));
    const ca = await createAuthority('test CA');
    const { cert, key } = await ca.issue({ cn: 'talker', dns: ['talker.test'] });
    const env = { ...process.env, KEY_PAIR: JSON.stringify({ cert, key }) };
    const talker = spawn(process.execPath, ['-e', TALKER], { stdio: ['ignore', 'pipe', 'inherit'], env });
    t.after(() => talker.kill('SIGKILL'));
    const [port] = (await once(talker.stdout, 'data')) as [Buffer];
    const options = { host: '127.0.0.1', port: Number(port), servername: 'talker.test', ca: ca.cert };
    for (let i = 0; i < 100; i += 1) {
      const socket = tls.connect(options);
      readBeforeEnd(socket);
      socket.on('error', () => {}).on('data', () => {});
      await once(socket, 'secureConnect');
      await once(socket, 'data');
      const closed = new Promise((resolve) => socket.once('close', resolve));
      // As Node ends a socket of which a write has failed.
      socket.destroy(Object.assign(new Error('write EPIPE'), { code: 'EPIPE', syscall: 'write' }));
      await closed;
    }
    assert.deepEqual(thrown, []);
  });
});
