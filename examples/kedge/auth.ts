import { timingSafeEqual } from 'node:crypto';
import type { JWTPayload } from 'jose';

/** Decides whether a caller may come in, by its `Proxy-Authorization`. The one gate of all wires. */
export interface Gate {
  admits(proxyAuthorization: string | undefined): boolean | Promise<boolean>;
}

export interface OidcOptions {
  providerUrl: string;
  clientId: string;
  /** The claim that holds the caller's permissions, a list. */
  permsClaim: string;
  /** Any one of them suffices. */
  perms: readonly string[];
}

/** Signatures by public key only: a token cannot choose to be checked with something that everybody knows. */
const ALGORITHMS = ['RS256', 'RS384', 'RS512', 'PS256', 'PS384', 'PS512', 'ES256', 'ES384', 'ES512', 'EdDSA'];
const CLOCK_SKEW_SECONDS = 30;

export const openGate: Gate = { admits: () => true };

export function bearerGate(token: string): Gate {
  const wanted = Buffer.from(token);
  return {
    admits: (header) => {
      const given = Buffer.from(bearerOf(header) ?? '');
      return given.length > 0 && given.length === wanted.length && timingSafeEqual(given, wanted);
    },
  };
}

/** Tokens of an OpenID provider (OpenID Connect Discovery 1.0). Rejects when it cannot be asked for its configuration. */
export async function oidcGate({ providerUrl, clientId, permsClaim, perms }: OidcOptions): Promise<Gate> {
  const { createRemoteJWKSet, jwtVerify } = await import('jose');
  const base = providerUrl.replace(/\/$/, '');
  const response = await fetch(`${base}/.well-known/openid-configuration`, { redirect: 'error' });
  const { issuer, jwks_uri: jwks } = (await response.json()) as { issuer: string; jwks_uri: string };
  if (issuer.replace(/\/$/, '') !== base) throw new Error(`the provider at ${base} calls itself ${issuer}`);
  // It keeps the keys, asks once for all who wait, and not again for every unknown key id.
  const keys = createRemoteJWKSet(new URL(jwks));
  const options = {
    issuer,
    audience: clientId,
    algorithms: ALGORITHMS,
    clockTolerance: CLOCK_SKEW_SECONDS,
    requiredClaims: ['exp'],
  };
  return {
    admits: async (header) => {
      const token = bearerOf(header);
      if (token === undefined) return false;
      try {
        const { payload } = await jwtVerify(token, keys, options);
        return permsOf(payload, permsClaim).some((perm) => perms.includes(perm));
      } catch {
        return false;
      }
    },
  };
}

function permsOf(payload: JWTPayload, claim: string): string[] {
  const value = payload[claim];
  return (Array.isArray(value) ? value : [value]).filter((each) => typeof each === 'string');
}

function bearerOf(header: string | undefined): string | undefined {
  // The scheme is in any case (RFC 9110 §11.1).
  return /^bearer +([\x21-\x7e]+)$/i.exec(header ?? '')?.[1];
}
