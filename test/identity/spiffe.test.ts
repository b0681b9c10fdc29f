import assert from 'node:assert/strict';
import { createPrivateKey, X509Certificate } from 'node:crypto';
import { join } from 'node:path';
import { describe, it, type TestContext } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { inspect } from 'node:util';
import { BinaryWriter } from '@bufbuild/protobuf/wire';
import * as grpc from '@grpc/grpc-js';
import { spiffeIdentity } from '../../src/spiffe/index.ts';
import { authority, startKedge } from '../helpers/kedge.ts';
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
  /** As an agent that restarts does. */
  stop(): void;
}

/** A server that speaks the published protocol on a Unix socket, where a SPIRE agent would. */
async function startAgent(t: TestContext, socketPath: string, first?: Uint8Array): Promise<Agent> {
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
        if (first === undefined)
          call.emit('error', { code: grpc.status.PERMISSION_DENIED, details: 'no identity issued' });
        else call.write(first);
      },
    },
  );
  await new Promise<void>((resolve, reject) =>
    server.bindAsync(`unix:${socketPath}`, grpc.ServerCredentials.createInsecure(), (error) =>
      error === null ? resolve() : reject(error),
    ),
  );
  t.after(() => server.forceShutdown());
  return {
    socketPath,
    calls,
    send: (bytes) => {
      for (const call of calls) call.write(bytes);
    },
    stop: () => server.forceShutdown(),
  };
}

describe('spiffeIdentity', () => {
  it('shows the SVID to the kedge, rotates it as the agent says, and survives its restart', async (t) => {
    const kedge = await startKedge(t);
    const socketPath = join(await tempDir(t), 'agent.sock');
    const [one, two, three] = await Promise.all([response(ID), response(ID), response(ID)]);
    const agent = await startAgent(t, socketPath, one.bytes);
    const identity = await spiffeIdentity({ socketPath });
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
});
