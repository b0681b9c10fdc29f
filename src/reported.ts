import { isKedgeError, KedgeError, type KedgeStage } from './errors.ts';

/** Error types of the original's `X-Kedge-Error-Type` that speak of the backend; all others are the kedge's own. */
const BACKEND_TYPES = new Set([
  'no-backend',
  'backend-transport-closed',
  'no-connection-to-all-resolved-addresses',
  'no-resolution-available',
  'transport-unknown-error',
  'resolver-watcher-irrecoverable',
]);
/** What a kedge says on gRPC, where it gives a status and nothing else. */
const GRPC_DETAILS: Readonly<Record<string, KedgeStage>> = {
  'unknown route to service': 'kedge',
  'unknown backend': 'backend',
};
const UNIMPLEMENTED = 12;
const MAX_REASON = 200;

/**
 * The error that a kedge reported instead of passing the call on: from an HTTP response of any kind (`X-Kedge-Error` and
 * `X-Kedge-Error-Type`), or from a gRPC `ServiceError` or status. Also the `KedgeError` that an error was caused by.
 * Undefined for everything else, such as a backend's own failures.
 */
export function kedgeErrorOf(from: unknown): KedgeError | undefined {
  if (typeof from !== 'object' || from === null) return undefined;
  for (let error: unknown = from, depth = 0; error instanceof Error && depth < 8; error = error.cause, depth += 1) {
    if (isKedgeError(error)) return error;
  }
  const { headers, code, details, cause } = from as {
    headers?: unknown;
    code?: unknown;
    details?: unknown;
    cause?: unknown;
  };
  if (isKedgeError(cause)) return cause;
  if (typeof headers === 'object' && headers !== null) {
    return reportedError(header(headers, 'x-kedge-error'), header(headers, 'x-kedge-error-type'));
  }
  if (code !== UNIMPLEMENTED || typeof details !== 'string' || !Object.hasOwn(GRPC_DETAILS, details)) return undefined;
  return new KedgeError('ERR_KEDGE_REPORTED', GRPC_DETAILS[details]!, `the kedge reports: ${details}`);
}

/** What the two headers of a response say; undefined where a kedge reports nothing. */
export function reportedError(
  message: string | undefined,
  type: string | undefined,
  context: { target?: string; kedge?: string | undefined } = {},
): KedgeError | undefined {
  if (message === undefined && type === undefined) return undefined;
  const stage = type !== undefined && BACKEND_TYPES.has(type) ? 'backend' : 'kedge';
  const said = [type, message].filter(Boolean).join(': ').slice(0, MAX_REASON);
  return new KedgeError('ERR_KEDGE_REPORTED', stage, `the kedge reports: ${said}`, context);
}

/** One header of a `Headers` or of a plain object. */
export function header(headers: object, name: string): string | undefined {
  const get = (headers as { get?: unknown }).get;
  const value: unknown =
    typeof get === 'function' ? get.call(headers, name) : (headers as Record<string, unknown>)[name];
  const first: unknown = Array.isArray(value) ? value[0] : value;
  return typeof first === 'string' ? first : undefined;
}
