import type { IdentitySnapshot } from '../identity/identity.ts';
import { KedgeError } from '../support/errors.ts';
import { at } from '../support/timer.ts';

const HOUR_MS = 60 * 60 * 1000;
/** The share of its life after which a certificate should have been replaced; cert-manager does it there. */
const DUE = 2 / 3;

/**
 * Warns about certificates that nobody replaces: at two thirds of their life, and when an hour is left. One for all kedges
 * that show the same certificate.
 */
export class ExpiryWarnings {
  private readonly onWarning: (warning: Error) => void;
  private readonly watched = new Map<string, { users: number; stop: () => void }>();

  constructor(onWarning: (warning: Error) => void) {
    this.onWarning = onWarning;
  }

  /** Watches until the returned function is called, as when another certificate has taken over. */
  watch(snapshot: IdentitySnapshot): () => void {
    const key = `${snapshot.serial} ${snapshot.notAfter.getTime()}`;
    let entry = this.watched.get(key);
    if (entry === undefined) {
      entry = { users: 0, stop: this.start(snapshot) };
      this.watched.set(key, entry);
    }
    entry.users += 1;
    let isOver = false;
    return () => {
      if (isOver) return;
      isOver = true;
      entry.users -= 1;
      if (entry.users > 0) return;
      entry.stop();
      this.watched.delete(key);
    };
  }

  private start({ subject, serial, notBefore, notAfter }: IdentitySnapshot): () => void {
    const [from, until] = [notBefore.getTime(), notAfter.getTime()];
    const due = from + (until - from) * DUE;
    const warn = (reason: string) => {
      const what = `the client certificate ${subject} (serial ${serial}) ${reason}; it ends at ${notAfter.toISOString()}`;
      this.onWarning(new KedgeError('ERR_KEDGE_IDENTITY_EXPIRED', what));
    };
    const times: [number, string][] = [[due, 'has spent two thirds of its life']];
    // A certificate that lives for less is renewed more often than by the hour.
    if (until - HOUR_MS > due) times.push([until - HOUR_MS, 'has an hour left']);
    const stops = times.map(([time, reason]) => at(new Date(time), () => warn(reason)));
    return () => {
      for (const stop of stops) stop();
    };
  }
}
