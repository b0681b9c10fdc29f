import type { Core } from './core.ts';
import type { Plan } from './plan.ts';

/** The kedges of its route that one call has been to, by their place in the route. */
export class Tried {
  private readonly core: Core;
  private readonly plan: Plan;
  private readonly tried = new Set<number>();

  constructor(core: Core, plan: Plan) {
    this.core = core;
    this.plan = plan;
  }

  /** How many a call may be sent to. */
  get most(): number {
    return Math.min(this.core.options.failover.attempts, this.plan.endpoints.length);
  }

  /** The one to be tried next; -1 when it has been to as many as it may. */
  next(): number {
    const { tried } = this;
    if (tried.size >= this.most) return -1;
    return this.core.kedges.choose(this.plan.endpoints, tried.size === 0 ? undefined : tried);
  }

  add(index: number): void {
    this.tried.add(index);
  }

  /** It has not failed the call after all. */
  delete(index: number): void {
    this.tried.delete(index);
  }

  get isExhausted(): boolean {
    return this.tried.size >= this.most;
  }

  clear(): void {
    this.tried.clear();
  }
}
