import assert from 'node:assert/strict';
import { createHash, randomBytes } from 'node:crypto';
import type { ServerResponse } from 'node:http';
import type { Writable } from 'node:stream';
import { describe, it, type TestContext } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import * as undici from 'undici';
import { sha256, startKedge } from '../helpers/kedge.ts';

const ORIGIN = 'http://orders.us1:8080';
const RETRY = { errorCodes: ['ERR_KEDGE_CONNECTION'], minTimeout: 1, maxTimeout: 10 };
/** More than any buffer or window on the way holds. */
const BODY = randomBytes(24 * 1024 * 1024);
const PART = BODY.length / 3;

for (const protocol of ['h1', 'h2'] as const) {
  describe(`undici's RetryAgent above the dialer, over ${protocol}`, () => {
    /** Loses each connection after a third of the body; knows ranges. */
    const startTiring = async (t: TestContext) => {
      const ranges: unknown[] = [];
      const kedge = await startKedge(t, {
        handler: (request, response) => {
          const stream = response as unknown as Writable;
          stream.on('error', () => {});
          ranges.push(request.headers.range);
          const start = Number(/^bytes=(\d+)-/.exec(String(request.headers.range))?.[1] ?? 0);
          response.setHeader('etag', '"one"');
          response.setHeader('content-length', BODY.length - start);
          if (start > 0) {
            response.statusCode = 206;
            response.setHeader('content-range', `bytes ${start}-${BODY.length - 1}/${BODY.length}`);
          }
          const end = Math.min(start + PART, BODY.length);
          if (end === BODY.length) {
            stream.end(BODY.subarray(start));
            return;
          }
          stream.write(BODY.subarray(start, end));
          const connection = 'stream' in response ? response.stream.session! : (response as ServerResponse).socket!;
          setTimeout(() => connection.destroy(), 150);
        },
      });
      const dialer = kedge.dialer({ http: { protocol } });
      return { ranges, dialer };
    };

    for (const pace of ['at once', 'slowly']) {
      it(`goes on by range where a connection was lost, for a reader who reads ${pace}`, async (t) => {
        const { ranges, dialer } = await startTiring(t);
        // A slow reader gets less from each connection.
        const agent = new undici.RetryAgent(dialer.dispatcher, { ...RETRY, maxRetries: 100 });
        const { body, statusCode } = await agent.request({ origin: ORIGIN, path: '/', method: 'GET' });
        assert.equal(statusCode, 200);
        const hash = createHash('sha256');
        for await (const chunk of body) {
          hash.update(chunk as Buffer);
          if (pace === 'slowly') await sleep(1);
        }
        assert.equal(hash.digest('hex'), sha256(BODY));
        assert.ok(ranges.length >= 3, ranges.join());
        assert.equal(dialer.stats().inFlight, 0);
      });
    }

    it('sends again what was lost before an answer, and tells of the last failure once', async (t) => {
      let calls = 0;
      const kedge = await startKedge(t, {
        handler: (_request, response) => {
          calls += 1;
          const connection = 'stream' in response ? response.stream.session! : (response as ServerResponse).socket!;
          if (calls < 3) connection.destroy();
          else response.end('here');
        },
      });
      const { dispatcher } = kedge.dialer({ http: { protocol } });
      const agent = new undici.RetryAgent(dispatcher, RETRY);
      const { body } = await agent.request({ origin: ORIGIN, path: '/', method: 'GET' });
      assert.equal(await body.text(), 'here');
      assert.equal(calls, 3);
      calls = -100;
      const impatient = new undici.RetryAgent(dispatcher, { ...RETRY, maxRetries: 2 });
      await assert.rejects(impatient.request({ origin: ORIGIN, path: '/', method: 'GET' }), {
        code: 'ERR_KEDGE_CONNECTION',
      });
      // The connection that had served the last one may have been closed for its age: the dialer knows that case.
      assert.ok(calls === -97 || (protocol === 'h1' && calls === -96), `${calls}`);
      const before = calls;
      // Not what may have been acted on.
      await assert.rejects(agent.request({ origin: ORIGIN, path: '/', method: 'POST', body: 'x' }), {
        code: 'ERR_KEDGE_CONNECTION',
      });
      assert.equal(calls, before + 1);
    });
  });
}

it('an answer that ends before its length, without a loss, is told as an invalid one over HTTP/2', async (t) => {
  const kedge = await startKedge(t, {
    handler: (_request, response) => {
      response.setHeader('content-length', 10);
      (response as unknown as Writable).end('short');
    },
  });
  const { dispatcher } = kedge.dialer();
  const { body } = await dispatcher.request({ origin: ORIGIN, path: '/', method: 'GET' });
  await assert.rejects(body.text(), { code: 'ERR_KEDGE_RESPONSE' });
});
