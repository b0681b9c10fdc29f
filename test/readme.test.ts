import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { mkdirSync, readFileSync, symlinkSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, it, type TestContext } from 'node:test';
import { fileURLToPath } from 'node:url';
import { startGrpcKedge } from './helpers/grpc-kedge.ts';
import { startKedge } from './helpers/kedge.ts';
import { tempDir } from './helpers/temp.ts';

const ROOT = fileURLToPath(new URL('..', import.meta.url));
const readme = readFileSync(join(ROOT, 'README.md'), 'utf8');
const snippets = [...readme.matchAll(/```ts\n([\s\S]*?)```/g)].map(([, code]) => code!);

/**
 * Sends what is dialled at port 443 to the test's kedge: the README's names belong to nobody. DNS and TCP are all that
 * is changed; certificates, names and ports in requests are as the snippet has them.
 */
const REDIRECT = `
  import dns from 'node:dns';
  import net from 'node:net';
  const names = /\\.kedge\\.example\\.com$/;
  const { lookup } = dns.promises;
  dns.promises.lookup = (name, options) =>
    names.test(name) ? Promise.resolve([{ address: '127.0.0.1', family: 4 }]) : lookup(name, options);
  const { connect } = net;
  net.connect = (options, ...rest) =>
    connect(Number(options.port) === 443 ? { ...options, host: '127.0.0.1', port: Number(process.env.KEDGE_PORT) } : options, ...rest);
`;

const GREETER = `
  import * as grpc from '@grpc/grpc-js';
  const codec = (value) => Buffer.from(JSON.stringify(value));
  const parse = (bytes) => JSON.parse(bytes.toString());
  export const GreeterClient = grpc.makeGenericClientConstructor({
    sayHello: {
      path: '/test.Echo/Unary', requestStream: false, responseStream: false,
      requestSerialize: ({ name }) => codec({ text: name }), requestDeserialize: parse, responseSerialize: codec, responseDeserialize: parse,
    },
  });
`;

/** A project folder such as a user has, with the package installed. */
async function project(t: TestContext): Promise<string> {
  const folder = await tempDir(t);
  mkdirSync(join(folder, 'node_modules/@grpc'), { recursive: true });
  symlinkSync(ROOT, join(folder, 'node_modules/kedge-dialer'));
  symlinkSync(join(ROOT, 'node_modules/@grpc/grpc-js'), join(folder, 'node_modules/@grpc/grpc-js'));
  writeFileSync(join(folder, 'package.json'), '{"type":"module"}');
  mkdirSync(join(folder, 'gen'));
  writeFileSync(join(folder, 'gen/greeter.js'), GREETER);
  writeFileSync(join(folder, 'redirect.mjs'), REDIRECT);
  return folder;
}

async function run(
  folder: string,
  file: string,
  env: Record<string, string>,
): Promise<{ status: number | null; out: string }> {
  const child = spawn(process.execPath, ['--import', './redirect.mjs', file], {
    cwd: folder,
    env: { ...process.env, NODE_OPTIONS: '', ...env },
  });
  let out = '';
  for (const stream of [child.stdout, child.stderr]) {
    stream.on('data', (chunk) => {
      out += chunk;
    });
  }
  const [status] = await new Promise<[number | null]>((resolve) => child.on('exit', (code) => resolve([code])));
  return { status, out };
}

describe('every snippet of the README runs', () => {
  const expected = [
    /^200 \{[\s\S]*authority: 'orders\.shop\.svc\.us1\.prod\.clusters\.local:8080'/,
    /^200$/,
    /authority: 'greeter\.shop\.svc\.us1\.prod\.clusters\.local:9090'/,
    /^200$/,
  ];

  it('and there are as many as are expected', () => assert.equal(snippets.length, expected.length));

  for (const [i, code] of snippets.entries()) {
    it(`snippet ${i + 1}: ${code
      .split('\n')
      .find((line) => line.includes('fetch(') || line.includes('new Greeter'))
      ?.trim()}`, async (t) => {
      const options = { names: ['us1.prod.kedge.example.com'], requireClientCertificate: false };
      const kedge = await (code.includes('kedge-dialer/grpc') ? startGrpcKedge(t, options) : startKedge(t, options));
      const folder = await project(t);
      const files = { 'tls.crt': kedge.client.cert, 'tls.key': kedge.client.key, 'ca.crt': kedge.ca.cert };
      for (const [name, content] of Object.entries(files)) writeFileSync(join(folder, name), content);
      const file = `snippet-${i}.ts`;
      writeFileSync(join(folder, file), code.replaceAll("'/tls/", `'${folder}/`));
      const env = { KEDGE_PORT: String(kedge.port), NODE_EXTRA_CA_CERTS: join(folder, 'ca.crt') };
      const { status, out } = await run(folder, file, env);
      assert.equal(status, 0, out);
      assert.match(out.trim(), expected[i]!);
    });
  }
});
