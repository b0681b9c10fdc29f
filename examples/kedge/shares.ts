/** How long a client waits for its share, in ms, and how many of its requests may. */
const WAIT_MS = 10_000;
const MAX_WAITING = 1_000;

interface Client {
  taken: number;
  readonly waiting: ((isAdmitted: boolean) => void)[];
}

/**
 * What each client may have under way at one backend, so that no client takes all there is: what is above its share waits
 * for what that same client has, and nobody else does.
 */
export class Shares {
  private readonly clients = new Map<string, Client>();
  private readonly share: () => number;

  constructor(share: () => number) {
    this.share = share;
  }

  /** True, or whether it became true in time; each true is given back with {@link release}. */
  take(name: string): true | Promise<boolean> {
    let client = this.clients.get(name);
    if (client === undefined) {
      client = { taken: 0, waiting: [] };
      this.clients.set(name, client);
    }
    if (client.taken < this.share()) {
      client.taken += 1;
      return true;
    }
    const { waiting } = client;
    if (waiting.length >= MAX_WAITING) return Promise.resolve(false);
    return new Promise((resolve) => {
      const settle = (isAdmitted: boolean) => {
        clearTimeout(late);
        resolve(isAdmitted);
      };
      const late = setTimeout(() => {
        waiting.splice(waiting.indexOf(settle), 1);
        resolve(false);
      }, WAIT_MS);
      waiting.push(settle);
    });
  }

  release(name: string): void {
    const client = this.clients.get(name)!;
    const next = client.waiting.shift();
    if (next !== undefined) {
      next(true);
      return;
    }
    client.taken -= 1;
    if (client.taken === 0) this.clients.delete(name);
  }
}
