/** Those who want to hear of changes; also of several dialers. */
export class Listeners {
  private readonly all = new Set<() => void>();

  get size(): number {
    return this.all.size;
  }

  /** Each call is a subscription of its own, also with the same function; returns the way to end it, once. */
  add(onChange: () => void): () => boolean {
    const listener = () => onChange();
    this.all.add(listener);
    return () => this.all.delete(listener);
  }

  /** One that throws keeps no other from hearing; what it threw is given to `failed`. */
  notify(failed: (error: unknown) => void): void {
    for (const listener of [...this.all]) {
      // Ended by one that heard it before.
      if (!this.all.has(listener)) continue;
      try {
        listener();
      } catch (error) {
        failed(error);
      }
    }
  }
}
