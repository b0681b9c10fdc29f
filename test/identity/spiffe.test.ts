import assert from 'node:assert/strict';
import { createPrivateKey, X509Certificate } from 'node:crypto';
import http2 from 'node:http2';
import net from 'node:net';
import { join } from 'node:path';
import { describe, it, type TestContext } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { inspect } from 'node:util';
import { BinaryWriter } from '@bufbuild/protobuf/wire';
import * as grpc from '@grpc/grpc-js';
import { spiffeIdentity } from '../../src/spiffe/index.ts';
import { authority, startKedge } from '../helpers/kedge.ts';
import { runNode } from '../helpers/process.ts';
import { tempDir } from '../helpers/temp.ts';

const ca = await authority();
const ID = 'spiffe://example.com/ns/shop/sa/orders';

/** `X509SVIDResponse` of workload.proto, with the fields that we do not read as well. */
async function response(...ids: string[]): Promise<{ bytes: Uint8Array; serials: string[] }> {
  const writer = new BinaryWriter();
  const serials: string[] = [];
  const bundle = new X509Certificate(ca.cert).raw;
  for (const id of ids) {
    const { cert, key, serial } = await ca.issue({ cn: 'orders', uri: [id] });
    serials.push(serial);
    writer.tag(1, 2).fork();
    writer.tag(1, 2).string(id);
    // A chain of two, one after the other.
    writer.tag(2, 2).bytes(Buffer.concat([new X509Certificate(cert).raw, bundle]));
    writer.tag(3, 2).bytes(createPrivateKey(key).export({ type: 'pkcs8', format: 'der' }));
    writer.tag(4, 2).bytes(bundle);
    writer.tag(5, 2).string('hint');
    writer.join();
  }
  writer.tag(2, 2).bytes(new Uint8Array([1]));
  writer.tag(9, 0).uint32(300);
  return { bytes: writer.finish(), serials };
}

interface Agent {
  readonly socketPath: string;
  /** Streams that are open. */
  readonly calls: Set<grpc.ServerWritableStream<Buffer, Uint8Array>>;
  send(bytes: Uint8Array): void;
  /** What calls are answered with: a first message, or a status. */
  answer: Uint8Array | Partial<grpc.StatusObject>;
  /** Calls since it was started. */
  asked: number;
  /** As an agent that restarts does. */
  stop(): void;
}

/** A server that speaks the published protocol on a Unix socket, where a SPIRE agent would. */
async function startAgent(
  t: TestContext,
  socketPath: string,
  answer: Agent['answer'] = { code: grpc.status.PERMISSION_DENIED, details: 'no identity issued' },
): Promise<Agent> {
  const calls: Agent['calls'] = new Set();
  const server = new grpc.Server();
  const pass = (value: Uint8Array) => Buffer.from(value);
  server.addService(
    {
      fetch: {
        path: '/SpiffeWorkloadAPI/FetchX509SVID',
        requestStream: false,
        responseStream: true,
        requestSerialize: pass,
        requestDeserialize: pass,
        responseSerialize: pass,
        responseDeserialize: pass,
      },
    },
    {
      fetch: (call: grpc.ServerWritableStream<Buffer, Uint8Array>) => {
        if (call.metadata.get('workload.spiffe.io')[0] !== 'true') {
          call.emit('error', { code: grpc.status.INVALID_ARGUMENT, details: 'security header missing' });
          return;
        }
        calls.add(call);
        call.on('cancelled', () => calls.delete(call));
        agent.asked += 1;
        if (agent.answer instanceof Uint8Array) call.write(agent.answer);
        else call.emit('error', agent.answer);
      },
    },
  );
  await new Promise<void>((resolve, reject) =>
    server.bindAsync(
      socketPath.startsWith('tcp://') ? socketPath.slice(6) : `unix:${socketPath}`,
      grpc.ServerCredentials.createInsecure(),
      (error) => (error === null ? resolve() : reject(error)),
    ),
  );
  t.after(() => server.forceShutdown());
  const agent: Agent = {
    socketPath,
    calls,
    answer,
    asked: 0,
    send: (bytes) => {
      for (const call of calls) call.write(bytes);
    },
    stop: () => server.forceShutdown(),
  };
  return agent;
}

describe('spiffeIdentity', () => {
  it('shows the SVID to the kedge, rotates it as the agent says, and survives its restart', async (t) => {
    const kedge = await startKedge(t);
    const socketPath = join(await tempDir(t), 'agent.sock');
    const [one, two, three] = await Promise.all([response(ID), response(ID), response(ID)]);
    const agent = await startAgent(t, socketPath, one.bytes);
    const warnings: Error[] = [];
    const identity = await spiffeIdentity({ socketPath, onWarning: (warning) => warnings.push(warning) });
    t.after(() => identity.close());
    assert.equal(identity.spiffeId, ID);
    const dialer = kedge.dialer({ identity });
    const serial = async () => {
      assert.equal((await dialer.fetch('http://a.us1/')).status, 200);
      return kedge.seen.at(-1)!.clientSerial;
    };
    assert.equal(await serial(), one.serials[0]);
    agent.send(two.bytes);
    for (let i = 0; i < 100 && identity.current().serial !== two.serials[0]; i += 1) await sleep(10);
    assert.equal(await serial(), two.serials[0]);
    agent.send(new Uint8Array([10, 255, 255]));
    agent.send((await response('spiffe://example.com/other')).bytes.subarray(0, 40));
    await sleep(50);
    assert.equal(await serial(), two.serials[0], 'what cannot be read changes nothing');
    assert.match(warnings.map(({ message }) => message).join(), /cut off; serial .* stays in use/);
    agent.stop();
    await sleep(50);
    assert.equal(await serial(), two.serials[0], 'the last one serves without an agent');
    await startAgent(t, socketPath, three.bytes);
    for (let i = 0; i < 200 && identity.current().serial !== three.serials[0]; i += 1) await sleep(20);
    assert.equal(await serial(), three.serials[0]);
    assert.doesNotMatch(inspect(identity, { depth: 9 }), /PRIVATE/);
  });

  it('takes the identity that is asked for, and stops when it is closed', async (t) => {
    const socketPath = join(await tempDir(t), 'agent.sock');
    const { bytes, serials } = await response('spiffe://example.com/a', ID);
    const agent = await startAgent(t, socketPath, bytes);
    const identity = await spiffeIdentity({ socketPath: `unix:${socketPath}`, spiffeId: ID });
    assert.equal(identity.current().serial, serials[1]);
    identity.close();
    for (let i = 0; i < 100 && agent.calls.size > 0; i += 1) await sleep(10);
    assert.equal(agent.calls.size, 0);
    await assert.rejects(spiffeIdentity({ socketPath, spiffeId: 'spiffe://example.com/none', timeoutMs: 300 }), {
      code: 'ERR_KEDGE_IDENTITY',
      message: /the agent has no spiffe:\/\/example\.com\/none/,
    });
  });

  it('says why there is none', async (t) => {
    const socketPath = join(await tempDir(t), 'agent.sock');
    await assert.rejects(spiffeIdentity({ socketPath, timeoutMs: 200 }), {
      code: 'ERR_KEDGE_IDENTITY',
      message: /200 ms/,
    });
    await startAgent(t, socketPath);
    await assert.rejects(spiffeIdentity({ socketPath, timeoutMs: 400 }), { message: /no identity issued/ });
    await assert.rejects(spiffeIdentity({ socketPath: '' }), { message: /SPIFFE_ENDPOINT_SOCKET/ });
  });

  it('tells nobody of a certificate that is the same, and all of one that is not', async (t) => {
    const socketPath = join(await tempDir(t), 'agent.sock');
    const [one, two] = await Promise.all([response(ID), response(ID)]);
    const agent = await startAgent(t, socketPath, one.bytes);
    const warnings: Error[] = [];
    const identity = await spiffeIdentity({ socketPath, onWarning: (warning) => warnings.push(warning) });
    t.after(() => identity.close());
    const first = identity.current();
    let told = 0;
    identity.subscribe(() => {
      throw new Error('of the subscriber');
    });
    const end = identity.subscribe(() => {
      told += 1;
    });
    for (let i = 0; i < 5; i += 1) agent.send(one.bytes);
    agent.stop();
    const restarted = await startAgent(t, socketPath, one.bytes);
    await until(() => restarted.asked === 1);
    await sleep(50);
    assert.deepEqual([told, warnings.length], [0, 0]);
    assert.equal(identity.current(), first);
    restarted.send(two.bytes);
    await until(() => told === 1);
    assert.equal(identity.current().serial, two.serials[0]);
    assert.match(String(warnings[0]!.cause), /of the subscriber/);
    end();
    end();
    restarted.send(one.bytes);
    await until(() => identity.current().serial === one.serials[0]);
    assert.equal(told, 1);
  });

  it('warns once when the agent takes the identity back, goes on asking, and takes the next one', async (t) => {
    const socketPath = join(await tempDir(t), 'agent.sock');
    const [one, none, two] = await Promise.all([response(ID), response('spiffe://example.com/other'), response(ID)]);
    const agent = await startAgent(t, socketPath, one.bytes);
    const warnings: string[] = [];
    const onWarning = ({ message }: Error) => warnings.push(message);
    const identity = await spiffeIdentity({ socketPath, spiffeId: ID, onWarning });
    t.after(() => identity.close());
    for (let i = 0; i < 3; i += 1) agent.send(none.bytes);
    await until(() => warnings.length === 1);
    agent.answer = { code: grpc.status.PERMISSION_DENIED, details: 'taken back' };
    for (const call of agent.calls) call.emit('error', agent.answer);
    await until(() => agent.asked >= 3);
    agent.answer = two.bytes;
    await until(() => identity.current().serial === two.serials[0]);
    assert.equal(warnings.length, 2, warnings.join());
    assert.match(warnings[0]!, /the agent has no spiffe:.*serial [0-9A-F]+ stays in use until/);
    assert.match(warnings[1]!, /the agent gives no identity: taken back; serial/);
  });

  it('does not ask again what the agent refuses for good', async (t) => {
    for (const code of [grpc.status.INVALID_ARGUMENT, grpc.status.UNIMPLEMENTED]) {
      const socketPath = join(await tempDir(t), 'agent.sock');
      const agent = await startAgent(t, socketPath, { code, details: 'not 100% of it' });
      const began = performance.now();
      await assert.rejects(spiffeIdentity({ socketPath }), {
        code: 'ERR_KEDGE_IDENTITY',
        message: /refused the call: not 100% of it/,
      });
      assert.ok(performance.now() - began < 5000, 'not by the deadline');
      await sleep(700);
      assert.equal(agent.asked, 1);
    }
  });

  it('holds no process, neither with an agent nor without, and takes a tcp: URI', async (t) => {
    const { bytes } = await response(ID);
    const socketPath = join(await tempDir(t), 'agent.sock');
    const port = await freePort();
    for (const agent of [
      await startAgent(t, socketPath, bytes),
      await startAgent(t, `tcp://127.0.0.1:${port}`, bytes),
    ]) {
      const program = `
        import { spiffeIdentity } from ${JSON.stringify(new URL('../../src/spiffe/index.ts', import.meta.url).href)};
        const identity = await spiffeIdentity({ onWarning() {} });
        identity.subscribe(() => {});
        if (process.env.WAIT) setTimeout(() => {}, 1500);
        console.log(identity.spiffeId);`;
      const args = ['--input-type=module', '--eval', program];
      const env = { SPIFFE_ENDPOINT_SOCKET: agent.socketPath.replace(/^\//, 'unix:///') };
      const [first, second] = await Promise.all([
        runNode(args, { env }),
        // The agent stops while it waits, so that it is calling again when nothing else is left.
        runNode(args, { env: { ...env, WAIT: '1' } }),
        until(() => agent.asked === 2).then(() => sleep(500).then(() => agent.stop())),
      ]);
      for (const { status, out } of [first, second]) assert.deepEqual([status, out.trim()], [0, ID]);
    }
  });

  it('survives an agent that speaks something else', async (t) => {
    const dir = await tempDir(t);
    const good = await response(ID);
    const frame = (bytes: Uint8Array, flag = 0) => {
      const head = Buffer.alloc(5);
      head[0] = flag;
      head.writeUInt32BE(bytes.length, 1);
      return Buffer.concat([head, bytes]);
    };
    const ok = { ':status': 200, 'content-type': 'application/grpc' };
    const answers: Record<string, [RegExp, (stream: http2.ServerHttp2Stream) => void]> = {
      'a page': [/the agent answered 404/, (stream) => stream.respond({ ':status': 404 }, { endStream: true })],
      'nothing more': [/the stream ended/, (stream) => stream.respond(ok, { endStream: true })],
      'a compressed message': [
        /compressed or too long/,
        (stream) => {
          stream.respond(ok);
          stream.write(frame(good.bytes, 1));
        },
      ],
      'a message without end': [
        /compressed or too long/,
        (stream) => {
          stream.respond(ok);
          stream.write(Buffer.from([0, 255, 255, 255, 255]));
        },
      ],
      'half a message': [
        /the stream ended|closed/,
        (stream) => {
          stream.respond(ok);
          stream.end(frame(good.bytes).subarray(0, 100));
        },
      ],
      'a reset': [/./, (stream) => stream.close(http2.constants.NGHTTP2_INTERNAL_ERROR)],
    };
    for (const [what, [message, answer]] of Object.entries(answers)) {
      const socketPath = join(dir, `${what.replaceAll(' ', '-')}.sock`);
      const server = http2.createServer();
      let asked = 0;
      server.on('stream', (stream) => {
        stream.on('error', () => {});
        asked += 1;
        answer(stream);
      });
      await new Promise<void>((resolve) => server.listen(socketPath, resolve));
      t.after(() => server.close());
      await assert.rejects(spiffeIdentity({ socketPath, timeoutMs: 900 }), { message }, what);
      assert.ok(asked >= 2 && asked <= 5, `${what}: asked ${asked} times`);
    }
    // Byte by byte, two at once.
    const server = http2.createServer();
    const two = await response(ID);
    server.on('stream', async (stream) => {
      stream.on('error', () => {});
      stream.respond(ok);
      for (const byte of frame(good.bytes)) {
        stream.write(Buffer.from([byte]));
        await new Promise(setImmediate);
      }
      stream.write(Buffer.concat([frame(good.bytes), frame(two.bytes)]));
    });
    const socketPath = join(dir, 'slow.sock');
    await new Promise<void>((resolve) => server.listen(socketPath, resolve));
    t.after(() => server.close());
    const identity = await spiffeIdentity({ socketPath });
    await until(() => identity.current().serial === two.serials[0]);
    identity.close();
  });
});

async function until(condition: () => boolean): Promise<void> {
  for (let i = 0; i < 500 && !condition(); i += 1) await sleep(10);
  assert.ok(condition(), 'within 5 s');
}

async function freePort(): Promise<number> {
  const server = net.createServer();
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
  const { port } = server.address() as net.AddressInfo;
  await new Promise((resolve) => server.close(resolve));
  return port;
}
