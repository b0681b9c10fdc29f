/** The original's error types, for `X-Kedge-Error-Type`. */
export type ErrorType =
  | 'unauthorized'
  | 'no-route'
  | 'unknown-route-error'
  | 'no-backend'
  | 'no-resolution-available'
  | 'no-connection-to-all-resolved-addresses'
  | 'transport-unknown-error';

/** Status codes of gRPC that a kedge gives (https://github.com/grpc/grpc/blob/master/doc/statuscodes.md). */
export const GRPC_STATUS = {
  INVALID_ARGUMENT: 3,
  NOT_FOUND: 5,
  PERMISSION_DENIED: 7,
  RESOURCE_EXHAUSTED: 8,
  UNIMPLEMENTED: 12,
  UNAVAILABLE: 14,
  UNAUTHENTICATED: 16,
} as const;

/** Their names as grpc-go writes them. */
export const GRPC_CODES =
  'OK Canceled Unknown InvalidArgument DeadlineExceeded NotFound AlreadyExists PermissionDenied ResourceExhausted FailedPrecondition Aborted OutOfRange Unimplemented Internal Unavailable DataLoss Unauthenticated'.split(
    ' ',
  );

/** Why a request goes nowhere, over HTTP and over gRPC. The text is the kedge's own: it tells nothing of backends. */
export class Refusal extends Error {
  readonly http: number;
  readonly type: ErrorType;
  readonly grpc: keyof typeof GRPC_STATUS;
  readonly backendName: string | undefined;

  constructor(
    http: number,
    type: ErrorType,
    grpc: keyof typeof GRPC_STATUS,
    message: string,
    backendName?: string | undefined,
  ) {
    super(message);
    this.http = http;
    this.type = type;
    this.grpc = grpc;
    this.backendName = backendName;
  }
}

/** What a client is told beside the status, on every wire. */
export function errorHeaders({ message, type, backendName }: Refusal): Record<string, string> {
  const headers = { 'x-kedge-error': message, 'x-kedge-error-type': type };
  return backendName === undefined ? headers : { ...headers, 'x-kedge-backend-name': backendName };
}

export const unauthorized = () => new Refusal(401, 'unauthorized', 'UNAUTHENTICATED', 'unauthorized');

/** Of a 405 (RFC 9110 §15.5.6). */
export const ALLOWED = 'GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS, TRACE';
export const NO_TUNNELS = 'kedge: CONNECT is not served: ask for the target itself\n';
