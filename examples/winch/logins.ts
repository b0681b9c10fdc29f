import type { WinchLogin } from 'kedge-dialer';

/** Log-ins that people have been asked for. */
export class Logins {
  private readonly waiting = new Map<string, { path: string; resolve(url: URL): void }>();

  readonly open: WinchLogin['open'] = (source, authorization, callback, signal) => {
    console.error(`winch: log in for ${source}: ${authorization.href}`);
    return new Promise((resolve, reject) => {
      const state = authorization.searchParams.get('state') ?? '';
      if (state !== '') this.waiting.set(state, { path: callback.pathname, resolve });
      const stop = () => {
        this.waiting.delete(state);
        reject(signal.reason);
      };
      signal.addEventListener('abort', stop, { once: true });
    });
  };

  /**
   * Somebody came back from logging in; true when that one was expected. Any page may send a browser here: only who brings the
   * state of a log-in ends that one, once (RFC 6749 §10.12).
   */
  end(url: URL): boolean {
    const state = url.searchParams.get('state') ?? '';
    const login = this.waiting.get(state);
    if (login === undefined || login.path !== url.pathname) return false;
    this.waiting.delete(state);
    login.resolve(url);
    return true;
  }
}
