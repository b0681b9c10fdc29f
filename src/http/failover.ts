import { codeOf, isKedgeError } from '../errors.ts';
import { isLost } from './errors.ts';

/**
 * What an error says of the attempt that it ended.
 *
 * - `unsent`: the connection was never made; nothing of the request left.
 * - `unprocessed`: the kedge says that it did not act on it (RFC 9113 §6.8, §8.7).
 * - `lost`: nobody knows whether it acted.
 * - `final`: it is about the request itself, or the time is up; another attempt would not help.
 */
export type Outcome = 'unsent' | 'unprocessed' | 'lost' | 'final';

/** RFC 9110 §9.2.2, with QUERY (draft-ietf-httpbis-safe-method-w-body). */
const IDEMPOTENT = new Set(['GET', 'HEAD', 'OPTIONS', 'TRACE', 'PUT', 'DELETE', 'QUERY']);
const NGHTTP2_REFUSED_STREAM = 7;

export function outcomeOf(error: unknown, started: boolean): Outcome {
  if (isKedgeError(error)) {
    // A dial that fails after the start: undici had taken the request back from a connection that turned it away.
    if (error.stage === 'dns' || error.stage === 'connect' || error.stage === 'tls')
      return started ? 'unprocessed' : 'unsent';
    return error.code === 'ERR_KEDGE_CONNECTION' ? 'lost' : 'final';
  }
  const { http2ErrorCode, message } = (error ?? {}) as { http2ErrorCode?: unknown; message?: unknown };
  // undici has no code for these two; they come only for streams that the kedge's GOAWAY leaves out.
  if (http2ErrorCode === NGHTTP2_REFUSED_STREAM || /NGHTTP2_REFUSED_STREAM/.test(String(message))) return 'unprocessed';
  if (/"GOAWAY" frame received/.test(String(message))) return 'unprocessed';
  return isLost(codeOf(error)) ? 'lost' : 'final';
}

export function isIdempotent(method: string, idempotent: boolean | undefined): boolean {
  return idempotent ?? IDEMPOTENT.has(method);
}

/**
 * Bounds what retries add in a bad hour: each request earns a part of a retry, and each retry spends one (the "retry budget"
 * of Finagle and Envoy). A few are there from the start.
 */
export class RetryBudget {
  private readonly share: number;
  private tokens = 10;

  constructor(share: number) {
    this.share = share;
    if (share === 0) this.tokens = 0;
  }

  earn(): void {
    if (this.tokens < 100) this.tokens += this.share;
  }

  spend(): boolean {
    if (this.tokens < 1) return false;
    this.tokens -= 1;
    return true;
  }
}
