import assert from 'node:assert/strict';
import http2, { type ClientHttp2Stream, type Http2ServerRequest } from 'node:http2';
import type { AddressInfo } from 'node:net';
import { Readable } from 'node:stream';
import { describe, it, type TestContext } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import * as undici from 'undici';
import { Uploads } from '../../src/http/uploads.ts';
import { type KedgeHandler, sha256, startKedge, type TestKedge } from '../helpers/kedge.ts';

const TARGET = 'http://orders.us1:8080/';
const MIB = 1024 * 1024;

/** Different everywhere, so that a piece in the wrong place shows. */
function bytes(length: number): Buffer {
  const buffer = Buffer.alloc(length);
  for (let at = 0; at + 4 <= length; at += 4) buffer.writeUInt32LE(at, at);
  return buffer;
}

/** Turns uploads to `/early` down before it has read them, never reads those to `/stuck`, and takes all others. */
const impatient: KedgeHandler = (request, response) => {
  request.on('error', () => {});
  const { stream } = request as Http2ServerRequest;
  stream.on('error', () => {});
  if (request.url === '/stuck') return;
  if (request.url === '/early') {
    stream.respond({ ':status': 413 });
    stream.end('too large');
    // RFC 9113 §8.1: the answer is complete, so the rest of the request is not asked for.
    stream.on('finish', () => stream.close(0));
    return;
  }
  let size = 0;
  request.on('data', (chunk: Buffer) => {
    size += chunk.length;
  });
  request.on('end', () => response.end(`${size}`));
};

async function ok(dispatcher: undici.Dispatcher, count: number): Promise<void> {
  const get = async () => (await undici.request(TARGET, { dispatcher })).body.text();
  assert.deepEqual(await Promise.all(Array.from({ length: count }, get)), Array(count).fill('0'));
}

function dial(t: TestContext, kedge: TestKedge) {
  const dialer = kedge.dialer({ http: { protocol: 'h2', connections: 1 } });
  t.after(() => dialer.destroy());
  return dialer.dispatcher;
}

describe('a large upload over HTTP/2 that is answered before it is read', () => {
  const forms: [string, (size: number) => undici.Dispatcher.DispatchOptions['body']][] = [
    ['Buffer', (size) => Buffer.alloc(size)],
    ['string', (size) => 'x'.repeat(size)],
    ['ArrayBuffer', (size) => new ArrayBuffer(size) as never],
    ['stream of large chunks', (size) => Readable.from([Buffer.alloc(size / 2), Buffer.alloc(size / 2)])],
    ['Blob', (size) => new Blob([Buffer.alloc(size)]) as never],
  ];
  for (const [form, of] of forms) {
    it(`gets its answer, and costs nobody else a call (${form})`, async (t) => {
      const kedge = await startKedge(t, { handler: impatient });
      const dispatcher = dial(t, kedge);
      for (const size of [12 * MIB, 64 * MIB]) {
        const upload = { dispatcher, method: 'POST', body: of(size) } as const;
        const { statusCode, body } = await undici.request(`${TARGET}early`, upload);
        assert.equal(statusCode, 413);
        assert.equal(await body.text(), 'too large');
        await ok(dispatcher, 100);
      }
      assert.equal(kedge.handshakes, 1);
    });
  }

  it('gets its answer through fetch', async (t) => {
    const kedge = await startKedge(t, { handler: impatient });
    const dispatcher = dial(t, kedge);
    const init = { dispatcher: dispatcher as never, method: 'POST', body: Buffer.alloc(12 * MIB) };
    const response = await fetch(`${TARGET}early`, init);
    assert.equal(response.status, 413);
    assert.equal(await response.text(), 'too large');
    await ok(dispatcher, 100);
  });

  it('leaves nothing behind that adds up', async (t) => {
    const kedge = await startKedge(t, { handler: impatient });
    const dispatcher = dial(t, kedge);
    const upload = { dispatcher, method: 'POST', body: Buffer.alloc(MIB) } as const;
    for (let i = 0; i < 300; i += 1) {
      const { statusCode, body } = await undici.request(`${TARGET}early`, upload);
      assert.equal(statusCode, 413);
      await body.dump();
      if (i % 20 === 19) await ok(dispatcher, 5);
    }
    assert.ok(kedge.handshakes < 15, `${kedge.handshakes} connections`);
  });
});

describe('a large upload over HTTP/2 that its caller gives up', () => {
  it('costs nobody else a call', async (t) => {
    const kedge = await startKedge(t, { handler: impatient });
    const dispatcher = dial(t, kedge);
    await ok(dispatcher, 1);
    const body = Buffer.alloc(32 * MIB);
    const abort = new AbortController();
    const upload = undici.request(`${TARGET}stuck`, { dispatcher, method: 'POST', body, signal: abort.signal });
    upload.catch(() => {});
    await sleep(50);
    await ok(dispatcher, 20);
    abort.abort();
    await assert.rejects(upload, { name: 'AbortError' });
    await ok(dispatcher, 40);
    const signal = AbortSignal.timeout(100);
    await assert.rejects(fetch(`${TARGET}stuck`, { dispatcher, method: 'POST', body, signal }), {
      name: 'TimeoutError',
    });
    await ok(dispatcher, 40);
    assert.equal(kedge.handshakes, 1);
  });

  it('leaves nothing behind that adds up', async (t) => {
    const kedge = await startKedge(t, { handler: impatient });
    const dispatcher = dial(t, kedge);
    await ok(dispatcher, 1);
    for (let round = 0; round < 30; round += 1) {
      const abort = new AbortController();
      const uploads = Array.from({ length: 10 }, () => {
        const options = { dispatcher, method: 'POST', body: Buffer.alloc(MIB), signal: abort.signal } as const;
        return assert.rejects(undici.request(`${TARGET}stuck`, options), { name: 'AbortError' });
      });
      await sleep(10);
      abort.abort();
      await Promise.all(uploads);
      await ok(dispatcher, 5);
    }
  });
});

describe('uploads over HTTP/2', () => {
  it('arrive whole in every form, with their length and beside each other', async (t) => {
    const kedge = await startKedge(t);
    const dispatcher = dial(t, kedge);
    const body = bytes(3 * MIB + 5);
    const text = body.toString('latin1');
    const view = new Uint16Array(body.buffer, 1024, MIB);
    const form = new undici.FormData();
    form.set('file', new Blob([body]), 'large');
    form.set('text', 'é'.repeat(MIB));
    const forms: [undici.Dispatcher.DispatchOptions['body'], Uint8Array | string][] = [
      [body, body],
      [text, text],
      [new Uint8Array(body), body],
      [view as never, new Uint8Array(view.buffer, view.byteOffset, view.byteLength)],
      [body.buffer.slice(body.byteOffset, body.byteOffset + MIB) as never, body.subarray(0, MIB)],
      [new Blob([body]) as never, body],
      [Readable.from([body.subarray(0, 10), body.subarray(10), text]), Buffer.concat([body, Buffer.from(text)])],
      [
        (async function* () {
          yield body;
          yield text;
        })() as never,
        Buffer.concat([body, Buffer.from(text)]),
      ],
    ];
    const hashes = await Promise.all(
      forms.map(async ([body, expected], i) => {
        const reply = await undici.request(TARGET, { dispatcher, method: 'PUT', body });
        const seen = (await reply.body.json()) as { sha256: string; headers: Record<string, string>; bytes: number };
        assert.equal(seen.sha256, sha256(Buffer.from(expected as Uint8Array)), `form ${i}`);
        return seen.headers['content-length'] === undefined ? -1 : seen.bytes - Number(seen.headers['content-length']);
      }),
    );
    assert.deepEqual(hashes, [0, 0, 0, 0, 0, 0, -1, -1]);
    const reply = await undici.request(TARGET, { dispatcher, method: 'POST', body: form });
    const { bytes: sent } = (await reply.body.json()) as { bytes: number };
    assert.ok(sent > body.length + 2 * MIB);
  });

  it('of a thousand callers at once all arrive, and let small calls pass', async (t) => {
    const kedge = await startKedge(t, { handler: impatient, settings: { maxConcurrentStreams: 2000 } });
    const dispatcher = dial(t, kedge);
    await ok(dispatcher, 1);
    const stuck = new AbortController();
    const body = Buffer.alloc(64 * 1024);
    for (let i = 0; i < 300; i += 1) {
      const options = { dispatcher, method: 'POST', body, signal: stuck.signal } as const;
      undici.request(`${TARGET}stuck`, options).catch(() => {});
    }
    await sleep(100);
    await ok(dispatcher, 100);
    stuck.abort();
    const uploads = Array.from({ length: 1000 }, async (_, i) => {
      const own = i % 2 === 0 ? Readable.from([body, body]) : Buffer.alloc(128 * 1024);
      return (await undici.request(TARGET, { dispatcher, method: 'POST', body: own })).body.text();
    });
    await sleep(20);
    await ok(dispatcher, 100);
    assert.deepEqual(await Promise.all(uploads), Array(1000).fill(String(128 * 1024)));
  });

  it('that a kedge leaves behind by a GOAWAY or a refusal are sent again whole', async (t) => {
    let count = 0;
    const kedge = await startKedge(t, {
      handler: (request, response, seen) => {
        count += 1;
        const { stream } = request as Http2ServerRequest;
        request.on('error', () => {});
        if (count % 4 === 1) stream.close(7 /* REFUSED_STREAM */);
        else if (count % 4 === 3) stream.session!.goaway(0, stream.id! - 2);
        else impatient(request, response, seen);
      },
    });
    const dispatcher = dial(t, kedge);
    for (let i = 0; i < 4; i += 1) {
      const reply = await undici.request(TARGET, { dispatcher, method: 'POST', body: Buffer.alloc(5 * MIB) });
      assert.equal(await reply.body.text(), String(5 * MIB));
    }
  });
});

describe('an upload over HTTP/2 whose writer does not wait', () => {
  it('has one piece with Node at a time, and all of it arrives once and in order', async (t) => {
    const server = http2.createServer();
    const received: Buffer[] = [];
    server.on('stream', (stream) => {
      stream.respond();
      stream.on('data', (chunk: Buffer) => {
        received.push(chunk);
        // A slow reader.
        stream.pause();
        setTimeout(() => stream.resume(), 1);
      });
      stream.on('end', () => stream.end());
    });
    await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
    const session = http2.connect(`http://127.0.0.1:${(server.address() as AddressInfo).port}`);
    t.after(() => {
      session.destroy();
      server.close();
    });
    const stream = session.request({ ':method': 'POST' });
    let withNode = 0;
    let most = 0;
    const own = Object.getPrototypeOf(stream) as ClientHttp2Stream;
    const counted = {
      write(this: ClientHttp2Stream, chunk: Uint8Array, encoding: undefined, written: (error?: Error | null) => void) {
        withNode += 1;
        most = Math.max(most, withNode);
        return own.write.call(this, chunk as never, encoding as never, (error) => {
          withNode -= 1;
          written(error);
        });
      },
    };
    Object.setPrototypeOf(stream, Object.setPrototypeOf(counted, own));
    new Uploads(session).watch(stream);
    const body = bytes(4 * MIB);
    const large = 100 * 1024;
    const written: number[] = [];
    let at = 0;
    const write = () => {
      if (at >= body.length) return;
      const from = at;
      at += large;
      stream.write(body.subarray(from, at), () => {
        written.push(from);
        // As who writes the next chunk whenever one is done, or there is room.
        if (from % (2 * large) === 0) write();
      });
      if (at >= body.length) stream.end();
    };
    stream.on('drain', write);
    for (let i = 0; i < 5; i += 1) write();
    stream.resume();
    await new Promise((resolve) => stream.once('close', resolve));
    assert.equal(most, 1, `${most} pieces were with Node at once`);
    assert.ok(Buffer.concat(received).equals(body));
    assert.deepEqual(
      written,
      Array.from({ length: Math.ceil(body.length / large) }, (_, i) => i * large),
    );
  });
});
