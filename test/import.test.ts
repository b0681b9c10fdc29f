import assert from 'node:assert/strict';
import { spawnSync } from 'node:child_process';
import { describe, it } from 'node:test';
import { INTRINSICS } from './helpers/intrinsics.ts';

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

describe('an import that fails, because undici cannot be evaluated', () => {
  /** As on a Node older than 22.15, where undici stumbles late; and as early as it can. */
  const CAUSES = {
    late: "const zlib = (await import('node:zlib')).default; delete zlib.createZstdDecompress;",
    early:
      'const symbol = Symbol.for; Symbol.for = (key) => { if (/^undici.error/.test(key)) throw new TypeError(key); return symbol(key); };',
  };
  /** Importing again would find the failed module: what is checked is what a program that goes on without us has. */
  const check = (attempt: string) => `
      ${INTRINSICS}
      const before = snapshot();
      let failed = 'no';
      ${attempt}
      const keys = [1, 2].map((n) => Symbol.for('undici.globalDispatcher.' + n));
      const left = keys.filter((key) => globalThis[key] !== undefined).length;
      for (const key of keys) Object.defineProperty(globalThis, key, { value: 'set', configurable: true });
      const set = keys.every((key) => globalThis[key] === 'set');
      console.log(JSON.stringify({ failed, changed: changed(before), left, set }));
    `;
  const EXPECTED = { failed: 'TypeError', changed: [], left: 0, set: true };

  for (const [when, cause] of Object.entries(CAUSES)) {
    it(`leaves every intrinsic as it was, ${when} in the evaluation`, () => {
      const load = `try { await import(${JSON.stringify(ENTRIES[0])}); } catch (error) { failed = error.name; }`;
      assert.deepEqual(run(`${cause} ${check(load)}`), EXPECTED);
    });
  }

  it('leaves every intrinsic as it was where CommonJS requires the package', () => {
    const load = `
      const require = (await import('node:module')).createRequire(import.meta.url);
      try { require(${JSON.stringify(new URL(ENTRIES[0]!).pathname)}); } catch (error) { failed = error.name; }
    `;
    assert.deepEqual(run(`${CAUSES.late} ${check(load)}`), EXPECTED);
  });
});
