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

// grpc-js has no code for these; its own words tell them apart.

/** The call never left: no connection, or a stream that the kedge turned away unprocessed (RFC 9113 §8.7). */
const UNSENT =
  /^(?:No connection established|Name resolution failed|Failed to connect|Channel closed before|Stream refused)/;
/** The connection of the call failed. */
const LOST = /^(?:Connection dropped|Connection closed|(?:read|write) E[A-Z]+$|socket hang up|other side closed)/;

export function isUnsent(received: StatusObject): boolean {
  return isGrpcJsOwn(received) && UNSENT.test(received.details);
}

export function isLost(received: StatusObject): boolean {
  return isGrpcJsOwn(received) && LOST.test(received.details);
}

/**
 * A status that came over the wire has headers with it, `content-type` at least: whatever its text says, it was an answer.
 * grpc-js adds the count of its attempts to those of its own.
 */
function isGrpcJsOwn({ code, metadata }: StatusObject): boolean {
  if (code !== status.UNAVAILABLE) return false;
  return Object.keys(metadata.getMap()).every((name) => name === 'grpc-previous-rpc-attempts');
}

/** What grpc-js received, with its cause where that is the connection. */
export function lostStatus(received: StatusObject, target: string, kedge: string | undefined): StatusObject {
  if (!isLost(received) && !isUnsent(received)) return received;
  const cause = new KedgeError('ERR_KEDGE_CONNECTION', 'kedge', received.details, { target, kedge });
  const lost: KedgeStatus = { ...received, details: cause.message, cause };
  return lost;
}
