import assert from 'node:assert/strict';
import type { Http2ServerResponse } from 'node:http2';
import { describe, it } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import * as undici from 'undici';
import { startKedge } from '../helpers/kedge.ts';

const CHUNKS = 40;
const CHUNK = Buffer.alloc(16 * 1024, 'x');

describe('an answer with trailers whose reader is slow', () => {
  for (const protocol of ['h2', 'http/1.1']) {
    for (const client of ['fetch', 'undici.request'] as const) {
      it(`arrives whole (${protocol}, ${client})`, async (t) => {
        const kedge = await startKedge(t, {
          alpn: [protocol],
          handler: (_request, response) => {
            response.setHeader('trailer', 'x-end');
            for (let i = 0; i < CHUNKS; i += 1) (response as Http2ServerResponse).write(CHUNK);
            response.addTrailers({ 'x-end': '1' });
            response.end();
          },
        });
        const dialer = kedge.dialer();
        let bytes = 0;
        if (client === 'fetch') {
          const { body } = await dialer.fetch('http://a.us1/');
          await sleep(50);
          for await (const chunk of body!) bytes += chunk.length;
        } else {
          const answer = await undici.request('http://a.us1/', { dispatcher: dialer.dispatcher as undici.Dispatcher });
          await sleep(50);
          for await (const chunk of answer.body) bytes += chunk.length;
          assert.deepEqual({ ...answer.trailers }, { 'x-end': '1' });
        }
        assert.equal(bytes, CHUNKS * CHUNK.length);
      });
    }
  }
});
