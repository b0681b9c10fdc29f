import { Core, setCore } from './engine/core.ts';
import { type Explanation, explain } from './explain.ts';
import { HttpDispatcher } from './http/dispatcher.ts';
import { Fallback } from './http/fallback.ts';
import { Installed } from './http/install.ts';
import type { KedgeDispatcher } from './http/types.ts';
import type { Dispatcher } from './http/undici.ts';
import type { KedgeStats } from './kedge/kedge.ts';
import { type DialerOptions, resolveOptions } from './options.ts';
import { KedgeError } from './support/errors.ts';
import { check } from './support/shape.ts';
import { WIRE, type Wire } from './target.ts';

/** What a dialer is doing. */
export interface DialerStats {
  /** Mapped calls under way, on both wires. */
  inFlight: number;
  /** TLS handshakes since the start, on both wires. */
  handshakes: number;
  /** One entry for each kedge that is connected or draining. */
  kedges: KedgeStats[];
}

/** The one owner of routes, identity, tokens and connections; make one for each process, and close it at the end. */
export interface Dialer extends AsyncDisposable {
  /** For `fetch(url, { dispatcher })`, built in or undici's, and for every other undici API. */
  readonly dispatcher: KedgeDispatcher;
  /** The process's `fetch` with this dialer's dispatcher. */
  fetch(input: string | URL | Request, init?: RequestInit): Promise<Response>;
  /**
   * Makes every fetch in the process use this dialer; returns the undo, which the end of the dialer implies. What was
   * global serves unmapped targets. Several dialers may be installed, and undone in any order; one that is installed
   * already stays as it is.
   *
   * @example
   * ```ts
   * import { createDialer, hosts } from 'kedge-dialer';
   *
   * const dialer = createDialer({ mapper: hosts({ 'orders.us1.example': 'https://us1.kedge.example.com' }) });
   * const restore = dialer.install();
   * await fetch('http://orders.us1.example/'); // through the kedge
   * restore();
   * ```
   *
   * @throws {@link KedgeError} `ERR_KEDGE_CLOSED`
   */
  install(): () => void;
  /**
   * What would happen to a call, and why: canonical target, mapper, kedges, TLS name, token sources, certificate and
   * warnings. Nothing is dialled and no token is asked for.
   *
   * @throws {@link KedgeError} `ERR_KEDGE_TARGET`, `ERR_KEDGE_ROUTE`
   */
  explain(target: string | URL, options?: { wire?: Wire }): Explanation;
  /**
   * Connects to the kedge of an HTTP target ahead of the first request, as a readiness probe may want. Resolves when the
   * connection is there, at once for an unmapped target.
   *
   * @throws {@link KedgeError} as the first request would
   */
  warm(target: string | URL): Promise<void>;
  /** A snapshot for metrics. */
  stats(): DialerStats;
  /**
   * Takes no new calls (`ERR_KEDGE_CLOSED`), lets those under way finish for up to `drainTimeoutMs`, closes every
   * connection. Idempotent; nothing of the dialer keeps the process alive afterwards.
   */
  close(): Promise<void>;
  /** Fails the calls under way with `error` (default: `ERR_KEDGE_CLOSED`) and closes every connection now. */
  destroy(error?: Error): Promise<void>;
}

/**
 * Makes a dialer. Nothing is dialled, read or watched before the first call.
 *
 * @example
 * ```ts
 * import { createDialer, pemFiles, suffix } from 'kedge-dialer';
 *
 * await using dialer = createDialer({
 *   mapper: suffix({ match: '*.*.clusters.local', suffix: '.kedge.example.com' }),
 *   identity: pemFiles({ cert: '/tls/tls.crt', key: '/tls/tls.key', ca: '/tls/ca.crt' }),
 * });
 * const response = await dialer.fetch('http://orders.shop.svc.us1.prod.clusters.local:8080/v1/orders');
 * console.log(response.status);
 * ```
 *
 * @throws {@link KedgeError} `ERR_KEDGE_OPTIONS` naming the option that is wrong
 */
export function createDialer(options: DialerOptions): Dialer {
  const resolved = resolveOptions(options);
  if (resolved.peer.dangerouslySkipVerification) {
    resolved.onWarning(new KedgeError('ERR_KEDGE_OPTIONS', 'kedge certificates are not verified: tokens are refused'));
  }
  const core = new Core(resolved);
  const fallback = new Fallback(resolved.fallback);
  const http = new HttpDispatcher(core, fallback);
  const dispatcher = http as Dispatcher as KedgeDispatcher;
  let installed: Installed | undefined;

  const close = async () => {
    installed?.undo();
    await core.close();
    await fallback.close();
  };
  const dialer: Dialer = {
    dispatcher,
    fetch: (input, init) => globalThis.fetch(input, { ...init, dispatcher } as RequestInit),
    install: () => {
      if (core.closed) throw new KedgeError('ERR_KEDGE_CLOSED', 'the dialer is closed');
      if (fallback.replaced === undefined) installed = new Installed(http, fallback);
      const mine = installed;
      return () => mine?.undo();
    },
    explain: (target, options = {}) => explain(core, target, check('explain', WIRE, options).wire),
    warm: (target) => http.warm(target),
    stats: () => ({ inFlight: core.calls.inFlight, handshakes: core.kedges.handshakes, kedges: core.kedges.stats() }),
    close,
    destroy: async (error) => {
      installed?.undo();
      await core.destroy(error);
      await fallback.destroy(error ?? null);
    },
    [Symbol.asyncDispose]: close,
  };
  setCore(dialer, core);
  return Object.freeze(dialer);
}
