import { readFileSync } from 'node:fs';
import { parseArgs } from 'node:util';

type Value = string | number | boolean;
/** Flags by name, with their defaults, which say of what type they are. */
export type Flags = Readonly<Record<string, Value>>;

/** Lists may be given in parts, as pflag has it. */
const LIST = /(?:_files|_perms|_expressions|_origin)$/;

/**
 * Flags as the original takes them: `--flag=value`, `--flag value`, and for booleans `--flag` too; dashes are underscores. Those
 * of `ignored` are warned about, with the reason that stands there; any other is an error.
 */
export function readFlags<T extends Flags>(
  defaults: T,
  ignored: Readonly<Record<string, string>>,
  args: readonly string[],
): { values: T; warnings: string[] } {
  const warnings: string[] = [];
  const given = args.map((arg, i) => {
    const [, dashed, value] = /^--([a-z0-9_-]+)(=.*)?$/s.exec(arg) ?? [];
    if (dashed === undefined) return arg;
    const name = dashed.replaceAll('-', '_');
    if (Object.hasOwn(ignored, name)) warnings.push(`--${name} is ignored: ${ignored[name]}`);
    const next = args[i + 1];
    const isBare =
      value === undefined &&
      (typeof defaults[name] === 'boolean'
        ? booleanOf(next) === undefined
        : Object.hasOwn(ignored, name) && (next === undefined || next.startsWith('--')));
    return `--${name}${isBare ? '=true' : (value ?? '')}`;
  });
  const names = [...Object.keys(defaults), ...Object.keys(ignored)];
  const options = Object.fromEntries(names.map((name) => [name, { type: 'string', multiple: true } as const]));
  const { values } = parseArgs({ args: given, options });
  const result: Record<string, Value> = { ...defaults };
  for (const [name, texts] of Object.entries(values)) {
    if (!Object.hasOwn(defaults, name)) continue;
    const all = texts as string[];
    result[name] = convert(name, defaults[name]!, LIST.test(name) ? all.join(',') : all.at(-1)!);
  }
  if (!LEVELS.test(String(result['log_level'] ?? 'info')))
    throw new Error('--log_level is debug, info, warning or error');
  return { values: result as T, warnings };
}

const LEVELS = /^(?:trace|debug|info|warn|warning|error|fatal|panic)$/i;

/** What `--help` prints. */
export function helpOf(defaults: Flags, ignored: Readonly<Record<string, string>>): string {
  return [
    'Flags, with their defaults (a port is a number, 0 for none, or "any"; a time is like 1m30s, or seconds):',
    ...Object.entries(defaults).map(([name, value]) => `  --${name}=${value}`),
    'Flags of the original that are taken and ignored:',
    ...Object.entries(ignored).map(([name, reason]) => `  --${name}: ${reason}`),
  ].join('\n');
}

/** Flags as the original's `/debug/flagz` shows them, but for secrets. */
export function flagzOf(defaults: Flags, values: Flags): object {
  const flags = Object.entries(values).map(([name, value]) => ({
    name,
    current_value: /_token_proxy_auth$/.test(name) && value !== '' ? '(hidden)' : String(value),
    default_value: String(defaults[name]),
    is_changed: value !== defaults[name],
  }));
  return { flags };
}

function convert(name: string, example: Value, text: string): Value {
  if (typeof example === 'string') return text;
  if (typeof example === 'boolean') {
    const value = booleanOf(text);
    if (value === undefined) throw new Error(`--${name} is true or false`);
    return value;
  }
  if (name.endsWith('_timeout')) {
    const value = secondsOf(text);
    if (value === undefined) throw new Error(`--${name} is a time such as 40s`);
    return value;
  }
  const isPort = name.endsWith('_port');
  // "any" is a port of the system's choice; 0 is none, as in the original.
  if (isPort && text === 'any') return -1;
  if (/^[0-9]{1,9}$/.test(text) && !(isPort && Number(text) > 65_535)) return Number(text);
  throw new Error(`--${name} is ${isPort ? 'a port, 0 for none, or "any"' : 'a number'}`);
}

/** As Go's `strconv.ParseBool`. */
function booleanOf(text: string | undefined): boolean | undefined {
  if (/^(?:1|t|T|TRUE|true|True)$/.test(text ?? '')) return true;
  return /^(?:0|f|F|FALSE|false|False)$/.test(text ?? '') ? false : undefined;
}

const SECONDS: Readonly<Record<string, number>> = { h: 3600, m: 60, s: 1, ms: 0.001 };

/** As Go's `time.ParseDuration`, from milliseconds up; a bare number is seconds. */
function secondsOf(text: string): number | undefined {
  if (/^[0-9]{1,9}$/.test(text)) return Number(text);
  if (!/^(?:[0-9]+(?:\.[0-9]+)?(?:h|ms|m|s))+$/.test(text)) return undefined;
  const parts = text.matchAll(/([0-9.]+)(h|ms|m|s)/g);
  return [...parts].reduce((sum, [, number, unit]) => sum + Number(number) * SECONDS[unit!]!, 0);
}

/** The file that a flag names; an error names both. */
export function readFlagFile(flag: string, path: string): string {
  try {
    return readFileSync(path, 'utf8');
  } catch (cause) {
    throw new Error(`--${flag}: ${path} cannot be read (${(cause as NodeJS.ErrnoException).code})`, { cause });
  }
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
  if (path !== '') return { name: path, path, read: () => readFlagFile(`${name}_path`, path) };
  return { name: `--${name}`, path: undefined, read: () => inline };
}
