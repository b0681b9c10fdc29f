/** A process that sends many large bodies at once over HTTP/2, for a small heap: `CHAOS=<JSON> node uploading.ts`. */
import { Readable } from 'node:stream';
import * as undici from 'undici';
import { createDialer, pem, single, staticToken } from '../../src/index.ts';
import { KEDGE_NAME } from '../helpers/kedge.ts';

export interface Uploading {
  cert: string;
  key: string;
  ca: string;
  token: string;
  url: string;
  form: 'Buffer' | 'fetch' | 'stream';
  uploads: number;
  bytes: number;
}

export interface Uploaded {
  ok: number;
  failed: string[];
  /** The most that the process held at any time. */
  rssBytes: number;
}

const { cert, key, ca, token, url, form, uploads, bytes } = JSON.parse(process.env['CHAOS']!) as Uploading;
const dialer = createDialer({
  identity: pem({ cert, key, ca }),
  mapper: single({ kedge: url, serverName: KEDGE_NAME, proxyAuth: staticToken(token) }),
  http: { protocol: 'h2' },
});
const { dispatcher } = dialer;
const target = 'http://orders.us1:8080/';
const body = Buffer.alloc(bytes, 'u');
const send = {
  Buffer: async () => (await undici.request(target, { dispatcher, method: 'POST', body })).body.text(),
  fetch: async () => (await dialer.fetch(target, { method: 'POST', body })).text(),
  stream: async () =>
    (await undici.request(target, { dispatcher, method: 'POST', body: Readable.from([body]) })).body.text(),
}[form];
const result: Uploaded = { ok: 0, failed: [], rssBytes: 0 };
const timer = setInterval(() => {
  result.rssBytes = Math.max(result.rssBytes, process.memoryUsage.rss());
}, 20);
await Promise.all(
  Array.from({ length: uploads }, async () => {
    try {
      if ((await send()) === String(bytes)) result.ok += 1;
      else result.failed.push('not whole');
    } catch (error) {
      result.failed.push(String((error as Error).cause ?? error));
    }
  }),
);
clearInterval(timer);
console.log(JSON.stringify(result));
await dialer.destroy();
