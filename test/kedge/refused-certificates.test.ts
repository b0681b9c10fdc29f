import assert from 'node:assert/strict';
import { describe, it } from 'node:test';
import { Worker } from 'node:worker_threads';
import { request } from 'undici';
import { grpcDialer } from '../../src/grpc/index.ts';
import { createDialer, kedgeErrorOf, pem, single } from '../../src/index.ts';
import { echoClient, unary } from '../helpers/grpc-kedge.ts';
import { authority, KEDGE_NAME } from '../helpers/kedge.ts';

describe('a client certificate that the kedge refuses after the handshake', () => {
  it('is what an upload that is being written is told of, on every wire', async (t) => {
    const ca = await authority();
    const { cert, key } = await ca.issue({ cn: KEDGE_NAME, dns: [KEDGE_NAME] });
    // In a thread of its own, so that it closes connections while this one writes.
    const server = `
      const { parentPort, workerData } = require('node:worker_threads');
      const server = require('node:tls').createServer(workerData);
      server.on('tlsClientError', (_error, socket) => socket.destroy());
      server.listen(0, '127.0.0.1', () => parentPort.postMessage(server.address().port));`;
    const tls = { requestCert: true, rejectUnauthorized: true, ALPNProtocols: ['h2', 'http/1.1'] };
    const worker = new Worker(server, { eval: true, workerData: { cert, key, ca: ca.cert, ...tls } });
    t.after(() => worker.terminate());
    const port = await new Promise<number>((resolve) => worker.once('message', resolve));
    const mapper = single({ kedge: `https://127.0.0.1:${port}`, serverName: KEDGE_NAME });
    const body = Buffer.alloc(5_000_000);
    const codes: Record<string, Set<string>> = { h1: new Set(), h2: new Set(), grpc: new Set() };
    for (let i = 0; i < 25; i += 1) {
      for (const [wire, seen] of Object.entries(codes)) {
        const protocol = wire === 'h1' ? 'h1' : 'h2';
        const dialer = createDialer({ mapper, identity: pem({ ca: ca.cert }), http: { protocol } });
        const client = new (grpcDialer(dialer).wrap(echoClient()))('a.us1:1');
        const post = () => request('http://a.us1/', { dispatcher: dialer.dispatcher, method: 'POST', body });
        const call = wire === 'grpc' ? () => unary(client, 'x'.repeat(3_000_000)) : post;
        const over = await Promise.allSettled([call(), call(), call()]);
        for (const each of over) {
          assert.equal(each.status, 'rejected');
          seen.add(kedgeErrorOf(each.reason)?.code ?? String(each.reason));
        }
        client.close();
        await dialer.destroy();
      }
    }
    for (const [wire, seen] of Object.entries(codes)) {
      assert.deepEqual([...seen], ['ERR_KEDGE_CLIENT_CERTIFICATE'], wire);
    }
  });
});
