import { createRequire } from 'node:module';

type Re2 = typeof import('re2js');
export type Expression = InstanceType<Re2['RE2JS']>;

let re2: Re2 | undefined;

/** RE2 in linear time, whatever the expression; loaded by the first one. Throws what `re2js` throws. */
export function compile(expression: string): Expression {
  re2 ??= createRequire(import.meta.url)('re2js') as Re2;
  return re2.RE2JS.compile(expression);
}
