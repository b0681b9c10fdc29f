import { isKedgeError, KedgeError, type KedgeErrorContext, type KedgeStage } from './support/errors.ts';

/** Error types of the original's `X-Kedge-Error-Type` that speak of the backend; all others are the kedge's own. */
const BACKEND_TYPES = new Set([
  'no-backend',
  'backend-transport-closed',
  'no-connection-to-all-resolved-addresses',
  'no-resolution-available',
  'transport-unknown-error',
  'resolver-watcher-irrecoverable',
]);
/**
 * What a kedge says on gRPC, where it gives a status and nothing else: by `<code> <details>`, and only what no backend has
 * reason to say. That leaves out the other refusals of a kedge's gate ("unauthorized", "Bad authorization string").
 */
const GRPC_STATUSES: Readonly<Record<string, KedgeStage>> = {
  '12 unknown route to service': 'kedge',
  '12 unknown backend': 'backend',
  '14 grpc: the connection is unavailable': 'backend',
  '14 the backend cannot be reached': 'backend',
  '16 Request unauthenticated. No proxy-authorization header': 'kedge',
};
const MAX_REASON = 200;

/**
 * The error that a kedge reported instead of passing the call on: from an HTTP response of any kind (`X-Kedge-Error` and
 * `X-Kedge-Error-Type`), or from a gRPC `ServiceError` or status. Also the `KedgeError` that an error was caused by.
 * Undefined for everything else, such as a backend's own failures.
 *
 * On gRPC the two headers tell as well, where a kedge or a gateway before it sends them. A kedge that sends none is known
 * by the words of its status alone: no route, no backend, a backend that cannot be reached, a call without
 * `proxy-authorization`. A backend that says the same in the same words, before any header of its own, cannot be told
 * from the kedge, and other refusals of a kedge's gate (UNAUTHENTICATED) cannot be told from a backend's.
 *
 * @example
 * ```ts
 * import { createDialer, kedgeErrorOf, single } from 'kedge-dialer';
 *
 * const dialer = createDialer({ mapper: single('https://us1.kedge.example.com') });
 * const response = await dialer.fetch('http://orders.us1.example/');
 * const reported = kedgeErrorOf(response);
 * if (reported !== undefined) console.error('the kedge, not the backend:', reported.message);
 * ```
 */
export function kedgeErrorOf(from: unknown): KedgeError | undefined {
  if (typeof from !== 'object' || from === null) return undefined;
  for (let error: unknown = from, depth = 0; error instanceof Error && depth < 8; error = error.cause, depth += 1) {
    if (isKedgeError(error)) return error;
  }
  const { headers, code, details, metadata, cause } = from as Record<string, unknown>;
  if (isKedgeError(cause)) return cause;
  if (typeof headers === 'object' && headers !== null) return reportedBy(headers);
  if (typeof code !== 'number' || code === 0) return undefined;
  if (typeof metadata === 'object' && metadata !== null) {
    const reported = reportedBy(metadata);
    if (reported !== undefined) return reported;
    // A kedge answers with headers and status at once; what comes without was preceded by a backend's headers.
    if (header(metadata, 'content-type') === undefined) return undefined;
  }
  if (typeof details !== 'string') return undefined;
  const said = `${code} ${details}`;
  if (!Object.hasOwn(GRPC_STATUSES, said)) return undefined;
  return new KedgeError('ERR_KEDGE_REPORTED', `the kedge reports: ${details}`, { stage: GRPC_STATUSES[said] });
}

/** What the two headers say, of a `Headers`, a `Metadata` of grpc-js or a plain object. */
export function reportedBy(headers: object, context?: KedgeErrorContext): KedgeError | undefined {
  return reportedError(header(headers, 'x-kedge-error'), header(headers, 'x-kedge-error-type'), context);
}

/** What the two headers of a response say; undefined where a kedge reports nothing. */
export function reportedError(
  message: string | undefined,
  type: string | undefined,
  context: KedgeErrorContext = {},
): KedgeError | undefined {
  if (message === undefined && type === undefined) return undefined;
  const stage = type !== undefined && BACKEND_TYPES.has(type) ? 'backend' : 'kedge';
  const said = [type, message].filter(Boolean).join(': ').slice(0, MAX_REASON);
  return new KedgeError('ERR_KEDGE_REPORTED', `the kedge reports: ${said}`, { ...context, stage });
}

/** One header of a `Headers`, a `Metadata` of grpc-js or a plain object. */
export function header(headers: object, name: string): string | undefined {
  const get = (headers as { get?: unknown }).get;
  const value: unknown =
    typeof get === 'function' ? get.call(headers, name) : (headers as Record<string, unknown>)[name];
  const first: unknown = Array.isArray(value) ? value[0] : value;
  return typeof first === 'string' ? first : undefined;
}
