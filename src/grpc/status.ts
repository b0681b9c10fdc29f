import { Metadata, type StatusObject, type status } from '@grpc/grpc-js';
import { isKedgeError, KedgeError, rpcStatusOf } from '../support/errors.ts';

/** A status that carries what we know; grpc-js copies it onto the `ServiceError`, where it is the `cause`. */
export type KedgeStatus = StatusObject & { cause: KedgeError };

/** The end of a call that failed before or outside the backend. */
export function statusOf(error: unknown, target: string, code?: status): KedgeStatus {
  const cause = isKedgeError(error)
    ? error.for(target)
    : new KedgeError('ERR_KEDGE_CONNECTION', 'the call failed', { target, cause: error });
  const own = code ?? (rpcStatusOf(cause.code) as status);
  return { code: own, details: cause.message, metadata: new Metadata(), cause };
}
