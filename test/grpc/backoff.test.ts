import assert from 'node:assert/strict';
import { describe, it } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { status } from '@grpc/grpc-js';
import { grpcDialer } from '../../src/grpc/index.ts';
import { echoClient, startGrpcKedge } from '../helpers/grpc-kedge.ts';

describe('a gRPC call between two attempts of its retry policy', () => {
  it('ends with the dialer, not when the next is due', async (t) => {
    const kedge = await startGrpcKedge(t, {
      unary: (_call, answer) => answer({ code: status.UNAVAILABLE, details: 'no' }),
    });
    const dialer = kedge.dialer();
    const retryPolicy = {
      maxAttempts: 5,
      initialBackoff: '5s',
      maxBackoff: '5s',
      backoffMultiplier: 1,
      retryableStatusCodes: ['UNAVAILABLE'],
    };
    const config = JSON.stringify({ methodConfig: [{ name: [{}], retryPolicy }] });
    const client = new (grpcDialer(dialer).wrap(echoClient()))('a.us1:1', undefined, { 'grpc.service_config': config });
    let isOver = false;
    client.unary({ text: 'x' }, () => {
      isOver = true;
    });
    while (kedge.calls.length === 0) await sleep(10);
    await sleep(100);
    await dialer.destroy();
    await sleep(100);
    assert.deepEqual({ isOver, inFlight: dialer.stats().inFlight }, { isOver: true, inFlight: 0 });
  });
});
