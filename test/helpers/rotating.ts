import { type Identity, pem } from '../../src/index.ts';
import type { TestKedge } from './kedge.ts';

export interface RotatingIdentity extends Identity {
  /** Publishes a new certificate, and gives its serial number. */
  rotate(): Promise<string>;
  readonly subscribers: number;
}

/** A client identity that the kedge trusts and the test rotates. */
export function rotating(kedge: Pick<TestKedge, 'ca' | 'client'>): RotatingIdentity {
  const listeners = new Set<() => void>();
  const snapshot = (cert: string, key: string) => pem({ cert, key, ca: kedge.ca.cert }).current();
  let current = snapshot(kedge.client.cert, kedge.client.key);
  return {
    current: () => current,
    subscribe: (listener) => {
      listeners.add(listener);
      return () => listeners.delete(listener);
    },
    rotate: async () => {
      const { cert, key, serial } = await kedge.ca.issue({ cn: 'pod' });
      current = snapshot(cert, key);
      for (const listener of listeners) listener();
      return serial;
    },
    get subscribers() {
      return listeners.size;
    },
  };
}
