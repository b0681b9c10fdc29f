import assert from 'node:assert/strict';
import http2 from 'node:http2';
import { describe, it } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { startKedge } from '../helpers/kedge.ts';
import { rotating } from '../helpers/rotating.ts';

const failover = { breaker: { failures: 1, backoffMs: 60_000, maxBackoffMs: 60_000 } };

describe('the breaker', () => {
  it('closes with warm(), after which the kedge has greeted us', async (t) => {
    let isDown = true;
    const kedge = await startKedge(t, {
      onTcp: (socket) => {
        if (isDown) socket.destroy();
        return isDown;
      },
    });
    const dialer = kedge.dialer({ failover });
    await assert.rejects(dialer.fetch('http://a.us1/'));
    isDown = false;
    await dialer.warm('http://a.us1/');
    assert.equal(dialer.stats().kedges[0]!.breaker, 'closed');
  });

  it('does not open when we close a connection that nobody needs before the SETTINGS are here', async (t) => {
    const h2 = http2.createServer();
    const kedge = await startKedge(t, { onH2: (socket) => void setTimeout(() => h2.emit('connection', socket), 400) });
    const identity = rotating(kedge);
    const dialer = kedge.dialer({ identity, failover });
    await assert.rejects(dialer.fetch('http://a.us1/', { signal: AbortSignal.timeout(200) }));
    await identity.rotate();
    await sleep(50);
    const { breaker, failures } = dialer.stats().kedges[0]!;
    assert.deepEqual({ breaker, failures }, { breaker: 'closed', failures: 0 });
  });
});
