import assert from 'node:assert/strict';
import { readFileSync } from 'node:fs';
import { describe, it } from 'node:test';
import { KedgeError, type KedgeErrorCode } from '../../src/index.ts';
import { CODES } from '../../src/support/errors.ts';

const codes = Object.keys(CODES) as KedgeErrorCode[];

describe('the codes of errors', () => {
  it('are those of the README, with their stages and meanings', () => {
    const readme = readFileSync(new URL('../../README.md', import.meta.url), 'utf8');
    const rows = [...readme.matchAll(/^\| `(ERR_KEDGE_\w+)` \| (.*?) \| (.*?) \|$/gm)];
    assert.deepEqual(
      rows.map(([, code, stages, meaning]) => ({ code, stages, meaning })),
      codes.map((code) => ({ code, stages: CODES[code].stages.join(', '), meaning: CODES[code].meaning })),
    );
    const known = new Set<string>(codes);
    for (const [code] of readme.matchAll(/ERR_KEDGE_\w+/g)) assert.ok(known.has(code), code);
  });

  it('say the stage, which is given only where it is not the first', () => {
    for (const code of codes) {
      const { stages } = CODES[code];
      assert.equal(new KedgeError(code, 'why').stage, stages[0]);
      for (const stage of stages) {
        const error = new KedgeError(code, 'why', { stage, kedge: 'k:443' }).for('a.test');
        assert.equal(error.stage, stage);
        assert.equal(error.message, `target a.test: kedge k:443: ${stage}: why`);
      }
    }
  });
});
