import assert from 'node:assert/strict';
import { describe, it } from 'node:test';
import { createAuthority } from '../../examples/pki.ts';
import { connectDialer } from '../../src/connectrpc/index.ts';
import { grpcDialer } from '../../src/grpc/index.ts';
import * as api from '../../src/index.ts';
import { spiffeIdentity } from '../../src/spiffe/index.ts';

const mapper = () => undefined;
const kedge = 'https://kedge.example.com';
const dialer = api.createDialer({ mapper });
const ca = await createAuthority('ca');
const { cert, key } = await ca.issue({ cn: 'pod' });
const SECRET = 'top-secret-canary';

interface Case {
  /** The public function, with options that are added to good ones. */
  readonly call: (options: object) => unknown;
  readonly code?: api.KedgeErrorCode;
  /** What is misspelt, what it is for, and what an option of the wrong type is told. */
  readonly misspelt: string;
  readonly meant: string;
  readonly wrong: object;
  readonly expected: RegExp;
}

/** Options in an object of options, by path. */
const inside = (path: string, options: object) =>
  path.split('.').reduceRight<object>((inner, name) => ({ [name]: inner }), options);

const create = (options: object) => api.createDialer({ mapper, ...options });
const section = (path: string) => (options: object) => create(inside(path, options));
const routes = { code: 'ERR_KEDGE_ROUTE', misspelt: 'proxyAuht', meant: 'proxyAuth' } as const;
const token = { wrong: { proxyAuth: SECRET }, expected: /`proxyAuth` is a token source such as/ };
const identities = { code: 'ERR_KEDGE_IDENTITY' } as const;
const named = { misspelt: 'nmae', meant: 'name', wrong: { name: 1 }, expected: /`name` is a string$/ };
const late = { misspelt: 'deadlineMS', meant: 'deadlineMs', wrong: { deadlineMs: '5s' } };
const deadline = { ...late, expected: /`deadlineMs` is a whole number of ms from 1 to 2147483647$/ };
const whole = /is a whole number of ms from 1 to 2147483647$/;

const CASES: Record<string, Case> = {
  createDialer: { call: create, misspelt: 'failovr', meant: 'failover', wrong: { maxTargets: '9' }, expected: /`maxT/ },
  'createDialer http': {
    call: section('http'),
    misspelt: 'http.conections',
    meant: 'http.connections',
    wrong: { windowBytes: '8M' },
    expected: /`http\.windowBytes` is a whole number of bytes from 65535 to/,
  },
  'createDialer grpc': {
    call: section('grpc'),
    misspelt: 'grpc.keepAliveTimeMs',
    meant: 'grpc.keepaliveTimeMs',
    wrong: { keepaliveTimeMs: 1n },
    expected: whole,
  },
  'createDialer connect': {
    call: section('connect'),
    misspelt: 'connect.timeout',
    meant: 'connect.timeoutMs',
    wrong: { proxy: `https://user:${SECRET}@proxy` },
    expected: /`connect\.proxy` is a URL such as http:/,
  },
  'createDialer failover': {
    call: section('failover'),
    misspelt: 'failover.status',
    meant: 'failover.statuses',
    wrong: { retryBudget: '20%' },
    expected: /`failover\.retryBudget` is a number from 0 to 1$/,
  },
  'createDialer failover.breaker': {
    call: section('failover.breaker'),
    misspelt: 'failover.breaker.backofMs',
    meant: 'failover.breaker.backoffMs',
    wrong: { maxBackoffMs: '30s' },
    expected: whole,
  },
  'createDialer peer': {
    call: section('peer'),
    misspelt: 'peer.spiffeID',
    meant: 'peer.spiffeId',
    wrong: { spkiPins: SECRET },
    expected: /`peer\.spkiPins` is a list of base64 SHA-256 hashes$/,
  },
  route: { call: (options) => api.route({ kedge, ...options }), ...routes, ...token },
  'route peer': {
    call: (options) => api.route({ kedge, peer: options }),
    misspelt: 'peer.minVersoin',
    meant: 'peer.minVersion',
    wrong: { minVersion: 1.3 },
    expected: /`peer\.minVersion` is "TLSv1\.2" or "TLSv1\.3"$/,
  },
  single: { call: (options) => api.single({ kedge, ...options }), ...routes, ...token },
  hosts: { call: (options) => api.hosts({ 'a.test': { kedge, ...options } }), ...routes, ...token },
  hostPorts: { call: (options) => api.hostPorts({ 'a.test:1': { kedge, ...options } }), ...routes, ...token },
  suffix: {
    call: (options) => api.suffix({ match: '*.local', suffix: '.example.com', ...options }),
    code: 'ERR_KEDGE_ROUTE',
    misspelt: 'schema',
    meant: 'scheme',
    wrong: { scheme: 'ftp' },
    expected: /`scheme` is "https" or "http"$/,
  },
  regexp: {
    call: (options) => api.regexp({ exp: 'a', url: kedge, ...options }),
    code: 'ERR_KEDGE_ROUTE',
    misspelt: 'allowAnyHosts',
    meant: 'allowAnyHost',
    wrong: { search: 'yes' },
    expected: /`search` is a boolean$/,
  },
  loadWinchConfig: {
    call: (options) => api.loadWinchConfig({ mapper: {}, ...options }),
    code: 'ERR_KEDGE_ROUTE',
    misspelt: 'strickt',
    meant: 'strict',
    wrong: { auth: 1 },
    expected: /`auth` is the path of a file, or what is in it$/,
  },
  'loadWinchConfig login': {
    call: (login) => api.loadWinchConfig({ mapper: {}, login: { origin: kedge, open: mapper, ...login } as never }),
    code: 'ERR_KEDGE_ROUTE',
    misspelt: 'login.orign',
    meant: 'login.origin',
    wrong: { open: SECRET },
    expected: /`login\.open` is a function$/,
  },
  pem: {
    call: (options) => api.pem({ cert, key, ...options }),
    ...identities,
    misspelt: 'passphrse',
    meant: 'passphrase',
    wrong: { key: 1 },
    expected: /`key` is PEM text as a string or Buffer$/,
  },
  'pem of CAs': {
    call: (options) => api.pem({ ca: ca.cert, ...options }),
    ...identities,
    misspelt: 'certs',
    meant: 'cert',
    wrong: { ca: 1 },
    expected: /`ca` is PEM text as a string or Buffer$/,
  },
  pemFiles: {
    call: (options) => api.pemFiles({ cert: 'c', key: 'k', ...options }),
    ...identities,
    misspelt: 'onWarn',
    meant: 'onWarning',
    wrong: { passphrase: Buffer.from(SECRET) },
    expected: /`passphrase` is a string$/,
  },
  'pemFiles of CAs': {
    call: (options) => api.pemFiles({ ca: 'c', ...options }),
    ...identities,
    misspelt: 'onWarn',
    meant: 'onWarning',
    wrong: { onWarning: SECRET },
    expected: /`onWarning` is a function that takes a warning$/,
  },
  pkcs12: {
    call: (options) => api.pkcs12({ pfx: Buffer.alloc(1), ...options }),
    ...identities,
    misspelt: 'pasphrase',
    meant: 'passphrase',
    wrong: { pfx: SECRET },
    expected: /`pfx` is a PKCS#12 container as a Buffer$/,
  },
  pkcs12File: {
    call: (options) => api.pkcs12File({ pfx: 'p', ...options }),
    ...identities,
    misspelt: 'pasphrase',
    meant: 'passphrase',
    wrong: { ca: 1 },
    expected: /`ca` is the path of a file$/,
  },
  staticToken: { call: (options) => api.staticToken(SECRET, options), ...named },
  fileToken: { call: (options) => api.fileToken('/token', options), ...named },
  cachedToken: { call: (options) => api.cachedToken(async () => ({ token: SECRET }), options), ...deadline },
  execToken: {
    call: (options) => api.execToken({ command: 'x', ...options }),
    misspelt: 'arg',
    meant: 'args',
    wrong: { env: { TOKEN: [SECRET] } },
    expected: /`env` is an object of strings$/,
  },
  oidcToken: {
    call: (options) => api.oidcToken({ issuer: 'https://id.example.com', clientId: 'x', ...options }),
    misspelt: 'clientSecrt',
    meant: 'clientSecret',
    wrong: { refreshToken: [SECRET] },
    expected: /`refreshToken` is a string$/,
  },
  googleServiceAccountToken: {
    call: (options) => api.googleServiceAccountToken({ keyFile: 'k', audience: 'a', ...options }),
    misspelt: 'scope',
    meant: 'scopes',
    wrong: { scopes: SECRET },
    expected: /`scopes` is a list of strings$/,
  },
  kubeconfigToken: { call: (options) => api.kubeconfigToken(options), ...deadline },
  parseTarget: {
    call: (options) => api.parseTarget('a.test', options),
    misspelt: 'wires',
    meant: 'wire',
    wrong: { wire: 'tcp' },
    expected: /`wire` is "http" or "grpc"$/,
  },
  'dialer.explain': {
    call: (options) => dialer.explain('a.test', options),
    misspelt: 'wired',
    meant: 'wire',
    wrong: { wire: 'tcp' },
    expected: /`wire` is "http" or "grpc"$/,
  },
  spiffeIdentity: {
    call: (options) => spiffeIdentity({ socketPath: '/none', timeoutMs: 1, ...options }),
    ...identities,
    misspelt: 'socketpaht',
    meant: 'socketPath',
    wrong: { timeoutMs: '10s' },
    expected: whole,
  },
};

/** Public functions without options of their own, by what else they take. */
const WRONG_ARGUMENTS: Record<string, [call: () => unknown, code: api.KedgeErrorCode]> = {
  firstMatch: [() => api.firstMatch('x' as never), 'ERR_KEDGE_ROUTE'],
  grpcDialer: [() => grpcDialer({} as never), 'ERR_KEDGE_OPTIONS'],
  'grpcDialer wrap': [() => grpcDialer(dialer).wrap('x' as never), 'ERR_KEDGE_OPTIONS'],
  connectDialer: [() => connectDialer(undefined as never), 'ERR_KEDGE_OPTIONS'],
  'connectDialer sessionManager': [() => connectDialer(dialer).sessionManager(1 as never), 'ERR_KEDGE_TARGET'],
  'the path of fileToken': [() => api.fileToken(1 as never), 'ERR_KEDGE_OPTIONS'],
  'the fetch of cachedToken': [() => api.cachedToken('x' as never), 'ERR_KEDGE_OPTIONS'],
};

async function refusal(call: () => unknown): Promise<api.KedgeError> {
  try {
    await call();
  } catch (error) {
    assert.ok(api.isKedgeError(error), String(error));
    assert.equal(error.stage, error.code === 'ERR_KEDGE_TARGET' ? 'map' : 'config');
    assert.doesNotMatch(error.message, new RegExp(SECRET));
    return error;
  }
  return assert.fail('not refused');
}

describe('what a public function is given', () => {
  for (const [name, { call, code = 'ERR_KEDGE_OPTIONS', misspelt, meant, wrong, expected }] of Object.entries(CASES)) {
    it(`${name}: a misspelt option is told what was probably meant`, async () => {
      const error = await refusal(() => call({ [misspelt.split('.').at(-1)!]: SECRET }));
      assert.match(error.reason, /^\w+: /);
      assert.ok(error.reason.endsWith(`: unknown option \`${misspelt}\`; did you mean \`${meant}\`?`), error.reason);
      assert.equal(error.code, code);
    });

    it(`${name}: a wrong type is told what is expected`, async () => {
      const error = await refusal(() => call(wrong));
      assert.match(error.reason, expected);
      assert.equal(error.code, code);
    });
  }

  for (const [name, [call, code]] of Object.entries(WRONG_ARGUMENTS)) {
    it(`${name}: a wrong argument is refused`, async () => assert.equal((await refusal(call)).code, code));
  }

  it('is checked by every function that is exported', () => {
    const others = ['KedgeError', 'isKedgeError', 'kedgeErrorOf'];
    const covered = [...Object.keys(CASES), ...Object.keys(WRONG_ARGUMENTS)].map((name) => name.split(' ')[0]);
    for (const name of Object.keys(api)) assert.ok([...covered, ...others].includes(name), name);
  });

  it('is told all options where none is like it', async () => {
    const error = await refusal(() => api.staticToken('x', { colour: 'red' } as never));
    assert.match(error.reason, /^staticToken: unknown option `colour`; there are `name`$/);
    const odd = await refusal(() => api.staticToken('x', { [`${SECRET}@\n`.repeat(9)]: 1 } as never).name);
    assert.doesNotMatch(odd.message, /\n/);
  });
});
