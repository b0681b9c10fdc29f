import { KedgeError, type KedgeErrorCode, quote } from './errors.ts';
import { MAX_INT32 } from './timer.ts';

/** Where a value stands, for errors. */
export interface Place {
  /** The function that it was given to. */
  readonly called: string;
  /** `http.connections`; empty for the options as a whole. */
  readonly path: string;
  readonly code: KedgeErrorCode;
}

/** Checks a value and gives it back, with defaults where it has some. Its errors never show the value: it may be a secret. */
export type Reader<T> = (value: unknown, place: Place) => T;

/** A reader for each option of `T`, no more and no less. */
export type Table<T> = Readonly<Record<keyof T, Reader<unknown>>>;

type Values<F> = { [K in keyof F]: F[K] extends Reader<infer T> ? T : never };

/** Checks what a public function was given: all of them say the same of the same mistake. */
export function check<T>(
  called: string,
  read: Reader<T>,
  value: unknown,
  { code = 'ERR_KEDGE_OPTIONS', path = '' }: Partial<Place> = {},
): T {
  return read(value, { called, path, code });
}

export function invalid({ called, path, code }: Place, reason: string, cause?: unknown): KedgeError {
  return new KedgeError(code, `${called}: ${path === '' ? '' : `\`${path}\` `}${reason}`, { cause });
}

/** What `test` accepts; `expected` says what that is, with its unit. */
export function is<T>(expected: string, test: (value: unknown) => value is T): Reader<T> {
  return (value, place) => {
    if (test(value)) return value;
    throw invalid(place, value === undefined || value === '' ? `is required: ${expected}` : `is ${expected}`);
  };
}

/** `fallback` where there is no value. */
export function or<T, const D extends T | undefined>(read: Reader<T>, fallback: D): Reader<T | D> {
  return (value, place) => (value === undefined ? fallback : read(value, place));
}

export function optional<T>(read: Reader<T>): Reader<T | undefined> {
  return or(read, undefined);
}

/** An object that has these options and no other; `says` is the error for what is no object. */
export function object<F extends Record<string, Reader<unknown>>>(fields: F, says?: string): Reader<Values<F>> {
  return (value, place) => {
    if (!isObject(value)) throw invalid(place, says ?? (place.path === '' ? 'takes an object' : 'is an object'));
    const prefix = place.path === '' ? '' : `${place.path}.`;
    const unknown = Object.keys(value).find((name) => !Object.hasOwn(fields, name));
    if (unknown !== undefined) throw invalid({ ...place, path: '' }, misspelt(prefix, unknown, Object.keys(fields)));
    const read = Object.entries(fields).map(([name, field]) => {
      const given = Object.hasOwn(value, name) ? value[name as never] : undefined;
      return [name, field(given, { ...place, path: `${prefix}${name}` })];
    });
    return Object.fromEntries(read) as Values<F>;
  };
}

/** The same where it may be left out, for the sake of its defaults. */
export function section<F extends Record<string, Reader<unknown>>>(fields: F): Reader<Values<F>> {
  const read = object(fields);
  return (value = {}, place) => read(value, place);
}

export function list<T>(expected: string, test: (value: unknown) => value is T): Reader<readonly T[]> {
  return is(expected, (value): value is readonly T[] => Array.isArray(value) && value.every(test));
}

/** A whole number, of ms or bytes where `unit` says so. */
export function whole(min: number, max = MAX_INT32, unit = ''): Reader<number> {
  const isWhole = (value: unknown): value is number =>
    Number.isInteger(value) && Number(value) >= min && Number(value) <= max;
  return is(`a whole number ${unit === '' ? '' : `of ${unit} `}from ${min} to ${max}`, isWhole);
}

export function oneOf<const T extends string>(...choices: readonly T[]): Reader<T> {
  const isChoice = (value: unknown): value is T => choices.includes(value as T);
  return is(choices.map((choice) => `"${choice}"`).join(' or '), isChoice);
}

/** Text that is not empty; `expected` says what it means. */
export function text(expected: string): Reader<string> {
  return is(expected, (value): value is string => isString(value) && value !== '');
}

export const ms = whole(1, MAX_INT32, 'ms');
export const string = is('a string', isString);
export const boolean = is('a boolean', (value) => typeof value === 'boolean');
export const strings = list('a list of strings', isString);
export const stringRecord = is('an object of strings', isStringRecord);
export const path = text('the path of a file');
export const url = is('a URL', (value): value is string => isString(value) && URL.canParse(value));
/** What `isFunction` may call: its parameters are for its caller to know. */
export const callable = is('a function', isFunction);

export function isObject(value: unknown): value is object {
  return typeof value === 'object' && value !== null && !Array.isArray(value);
}

export function isFunction(value: unknown): value is (...values: never[]) => unknown {
  return typeof value === 'function';
}

export function isString(value: unknown): value is string {
  return typeof value === 'string';
}

function isStringRecord(value: unknown): value is Readonly<Record<string, string>> {
  return isObject(value) && Object.values(value).every(isString);
}

function misspelt(prefix: string, name: string, known: readonly string[]): string {
  const isName = /^[\w$-]{1,40}$/.test(name);
  const shown = isName ? `\`${prefix}${name}\`` : quote(name);
  const meant = isName ? nearest(name, known) : undefined;
  const hint =
    meant === undefined
      ? `there are ${known.map((each) => `\`${each}\``).join(', ')}`
      : `did you mean \`${prefix}${meant}\`?`;
  return `unknown option ${shown}; ${hint}`;
}

/** Which of the known names was meant by a misspelt one; undefined where none is near. */
export function nearest(name: string, known: readonly string[]): string | undefined {
  const [best] = known
    .map((each) => ({ each, edits: distance(name.toLowerCase(), each.toLowerCase()) }))
    .filter(({ each, edits }) => edits <= Math.max(2, each.length / 3) && edits < Math.min(name.length, each.length))
    .sort((a, b) => a.edits - b.edits);
  return best?.each;
}

/** Letters to add, take away or change (Levenshtein). */
function distance(a: string, b: string): number {
  let row = Array.from({ length: b.length + 1 }, (_, i) => i);
  for (let i = 0; i < a.length; i += 1) {
    const next = [i + 1];
    for (let j = 0; j < b.length; j += 1) {
      next.push(Math.min(next[j]! + 1, row[j + 1]! + 1, row[j]! + (a[i] === b[j] ? 0 : 1)));
    }
    row = next;
  }
  return row[b.length]!;
}
