import { is } from '../support/shape.ts';

/**
 * A client certificate that may change while calls flow. One identity may serve several dialers; an implementation that
 * watches something stops with its last subscriber.
 */
export interface Identity<Snapshot extends AnySnapshot = IdentitySnapshot> {
  /** The snapshot that new connections use. */
  current(): Snapshot;
  /** Calls `onChange` after each change of {@link Identity.current}; returns the way to stop. */
  subscribe(onChange: () => void): () => void;
}

/** One certificate with its key, as a set that fits together. Never changes; a rotation is a new snapshot. */
export interface IdentitySnapshot {
  /** The client certificate and the chain behind it, PEM. */
  readonly cert?: string | Buffer | undefined;
  /** The private key, PEM. */
  readonly key?: string | Buffer | undefined;
  /** A PKCS#12 container in place of `cert` and `key`. */
  readonly pfx?: Buffer | undefined;
  readonly passphrase?: string | undefined;
  /** The CAs that may sign a kedge's certificate, PEM, instead of the system's. */
  readonly ca?: string | Buffer | undefined;
  /** The certificate's subject, for people. */
  readonly subject: string;
  /** The certificate's serial number, hexadecimal. */
  readonly serial: string;
  readonly notBefore: Date;
  readonly notAfter: Date;
}

/** No certificate: only the CAs that may sign a kedge's, for kedges that are called without one, such as with tokens. */
export interface TrustSnapshot {
  /** The CAs that may sign a kedge's certificate, PEM, instead of the system's. */
  readonly ca: string | Buffer;
  readonly cert?: undefined;
  readonly key?: undefined;
  readonly pfx?: undefined;
  readonly passphrase?: undefined;
  readonly subject?: undefined;
  readonly serial?: undefined;
  readonly notBefore?: undefined;
  readonly notAfter?: undefined;
}

/** A certificate, or CAs alone: `notAfter` tells. */
export type AnySnapshot = IdentitySnapshot | TrustSnapshot;

/** What a dialer takes: an {@link Identity} with a certificate, or one that only says whom to trust. */
export type AnyIdentity = Identity<AnySnapshot>;

export const identityReader = is('an identity such as pem({ cert, key })', isIdentity);

/** Whether `value` can be used as an {@link Identity}. */
function isIdentity(value: unknown): value is AnyIdentity {
  if (typeof value !== 'object' || value === null) return false;
  const { current, subscribe } = value as Partial<Record<keyof AnyIdentity, unknown>>;
  return typeof current === 'function' && typeof subscribe === 'function';
}
