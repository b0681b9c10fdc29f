import assert from 'node:assert/strict';
import { spawnSync } from 'node:child_process';
import { describe, it } from 'node:test';

const ENTRIES = ['../src/index.ts', '../src/grpc/index.ts', '../src/connect/index.ts', '../src/spiffe/index.ts'].map(
  (path) => new URL(path, import.meta.url).href,
);

/** Runs a module in a process of this Node, where nothing has loaded undici. */
function run(code: string, env: Record<string, string> = {}): unknown {
  const { stdout, stderr, status } = spawnSync(process.execPath, ['--input-type=module', '-e', code], {
    env: { ...process.env, NODE_OPTIONS: '', ...env },
    encoding: 'utf8',
  });
  assert.equal(status, 0, stderr);
  return JSON.parse(stdout);
}

const SYMBOLS = `
  const keys = [1, 2].map((n) => Symbol.for('undici.globalDispatcher.' + n));
  const before = { fetch: globalThis.fetch, values: keys.map((key) => globalThis[key]), has: keys.map((key) => key in globalThis) };
`;
const COMPARE = `
  const same = before.fetch === globalThis.fetch
    && keys.every((key, i) => globalThis[key] === before.values[i] && (key in globalThis) === before.has[i])
    && Object.defineProperty.name === 'defineProperty';
`;

describe('importing the package', () => {
  it('leaves fetch and both global dispatchers alone', () => {
    for (const entry of ENTRIES) {
      const code = `${SYMBOLS} await import(${JSON.stringify(entry)}); ${COMPARE} console.log(JSON.stringify(same));`;
      assert.equal(run(code), true, entry);
    }
  });

  it('leaves a dispatcher alone that was set before', () => {
    const code = `
      await fetch('data:,x');
      ${SYMBOLS} await import(${JSON.stringify(ENTRIES[0])}); ${COMPARE}
      console.log(JSON.stringify({ same, set: before.values.some(Boolean) }));
    `;
    assert.deepEqual(run(code, { NODE_USE_ENV_PROXY: '1', HTTP_PROXY: 'http://127.0.0.1:1' }), {
      same: true,
      set: true,
    });
  });

  it('leaves undici usable without a dispatcher, and setGlobalDispatcher() working', () => {
    const code = `
      import http from 'node:http';
      await import(${JSON.stringify(ENTRIES[0])});
      const { request, Agent, getGlobalDispatcher, setGlobalDispatcher } = await import(${JSON.stringify(import.meta.resolve('undici'))});
      const server = http.createServer((req, res) => res.end('direct')).listen(0, '127.0.0.1');
      await new Promise((resolve) => server.once('listening', resolve));
      const { body } = await request('http://127.0.0.1:' + server.address().port);
      const text = await body.text();
      const agent = new Agent();
      setGlobalDispatcher(agent);
      console.log(JSON.stringify({ text, set: getGlobalDispatcher() === agent }));
      server.close();
      await getGlobalDispatcher().close();
      process.exit(0);
    `;
    assert.deepEqual(run(code), { text: 'direct', set: true });
  });
});
