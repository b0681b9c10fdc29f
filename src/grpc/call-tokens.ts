import type { CallCredentials, experimental, Metadata, status } from '@grpc/grpc-js';
import { debug } from '../debug.ts';
import { hide } from '../hide.ts';
import { type CallTokens, ownBytes } from '../kedge/call-headers.ts';
import type { Plan } from '../mapper/router.ts';
import { ComposedCredentials } from './call-credentials.ts';
import { checkMetadata, setTokens } from './metadata.ts';

/** The tokens of one call: from the route's sources, beside what the caller brings, onto the wire. */
export class RouteTokens {
  private readonly plan: Plan;
  private readonly authority: string;
  private readonly method: string;
  private tokens: CallTokens;

  /** Takes what is at hand. */
  constructor(plan: Plan, authority: string, method: string) {
    this.plan = plan;
    this.authority = authority;
    this.method = method;
    hide(this, `RouteTokens(${authority}${method})`);
    this.tokens = this.of(plan.proxyAuth?.peek(), plan.backendAuth?.peek());
  }

  /** Whether nothing has to be waited for. */
  get areThere(): boolean {
    const { proxyAuth, backendAuth } = this.tokens;
    return (
      (this.plan.proxyAuth === undefined || proxyAuth !== undefined) &&
      (this.plan.backendAuth === undefined || backendAuth !== undefined)
    );
  }

  async wait(signal: AbortSignal): Promise<void> {
    const { proxyAuth, backendAuth } = this.plan;
    this.tokens = this.of(...(await Promise.all([proxyAuth?.wait(signal), backendAuth?.wait(signal)])));
  }

  /** @throws {@link KedgeError} `ERR_KEDGE_REQUEST` when the caller's metadata would hurt other calls */
  check(metadata: Metadata): void {
    checkMetadata(metadata, this.plan.proxyAuth !== undefined, this.ownBytes);
  }

  /** Gives them to grpc-js's call, with the metadata that it is to be started with. */
  give(
    call: experimental.CallStream,
    metadata: Metadata,
    caller: CallCredentials | undefined,
    fail: (error: Error, code?: status) => void,
  ): void {
    const { tokens } = this;
    if (caller === undefined) {
      setTokens(metadata, tokens);
      return;
    }
    // The backend's token waits for what the caller's credentials give: theirs wins.
    if (tokens.overrideAuthorization && tokens.backendAuth !== undefined) metadata.remove('authorization');
    setTokens(metadata, { ...tokens, backendAuth: undefined });
    call.setCredentials(new ComposedCredentials(caller, { metadata, tokens, ownBytes: this.ownBytes, fail }));
  }

  /** Whoever refused them, the sources may have fresh ones for the next call; this one may have been acted upon. */
  invalidate(): void {
    for (const name of ['proxyAuth', 'backendAuth'] as const) {
      try {
        this.plan[name]?.invalidate(this.tokens[name]);
      } catch (error) {
        // The source's own trouble: the call has its status, whatever that says.
        debug.auth('%s: invalidate() failed: %s', this.plan[name]?.source.name, (error as Error)?.name);
      }
    }
  }

  private get ownBytes(): number {
    return ownBytes(this.authority, this.method, this.tokens);
  }

  private of(proxyAuth: string | undefined, backendAuth: string | undefined): CallTokens {
    return { proxyAuth, backendAuth, overrideAuthorization: this.plan.overrideAuthorization };
  }
}
