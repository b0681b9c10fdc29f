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

const PREVIOUS_ATTEMPTS = 'grpc-previous-rpc-attempts';
/** What a stream can end with when its session does: not what the caller, or a deadline, ends a call with. */
const OF_SESSIONS: readonly status[] = [
  status.UNAVAILABLE,
  status.INTERNAL,
  status.RESOURCE_EXHAUSTED,
  status.PERMISSION_DENIED,
];
const CANCELLED_BY_SERVER = 'Call cancelled';

export function isUnsent(received: StatusObject): boolean {
  return received.code === status.UNAVAILABLE && isGrpcJsOwn(received) && UNSENT.test(received.details);
}

export function isLost(received: StatusObject): boolean {
  return received.code === status.UNAVAILABLE && isGrpcJsOwn(received) && LOST.test(received.details);
}

/** Whether it may be that of a stream whose session was ended by GOAWAY. */
export function maySpeakOfSession(received: StatusObject): boolean {
  const { code, details } = received;
  return (OF_SESSIONS.includes(code) || details === CANCELLED_BY_SERVER) && isGrpcJsOwn(received);
}

/** How many attempts of its own grpc-js made before the one that this is the status of. */
export function previousAttempts({ metadata }: StatusObject): number {
  return Number(metadata.get(PREVIOUS_ATTEMPTS)[0] ?? 0);
}

/**
 * A status that came over the wire without headers before it has headers with it, `content-type` at least: whatever its
 * text says, it was an answer. grpc-js adds the count of its attempts to those of its own.
 */
function isGrpcJsOwn({ metadata }: StatusObject): boolean {
  return Object.keys(metadata.getMap()).every((name) => name === PREVIOUS_ATTEMPTS);
}

/** What grpc-js received, with its cause where that is the connection. */
export function lostStatus(received: StatusObject, target: string, kedge: string | undefined): StatusObject {
  if (!isLost(received) && !isUnsent(received)) return received;
  const cause = new KedgeError('ERR_KEDGE_CONNECTION', 'kedge', received.details, { target, kedge });
  const lost: KedgeStatus = { ...received, details: cause.message, cause };
  return lost;
}
