import type { DispatcherLike } from '../options.ts';
import { DualHandler, isLegacy, LegacyAdapter } from './handler-versions.ts';
import { LEGACY_GLOBAL_DISPATCHER } from './hush.ts';
import type { DispatchOptions } from './request.ts';
import { Agent, Dispatcher, getGlobalDispatcher } from './undici.ts';

/** Lists the dispatchers of ours that have passed a request on, whatever wraps them. */
const PASSED_ON = Symbol('kedge-dialer.passed-on');

type Marked = DispatchOptions & { [PASSED_ON]?: readonly object[] };
type Globals = typeof globalThis & { [LEGACY_GLOBAL_DISPATCHER]?: DispatcherLike };

/** The two global dispatchers: of undici 8 (Node 26), and of undici 6 and 7 (Node 22 and 24). */
export interface GlobalDispatchers {
  current: DispatcherLike;
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

  /** Always true: nobody would tell our caller by `'drain'` that the other dispatcher is ready again. */
  dispatch(self: object, options: DispatchOptions, handler: object): true {
    const passedOn = (options as Marked)[PASSED_ON] ?? [];
    // request() of undici 6 and 7 leaves the caller's `dispatcher` in the options, where their own dispatchers refuse it.
    const marked = { ...options, dispatcher: undefined, [PASSED_ON]: [...passedOn, self] };
    if (passedOn.includes(self)) this.own.dispatch(marked, modern(handler));
    else if (this.option !== undefined) this.option.dispatch(marked as never, ofAnyAge(this.option, handler) as never);
    else dispatchTo(this.replaced ?? globalDispatchers(), marked, handler);
    return true;
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
}

/** The default of an undici that has none, because something was set when it loaded and is not any more. */
let spare: Agent | undefined;

/** What is global now. */
export function globalDispatchers(): GlobalDispatchers {
  // Not read from the symbol: undici has a default of its own while nothing is set.
  let current: Dispatcher | undefined = getGlobalDispatcher();
  if (current === undefined) {
    spare ??= new Agent();
    current = spare;
  }
  return {
    current: current as DispatcherLike,
    legacy: (globalThis as Globals)[LEGACY_GLOBAL_DISPATCHER],
  };
}

/** A handler goes to the global dispatcher of its own kind, so that neither has to be translated. */
export function dispatchTo({ current, legacy }: GlobalDispatchers, options: object, handler: object): boolean {
  if (legacy !== undefined && isLegacy(handler)) return legacy.dispatch(options as never, handler as never);
  return current.dispatch(options as never, modern(handler) as never);
}

function modern(handler: object): Dispatcher.DispatchHandler {
  return isLegacy(handler) ? new LegacyAdapter(handler) : handler;
}

/** For a dispatcher of another undici, whose age we cannot see, a handler has both contracts. */
function ofAnyAge(dispatcher: DispatcherLike, handler: object): Dispatcher.DispatchHandler {
  return dispatcher instanceof Dispatcher ? modern(handler) : new DualHandler(modern(handler));
}
