/**
 * A client certificate that may change while calls flow. One identity may serve several dialers; an implementation that
 * watches something stops with its last subscriber.
 */
export interface Identity {
  /** The snapshot that new connections use. */
  current(): IdentitySnapshot;
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

/** Whether `value` can be used as an {@link Identity}. */
export function isIdentity(value: unknown): value is Identity {
  if (typeof value !== 'object' || value === null) return false;
  const { current, subscribe } = value as Partial<Record<keyof Identity, unknown>>;
  return typeof current === 'function' && typeof subscribe === 'function';
}
