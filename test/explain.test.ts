import assert from 'node:assert/strict';
import { describe, it } from 'node:test';
import { inspect } from 'node:util';
import {
  createDialer,
  firstMatch,
  hosts,
  isKedgeError,
  pem,
  regexp,
  single,
  staticToken,
  suffix,
} from '../src/index.ts';
import { countEffects } from './helpers/effects.ts';
import { authority, startKedge } from './helpers/kedge.ts';

const ca = await authority();

describe('explain()', () => {
  it('says where a call would go and why, and asks nobody', async (t) => {
    const effects = countEffects(t);
    const { cert, key, serial } = await ca.issue({ cn: 'pod', notAfter: new Date(Date.now() + 1800_000) });
    const table = {
      'a.test': { kedge: ['https://one.test', 'https://two.test:8443'], proxyAuth: effects.source('edge', 'canary') },
    };
    const dialer = createDialer({
      mapper: firstMatch(hosts(table), suffix({ match: '*.local', suffix: '.kedge.test' }), function mine() {
        return undefined;
      }),
      identity: pem({ cert, key, ca: ca.cert }),
    });
    t.after(() => dialer.destroy());
    const explained = dialer.explain('http://A.test.:80');
    assert.equal(explained.target, 'a.test');
    assert.equal(explained.outcome, 'kedge');
    assert.equal(explained.mapper, 'firstMatch[0]: hosts: has "a.test"');
    assert.deepEqual(
      explained.kedges.map(({ kedge, serverName, state }) => [kedge, serverName, state]),
      [
        ['one.test:443', 'one.test', 'unused'],
        ['two.test:8443', 'two.test', 'unused'],
      ],
    );
    assert.equal(explained.kedges[0]!.identity!.serial, serial);
    assert.equal(explained.proxyAuth, 'edge');
    assert.match(explained.warnings.join(), /expires at/);
    for (const text of [inspect(explained), JSON.stringify(explained)]) {
      assert.match(text, /one\.test:443[\s\S]*two\.test:8443/);
      assert.doesNotMatch(text, /canary|PRIVATE/);
    }
    assert.match(dialer.explain('http://x.us1.local').mapper, /^firstMatch\[1\]: suffix "\*\.local" captures "us1"$/);
    const direct = dialer.explain(new URL('https://other.test/path?x'));
    assert.equal(direct.outcome, 'direct');
    assert.equal(
      direct.mapper,
      'none of firstMatch: hosts: has no "other.test"; suffix "*.local" does not match; function mine',
    );
    assert.match(inspect(direct), /direct, without any of our credentials/);
    assert.equal(dialer.explain('http://10.0.0.1').mapper, 'IP addresses are never mapped');
    assert.equal(dialer.explain('x.us1.local:90', { wire: 'grpc' }).kedges[0]!.kedge, 'us1.kedge.test:443');
    assert.deepEqual(effects.take(), { lookups: 0, sockets: 0, tokens: 0 });
  });

  it('knows what has happened to a kedge, and warns of what is weak', async (t) => {
    const kedge = await startKedge(t);
    const dialer = kedge.dialer();
    assert.equal(dialer.explain('http://a.us1').kedges[0]!.state, 'unused');
    await dialer.fetch('http://a.us1');
    assert.equal(dialer.explain('http://a.us1').kedges[0]!.state, 'closed');
    const weak = createDialer({
      mapper: firstMatch(hosts({ 'a.test': 'http://plain.test' }), regexp({ exp: '.*', url: 'https://x.y.z' })),
      peer: { dangerouslySkipVerification: true },
      onWarning: () => {},
      unmapped: 'reject',
    });
    assert.match(dialer.explain('http://a.us1').warnings.join(), /^$/);
    assert.match(weak.explain('http://a.test').warnings.join(), /plain http/);
    assert.match(weak.explain('http://b.test').warnings.join(), /not verified/);
    const strict = createDialer({ mapper: hosts({}), unmapped: 'reject' });
    assert.equal(strict.explain('http://a.test').outcome, 'reject');
    assert.match(inspect(strict.explain('http://a.test')), /refused: ERR_KEDGE_UNMAPPED/);
  });

  it('throws what a call would', () => {
    const dialer = createDialer({ mapper: single({ kedge: 'https://x.test', proxyAuth: staticToken('x') }) });
    assert.throws(() => dialer.explain('http://a b'), { code: 'ERR_KEDGE_TARGET' });
    const failing = createDialer({
      mapper: () => {
        throw new Error('canary');
      },
    });
    assert.throws(
      () => failing.explain('http://a'),
      (error) => isKedgeError(error) && error.code === 'ERR_KEDGE_ROUTE',
    );
  });
});
