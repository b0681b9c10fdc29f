import { execFile } from 'node:child_process';
import {
  check,
  is,
  isString,
  object,
  optional,
  or,
  stringRecord,
  strings,
  type Table,
  text,
} from '../support/shape.ts';
import { CACHE, type CachedTokenOptions, cachedToken, type FetchedToken } from './cached-token.ts';
import { type TokenSource, tokenError } from './token-source.ts';

/** Options of {@link execToken}. */
export interface ExecTokenOptions extends CachedTokenOptions {
  /** A program, found on the PATH unless it is a path; no shell is involved. */
  command: string;
  args?: readonly string[];
  /** Besides the process's own. */
  env?: Readonly<Record<string, string>>;
  /**
   * Where the token is in the JSON that the command prints, such as `{.credential.access_token}` for
   * `gcloud config config-helper --format=json`. Default: the command speaks the ExecCredential protocol of client-go.
   */
  tokenPath?: string;
  /** Where its expiry is, an RFC 3339 time: `{.credential.token_expiry}`. Default: it has none. */
  expiryPath?: string;
}

const API_VERSIONS = ['client.authentication.k8s.io/v1', 'client.authentication.k8s.io/v1beta1'];
const MAX_OUTPUT_BYTES = 1024 * 1024;
const PATH = /^\{?((?:\.[\w-]+)+)\}?$/;

const jsonPath = is(
  'a path such as {.credential.access_token}',
  (value): value is string => isString(value) && PATH.test(value),
);
const OPTIONS = object({
  ...CACHE,
  command: text('a program'),
  args: or(strings, []),
  env: or(stringRecord, {}),
  tokenPath: optional(jsonPath),
  expiryPath: optional(jsonPath),
} satisfies Table<ExecTokenOptions>);

/**
 * A token that a command prints: the exec credential plugins of client-go
 * (https://kubernetes.io/docs/reference/access-authn-authz/authentication/#client-go-credential-plugins), or a command
 * such as gcloud's with JSON paths. What it prints appears in no error.
 *
 * @example
 * ```ts
 * import { execToken } from 'kedge-dialer';
 *
 * const gcloud = execToken({
 *   command: 'gcloud',
 *   args: ['config', 'config-helper', '--format=json'],
 *   tokenPath: '{.credential.access_token}',
 *   expiryPath: '{.credential.token_expiry}',
 * });
 * ```
 *
 * @throws {@link KedgeError} `ERR_KEDGE_OPTIONS`
 */
export function execToken(options: ExecTokenOptions): TokenSource {
  const given = check('execToken', OPTIONS, options);
  const { command, args, env, tokenPath, expiryPath, deadlineMs, name = command } = given;
  const token = tokenPath === undefined ? undefined : fieldsOf(tokenPath);
  const expiry = expiryPath === undefined ? undefined : fieldsOf(expiryPath);
  const info = { apiVersion: API_VERSIONS[0], kind: 'ExecCredential', spec: { interactive: false } };
  const fullEnv = { KUBERNETES_EXEC_INFO: JSON.stringify(info), ...env };
  const run = async (signal: AbortSignal): Promise<FetchedToken> => {
    const printed = await output(name, command, args, fullEnv, signal);
    if (token === undefined) return credential(name, printed);
    const value = fieldAt(printed, token);
    if (typeof value !== 'string') throw tokenError(name, `the command printed no ${tokenPath}`);
    return { token: value, expiresAt: dateOf(name, expiry && fieldAt(printed, expiry)) };
  };
  return cachedToken(run, { name, deadlineMs });
}

function credential(name: string, printed: unknown): FetchedToken {
  const { apiVersion, kind, status } = (printed ?? {}) as Record<string, unknown>;
  if (kind !== 'ExecCredential' || !API_VERSIONS.includes(apiVersion as string)) {
    throw tokenError(name, `the command printed no ExecCredential of ${API_VERSIONS.join(' or ')}`);
  }
  const { token, expirationTimestamp } = (status ?? {}) as Record<string, unknown>;
  if (typeof token !== 'string') throw tokenError(name, 'the ExecCredential has no status.token');
  return { token, expiresAt: dateOf(name, expirationTimestamp) };
}

function output(
  name: string,
  command: string,
  args: readonly string[],
  env: Readonly<Record<string, string>>,
  signal: AbortSignal,
): Promise<unknown> {
  return new Promise((resolve, reject) => {
    const options = { env: { ...process.env, ...env }, signal, maxBuffer: MAX_OUTPUT_BYTES, encoding: 'utf8' as const };
    execFile(command, [...args], options, (error, stdout) => {
      if (error !== null) {
        const { code } = error as { code?: unknown };
        const how =
          typeof code === 'number' ? `exit status ${code}` : typeof code === 'string' ? code : 'it was killed';
        reject(tokenError(name, `the command failed: ${how}`));
        return;
      }
      try {
        resolve(JSON.parse(stdout));
      } catch {
        reject(tokenError(name, 'what the command printed is not JSON'));
      }
    });
  });
}

function fieldsOf(path: string): string[] {
  return PATH.exec(path)![1]!.slice(1).split('.');
}

function fieldAt(value: unknown, fields: readonly string[]): unknown {
  return fields.reduce<unknown>(
    (at, field) =>
      typeof at === 'object' && at !== null && Object.hasOwn(at, field)
        ? (at as Record<string, unknown>)[field]
        : undefined,
    value,
  );
}

function dateOf(name: string, value: unknown): Date | undefined {
  // Go writes a time that is not set as null.
  if (value === undefined || value === null) return undefined;
  const date = new Date(String(value));
  if (Number.isNaN(date.getTime())) throw tokenError(name, 'the expiry that the command printed is not a time');
  return date;
}
