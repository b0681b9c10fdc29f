import type { KedgeErrorCode } from './support/errors.ts';

const INVALID_ARGUMENT = 3;
const UNAVAILABLE = 14;
const UNAUTHENTICATED = 16;

const CODES: Partial<Record<KedgeErrorCode, number>> = {
  ERR_KEDGE_TARGET: INVALID_ARGUMENT,
  ERR_KEDGE_ROUTE: INVALID_ARGUMENT,
  ERR_KEDGE_UNMAPPED: INVALID_ARGUMENT,
  ERR_KEDGE_REQUEST: INVALID_ARGUMENT,
  ERR_KEDGE_TOKEN: UNAUTHENTICATED,
  ERR_KEDGE_IDENTITY_EXPIRED: UNAUTHENTICATED,
};

/** The gRPC status of an error before or outside the backend; Connect has the same numbers. */
export function rpcCode(code: KedgeErrorCode): number {
  return CODES[code] ?? UNAVAILABLE;
}
