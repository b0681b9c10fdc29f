import type { Metadata } from '@grpc/grpc-js';
import { keepsOwn, type Tokens } from '../engine/credentials.ts';
import { checkCallHeaders } from '../rpc/call-headers.ts';

/** {@link checkCallHeaders} for metadata. */
export function checkMetadata(metadata: Metadata, bringsProxyAuth: boolean, ownBytes: number): void {
  checkCallHeaders(metadata.toHttp2Headers(), bringsProxyAuth, ownBytes);
}

/**
 * Adds the tokens: a caller's own authorization stays unless the route overrides it. `set`, never `add`: a second value
 * ends the connection.
 */
export function setTokens(metadata: Metadata, tokens: Tokens): void {
  if (tokens.proxyAuth !== undefined) metadata.set('proxy-authorization', tokens.proxyAuth);
  if (tokens.backendAuth === undefined) return;
  if (!keepsOwn(tokens) || metadata.get('authorization').length === 0) {
    metadata.set('authorization', tokens.backendAuth);
  }
}
