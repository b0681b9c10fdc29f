import assert from 'node:assert/strict';
import { readFileSync } from 'node:fs';
import { describe, it } from 'node:test';
import { resolveAdhoc } from '../../examples/kedge/adhoc.ts';
import { readConfig } from '../../examples/kedge/config.ts';
import { splitAuthority } from '../../examples/kedge/director.ts';
import { Refusal } from '../../examples/kedge/refusal.ts';

interface Vectors {
  adhoc_rules: object[];
  dns: Record<string, string[]>;
  cases: { host: string; address?: string; error?: { http: number; grpc: string; contains: string } }[];
}

const file = new URL('../conformance/adhoc.json', import.meta.url);
const { adhoc_rules, dns, cases } = JSON.parse(readFileSync(file, 'utf8')) as Vectors;

const rulesOf = (adhoc_rules: object[]) =>
  readConfig({ file: 'director', text: JSON.stringify({ http: { adhoc_rules } }) }, { file: 'pool', text: '{}' }).http
    .adhocRules;

const resolve = async (name: string) => dns[name] ?? Promise.reject(new Error('ENOTFOUND'));

/** As both proxies use it: an authority that is none, and no rule, are theirs to say. */
async function outcome(host: string): Promise<{ address: string } | { http: number; grpc: string; message: string }> {
  const split = splitAuthority(host);
  if (split === undefined)
    return { http: 400, grpc: 'INVALID_ARGUMENT', message: 'the authority is not a host and port' };
  try {
    const found = await resolveAdhoc(rulesOf(adhoc_rules), split.host, split.port, resolve);
    if (found === undefined) return { http: 502, grpc: 'UNIMPLEMENTED', message: 'unknown route to service' };
    return { address: `${found.host}:${found.port}` };
  } catch (error) {
    assert.ok(error instanceof Refusal, String(error));
    return { http: error.http, grpc: error.grpc, message: error.message };
  }
}

describe('adhoc.json', () => {
  for (const { host, address, error } of cases) {
    it(`${host} -> ${address ?? error!.contains}`, async () => {
      const found = await outcome(host);
      if (address !== undefined) {
        assert.deepEqual(found, { address });
        return;
      }
      assert.ok('message' in found, JSON.stringify(found));
      assert.deepEqual([found.http, found.grpc], [error!.http, error!.grpc]);
      assert.ok(found.message.includes(error!.contains), found.message);
    });
  }
});

describe('an adhoc rule', () => {
  const rule = { dns_name_matcher: '*.test', port: { allowed: [80] } };
  const to = (addresses: string[], more: object = {}) =>
    resolveAdhoc(rulesOf([{ ...rule, ...more }]), 'a.test', 80, async () => addresses);

  it('leads to no address of this machine, its link or its cloud, unless it says so', async () => {
    for (const address of [
      '127.0.0.1',
      '127.9.9.9',
      '169.254.169.254',
      '0.0.0.0',
      '::1',
      '::',
      'fe80::1',
      '::ffff:127.0.0.1',
      '::FFFF:169.254.169.254',
      'fd00:ec2::254',
      '224.0.0.1',
      '255.255.255.255',
      '100.100.100.200',
      '168.63.129.16',
      '192.0.0.192',
      'fd20:ce::254',
      '64:ff9b::a9fe:a9fe',
      '64:ff9b::7f00:1',
      '64:ff9b::169.254.169.254',
      '::ffff:7f00:1',
    ]) {
      await assert.rejects(to([address]), { http: 403, grpc: 'PERMISSION_DENIED' }, address);
    }
    assert.deepEqual(await to(['127.0.0.1', '10.0.0.1']), { host: '10.0.0.1', port: 80 }, 'the first that is allowed');
    assert.deepEqual(await to(['::ffff:127.0.0.1'], { allow_cidrs: ['127.0.0.0/8'] }), { host: '127.0.0.1', port: 80 });
    await assert.rejects(to(['10.0.0.1'], { allow_cidrs: ['127.0.0.0/8'] }), { http: 403 });
  });

  it('maps no IP address, and is refused when it cannot be read', async () => {
    assert.equal(await resolveAdhoc(rulesOf([{ dns_name_matcher: '*' }]), '10.0.0.1', 80, resolve), undefined);
    for (const wrong of [
      { allow_cidrs: ['10.0.0.1'] },
      { allow_cidrs: ['x/8'] },
      { port: { allowed: [70000] } },
      { what: 1 },
    ])
      assert.throws(() => rulesOf([{ ...rule, ...wrong }]), /director: http\.adhoc_rules\[0\]/);
  });
});
