import { KedgeError } from '../support/errors.ts';

/** A value with the place where it stands, for errors. */
export interface Node {
  readonly value: unknown;
  /** `mapper.json: routes[2].direct.key`. */
  readonly path: string;
}

export type Reader<T> = (node: Node) => T;

/** One line: file, JSON path, what is wrong. */
export function wrong(path: string, reason: string, cause?: unknown): KedgeError {
  return new KedgeError('ERR_KEDGE_ROUTE', `${path}: ${reason}`, { cause });
}

/**
 * JSON as everybody reads it, but for what readers differ in: a key that stands twice is an error (RFC 8259 §4).
 *
 * @throws {@link KedgeError} `ERR_KEDGE_ROUTE`
 */
export function parseJson(file: string, text: string): unknown {
  let value: unknown;
  try {
    value = JSON.parse(text);
  } catch (cause) {
    // V8 quotes the text around the mistake, which may hold a token.
    const [at] = /(?:line \d+ column \d+|position \d+)/.exec((cause as Error).message) ?? [];
    throw wrong(file, `not JSON${at === undefined ? '' : `, at ${at}`}`);
  }
  refuseDoubles(file, text);
  return value;
}

/** A string, or what opens, closes or separates; the text is known to be JSON. */
const TOKEN = /"(?:[^"\\]|\\.)*"|[{}[\],:]/g;

function refuseDoubles(file: string, text: string): void {
  const scopes: { keys: Set<string> | undefined; path: string; index: number; key: string }[] = [];
  let last = '';
  for (const [token] of text.matchAll(TOKEN)) {
    const scope = scopes.at(-1);
    const at = scope === undefined ? '' : scope.keys === undefined ? `${scope.path}[${scope.index}]` : scope.key;
    if (token === '{' || token === '[') {
      scopes.push({ keys: token === '{' ? new Set() : undefined, path: at, index: 0, key: '' });
    } else if (token === '}' || token === ']') {
      scopes.pop();
    } else if (token === ',' && scope?.keys === undefined) {
      scope!.index += 1;
    } else if (token === ':') {
      const key = JSON.parse(last) as string;
      scope!.key = scope!.path === '' ? key : `${scope!.path}.${key}`;
      if (scope!.keys!.has(key)) throw wrong(`${file}: ${scope!.key}`, 'is there twice');
      scope!.keys!.add(key);
    }
    last = token;
  }
}

export const text: Reader<string> = ({ value, path }) => {
  if (typeof value === 'string') return value;
  throw wrong(path, 'expected a string');
};

/** An enum of protobuf JSON: by name or by number. */
export function oneOf<T extends string>(...choices: readonly T[]): Reader<T> {
  return ({ value, path }) => {
    const choice = typeof value === 'number' ? choices[value] : choices.find((each) => each === value);
    if (choice !== undefined) return choice;
    throw wrong(path, `expected ${choices.join(' or ')}`);
  };
}

export function list<T>(read: Reader<T>): Reader<T[]> {
  return ({ value, path }) => {
    if (!Array.isArray(value)) throw wrong(path, 'expected a list');
    return value.map((each, i) => read({ value: each, path: `${path}[${i}]` }));
  };
}

/**
 * An object of protobuf JSON, so every name may be snake_case or camelCase; `null` is as good as absent. Anything but the
 * given fields is an error.
 */
export function object<T extends object>(fields: { [K in keyof T]: Reader<T[K]> }): Reader<Partial<T>> {
  return ({ value, path }) => {
    if (typeof value !== 'object' || value === null || Array.isArray(value)) throw wrong(path, 'expected an object');
    const result: Partial<T> = {};
    const seen = new Set<string>();
    for (const [key, each] of Object.entries(value)) {
      const camel = key.replace(/_([a-z])/g, (_, letter: string) => letter.toUpperCase());
      const at = path.endsWith(':') ? `${path} ${key}` : `${path}.${key}`;
      if (!Object.hasOwn(fields, camel))
        throw wrong(at, `unknown; there are ${Object.keys(fields).map(snake).join(', ')}`);
      if (seen.has(camel)) throw wrong(at, 'is there twice');
      seen.add(camel);
      if (each !== null) result[camel as keyof T] = fields[camel as keyof T]({ value: each, path: at });
    }
    return result;
  };
}

function snake(name: string): string {
  return name.replace(/[A-Z]/g, (letter) => `_${letter.toLowerCase()}`);
}
