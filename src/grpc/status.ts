import { Metadata, type StatusObject, status } from '@grpc/grpc-js';
import { isKedgeError, KedgeError, type KedgeErrorCode } from '../errors.ts';

/** A status that carries what we know; grpc-js copies it onto the `ServiceError`, where it is the `cause`. */
export type KedgeStatus = StatusObject & { cause: KedgeError };

const CODES: Partial<Record<KedgeErrorCode, status>> = {
  ERR_KEDGE_TARGET: status.INVALID_ARGUMENT,
  ERR_KEDGE_ROUTE: status.INVALID_ARGUMENT,
  ERR_KEDGE_UNMAPPED: status.INVALID_ARGUMENT,
  ERR_KEDGE_REQUEST: status.INVALID_ARGUMENT,
  ERR_KEDGE_TOKEN: status.UNAUTHENTICATED,
  ERR_KEDGE_IDENTITY_EXPIRED: status.UNAUTHENTICATED,
};

/** The end of a call that failed before or outside the backend. */
export function statusOf(error: unknown, target: string): KedgeStatus {
  const cause = isKedgeError(error)
    ? error.for(target)
    : new KedgeError('ERR_KEDGE_CONNECTION', 'kedge', 'the call failed', { target, cause: error });
  return { code: CODES[cause.code] ?? status.UNAVAILABLE, details: cause.message, metadata: new Metadata(), cause };
}
