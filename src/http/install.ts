import type { DispatcherLike } from '../options.ts';
import { hide } from '../support/redact.ts';
import type { HttpDispatcher } from './dispatcher.ts';
import { dispatchTo, type Fallback, globalDispatchers } from './fallback.ts';
import { GLOBAL_DISPATCHER, LEGACY_GLOBAL_DISPATCHER } from './hush.ts';
import { Dispatcher, Dispatcher1Wrapper } from './undici.ts';

const SYMBOLS = { current: GLOBAL_DISPATCHER, legacy: LEGACY_GLOBAL_DISPATCHER } as const;
const KINDS = ['current', 'legacy'] as const;
type Kind = (typeof KINDS)[number];
const globals = globalThis as unknown as Record<symbol, unknown>;

/** The installs that are in force, in whatever order they will be undone. */
const installs = new Set<Installed>();
/** What the others replaced. */
const undone = new WeakMap<object, Record<Kind, DispatcherLike>>();

/**
 * What every undici in the process, built in or not, has for its global dispatcher while a dialer is installed: the
 * dialer, and from the undo on, or the dialer's end, what it replaced. So it does no harm where others have kept or
 * wrapped it.
 *
 * undici's own `setGlobalDispatcher()` is not used: for Node 22 and 24 it installs a wrapper that allows HTTP/1.1 only
 * (https://github.com/nodejs/undici/issues/4989).
 */
export class Installed extends Dispatcher {
  private dialer: HttpDispatcher | undefined;
  private readonly fallback: Fallback;
  private readonly replaced: Record<Kind, DispatcherLike>;

  constructor(dialer: HttpDispatcher, fallback: Fallback) {
    super();
    // Node's own undici comes with the first use of these globals, and makes its agent global only where nothing is.
    void globalThis.Response;
    const { current, legacy } = globalDispatchers();
    this.dialer = dialer;
    this.fallback = fallback;
    // Where nothing was set, the undo leaves undici's default: an undici that came meanwhile has found us and set none.
    this.replaced = {
      current: settled(current, 'current'),
      legacy: settled(legacy ?? (new Dispatcher1Wrapper(current as Dispatcher) as DispatcherLike), 'legacy'),
    };
    hide(this, 'KedgeDispatcher');
    fallback.replaced = this.replaced;
    installs.add(this);
    // As undici defines it; where it is defined, only the value changes.
    for (const kind of KINDS) {
      if (SYMBOLS[kind] in globals) globals[SYMBOLS[kind]] = this;
      else Object.defineProperty(globals, SYMBOLS[kind], { value: this, writable: true, configurable: true });
    }
  }

  /** Restores each of the two where it is still ours; idempotent. */
  undo(): void {
    if (this.dialer === undefined) return;
    this.dialer = undefined;
    this.fallback.replaced = undefined;
    installs.delete(this);
    undone.set(this, this.replaced);
    for (const kind of KINDS) {
      if (globals[SYMBOLS[kind]] === this) globals[SYMBOLS[kind]] = this.replaced[kind];
      for (const { replaced } of installs) if (replaced[kind] === this) replaced[kind] = this.replaced[kind];
    }
  }

  override dispatch(options: Dispatcher.DispatchOptions, handler: Dispatcher.DispatchHandler): boolean {
    const { dialer } = this;
    if (dialer === undefined || dialer.closed) return dispatchTo(this.replaced, options, handler);
    return dialer.dispatch(options, handler);
  }

  override close = ((...args: []) => this.end().close(...args)) as Dispatcher['close'];
  override destroy = ((...args: []) => this.end().destroy(...args)) as Dispatcher['destroy'];

  /** What undici's `WebSocket` and `EventSource` ask the global dispatcher for. */
  get webSocketOptions(): unknown {
    return this.target.webSocketOptions;
  }

  get eventSourceOptions(): unknown {
    return this.target.eventSourceOptions;
  }

  private get target(): HttpDispatcher {
    return this.dialer ?? (this.replaced.current as HttpDispatcher);
  }

  private end(): Dispatcher {
    const { target } = this;
    this.undo();
    return target;
  }
}

/** Others may have put back what they kept while it was in force: an install that is undone stands for what it replaced. */
function settled(dispatcher: DispatcherLike, kind: Kind): DispatcherLike {
  // By identity, not by class: the Proxy that `compose()` puts around one of ours is of its class as well.
  const replaced = undone.get(dispatcher);
  return replaced === undefined ? dispatcher : settled(replaced[kind], kind);
}
