import { readFileSync } from 'node:fs';
import { parseArgs } from 'node:util';

/** Flags by name, with their defaults, which say of what type they are. */
export type Flags = Readonly<Record<string, string | number | boolean>>;

/**
 * Flags as the original takes them: `--flag=value`, `--flag value`, and for booleans `--flag` too. One that `ignored`
 * knows has no meaning here and is warned about; any other is an error.
 */
export function readFlags<T extends Flags>(
  defaults: T,
  ignored: RegExp,
  args: readonly string[],
): { values: T; warnings: string[] } {
  const warnings: string[] = [];
  const given: string[] = [];
  const options: Record<string, { type: 'string' }> = Object.fromEntries(
    Object.keys(defaults).map((name) => [name, { type: 'string' }]),
  );
  for (const [i, arg] of args.entries()) {
    const [, name, value] = /^--([a-z0-9_]+)(=.*)?$/s.exec(arg) ?? [];
    if (name !== undefined && !Object.hasOwn(defaults, name) && ignored.test(name)) {
      warnings.push(`--${name} has no meaning here and is ignored`);
      options[name] = { type: 'string' };
    }
    const isBoolean = name !== undefined && typeof defaults[name] === 'boolean';
    const isBare = value === undefined && !/^(?:true|false)$/.test(args[i + 1] ?? '');
    given.push(isBoolean && isBare ? `${arg}=true` : arg);
  }
  const { values } = parseArgs({ args: given, options });
  const result: Record<string, string | number | boolean> = { ...defaults };
  for (const [name, text] of Object.entries(values)) {
    if (Object.hasOwn(defaults, name)) result[name] = convert(name, defaults[name]!, text as string);
  }
  return { values: result as T, warnings };
}

function convert(name: string, example: string | number | boolean, text: string): string | number | boolean {
  if (typeof example === 'string') return text;
  if (typeof example === 'boolean') {
    if (text === 'true' || text === 'false') return text === 'true';
    throw new Error(`--${name} is true or false`);
  }
  // "any" is a port of the system's choice; 0 is none, as in the original.
  if (name.endsWith('_port') && text === 'any') return -1;
  if (/^[0-9]{1,9}$/.test(text) && !(name.endsWith('_port') && Number(text) > 65_535)) return Number(text);
  throw new Error(`--${name} is ${name.endsWith('_port') ? 'a port, 0 for none, or "any"' : 'a number'}`);
}

/** A configuration, by path or inline. */
export interface Source {
  readonly name: string;
  readonly path: string | undefined;
  read(): string;
}

/** Of `--<name>_path`, or of `--<name>` with the JSON itself; both or none are errors. */
export function configSource(name: string, path: string, inline: string): Source {
  if ((path === '') === (inline === '')) throw new Error(`either --${name}_path or --${name} is required`);
  if (path !== '') return { name: path, path, read: () => readFileSync(path, 'utf8') };
  return { name: `--${name}`, path: undefined, read: () => inline };
}
