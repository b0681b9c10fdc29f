import { Metadata, type StatusObject, status } from '@grpc/grpc-js';
import { isKedgeError, KedgeError } from '../errors.ts';
import { rpcCode } from '../rpc-code.ts';

/** A status that carries what we know; grpc-js copies it onto the `ServiceError`, where it is the `cause`. */
export type KedgeStatus = StatusObject & { cause: KedgeError };

/** The end of a call that failed before or outside the backend. */
export function statusOf(error: unknown, target: string, code?: status): KedgeStatus {
  const cause = isKedgeError(error)
    ? error.for(target)
    : new KedgeError('ERR_KEDGE_CONNECTION', 'kedge', 'the call failed', { target, cause: error });
  const own = code ?? (rpcCode(cause.code) as status);
  return { code: own, details: cause.message, metadata: new Metadata(), cause };
}

/** grpc-js's own words for a call whose connection failed; it has no code for them. */
const LOST =
  /^(?:No connection established|Name resolution failed|Connection dropped|Failed to connect|Channel closed before)/;

/** What grpc-js received, with its cause where that is a lost connection. */
export function lostStatus(received: StatusObject, target: string, kedge: string | undefined): StatusObject {
  if (received.code !== status.UNAVAILABLE || !LOST.test(received.details)) return received;
  const cause = new KedgeError('ERR_KEDGE_CONNECTION', 'kedge', received.details, { target, kedge });
  const lost: KedgeStatus = { ...received, details: cause.message, cause };
  return lost;
}
