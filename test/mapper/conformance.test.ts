import assert from 'node:assert/strict';
import { readFileSync } from 'node:fs';
import { describe, it } from 'node:test';
import {
  hostPorts,
  hosts,
  loadWinchConfig,
  type Mapper,
  parseTarget,
  type RouteTable,
  type SuffixOptions,
  single,
  suffix,
  type WinchConfigOptions,
} from '../../src/index.ts';

interface Vector {
  mapper: string;
  config: unknown;
  error?: boolean;
  cases?: { target: string; wire?: 'http' | 'grpc'; kedge: string | null; proxyAuth?: string; backendAuth?: string }[];
}

const build: Record<string, (config: never) => Mapper> = {
  single: (config: string) => single(config),
  hosts: (config: RouteTable) => hosts(config),
  hostPorts: (config: RouteTable) => hostPorts(config),
  suffix: (config: SuffixOptions) => suffix(config),
  winch: (config: WinchConfigOptions) => loadWinchConfig(config).mapper,
};

const file = new URL('../conformance/mappers.json', import.meta.url);
const vectors = JSON.parse(readFileSync(file, 'utf8')) as Vector[];

describe('mappers.json', () => {
  it('has vectors for every mapper', () => {
    assert.deepEqual(new Set(vectors.map(({ mapper }) => mapper)), new Set(Object.keys(build)));
  });

  for (const { mapper, config, error, cases = [] } of vectors) {
    const title = `${mapper} ${JSON.stringify(config)}`;
    if (error) {
      it(`${title} is refused`, () => {
        assert.throws(() => build[mapper]!(config as never), { code: 'ERR_KEDGE_ROUTE', stage: 'config' });
      });
      continue;
    }
    for (const { target, wire, kedge, ...auth } of cases) {
      it(`${title}: ${target} -> ${kedge}`, () => {
        const found = build[mapper]!(config as never)(parseTarget(target, wire ? { wire } : {}));
        assert.equal(found?.kedges[0]?.href, kedge === null ? undefined : new URL(kedge).href);
        assert.equal(found?.proxyAuth?.name, auth.proxyAuth);
        assert.equal(found?.backendAuth?.name, auth.backendAuth);
      });
    }
  }
});
