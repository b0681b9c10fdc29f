import type { DispatcherLike } from '../options.ts';
import { GLOBAL_DISPATCHER, LEGACY_GLOBAL_DISPATCHER } from './hush.ts';
import { DualHandler, isLegacy, LegacyAdapter } from './legacy.ts';
import type { DispatchOptions } from './request.ts';
import { Agent, Dispatcher, getGlobalDispatcher } from './undici.ts';

/** Marks a request that we have already passed on, whatever wrapped us as the global dispatcher. */
const PASSED_ON = Symbol('kedge-dialer.passed-on');

type Globals = typeof globalThis & { [GLOBAL_DISPATCHER]?: unknown; [LEGACY_GLOBAL_DISPATCHER]?: unknown };

/** The two global dispatchers: of undici 8 (and Node 26), and of undici 6 and 7 (Node 22 and 24). */
export interface GlobalDispatchers {
  current: DispatcherLike | undefined;
  legacy: DispatcherLike | undefined;
}

/** Where unmapped requests go: the option, else whatever is global at the time; never ourselves. */
export class Fallback {
  private readonly option: DispatcherLike | undefined;
  /** What `install()` replaced, while it is in force. */
  replaced: GlobalDispatchers | undefined;
  private agent: Agent | undefined;

  constructor(option: DispatcherLike | undefined) {
    this.option = option;
  }

  dispatch(self: DispatcherLike, options: DispatchOptions, handler: object): boolean {
    const looped = (options as { [PASSED_ON]?: unknown })[PASSED_ON] === self;
    const chosen = this.option ?? this.choose(self, isLegacy(handler), looped);
    const marked = this.option === undefined ? { ...options, [PASSED_ON]: self } : options;
    return chosen.dispatch(marked as never, handlerFor(chosen, handler) as never);
  }

  /** An agent of our own, for when the global dispatcher leads back to us, and for undici's defaults. */
  get own(): Agent {
    this.agent ??= new Agent();
    return this.agent;
  }

  async close(): Promise<void> {
    await this.agent?.close();
  }

  async destroy(error: Error | null): Promise<void> {
    await this.agent?.destroy(error);
  }

  /** A handler goes to the global dispatcher of its own kind, so that neither has to be translated. */
  private choose(self: DispatcherLike, legacy: boolean, looped: boolean): DispatcherLike {
    const { current, legacy: old } = this.replaced ?? globalDispatchers();
    const chosen = (legacy ? old : current) ?? current;
    return !looped && chosen !== undefined && chosen !== self ? chosen : (this.own as DispatcherLike);
  }
}

export function globalDispatchers(): GlobalDispatchers {
  return {
    // Not read from the symbol: undici has a default of its own while nothing is installed.
    current: getGlobalDispatcher() as DispatcherLike | undefined,
    legacy: (globalThis as Globals)[LEGACY_GLOBAL_DISPATCHER] as DispatcherLike | undefined,
  };
}

function handlerFor(dispatcher: DispatcherLike, handler: object): object {
  if (dispatcher instanceof Dispatcher) return isLegacy(handler) ? new LegacyAdapter(handler) : handler;
  // Of another undici, whose age we cannot see.
  return isLegacy(handler) ? handler : new DualHandler(handler);
}
