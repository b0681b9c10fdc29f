import '../support/refuse-old-node.ts';

import type { NetConnectOpts } from 'node:net';
import type { Identity, IdentitySnapshot } from '../identity/identity.ts';
import { Listeners } from '../identity/listeners.ts';
import { sameCredentials, snapshotOf } from '../identity/snapshot.ts';
import { backoff } from '../support/backoff.ts';
import { debug } from '../support/debug.ts';
import { isKedgeError, KedgeError } from '../support/errors.ts';
import { hide } from '../support/redact.ts';
import { check, ms, object, optional, or, string, type Table, text } from '../support/shape.ts';
import { emitWarning, warningListener } from '../support/warnings.ts';
import { certificatesPem, keyPem } from './der.ts';
import { type Svid, svidsOf } from './messages.ts';
import { openStream, Status, type Stream, type StreamError } from './stream.ts';

/** Options of {@link spiffeIdentity}. */
export interface SpiffeOptions {
  /** The agent's socket, as a path, `unix:` or `tcp://ip:port` URI. Default: `SPIFFE_ENDPOINT_SOCKET`. */
  socketPath?: string;
  /** Which of several identities. Default: the first, which the specification calls the default identity. */
  spiffeId?: string;
  /** How long the first certificate may take, in ms. Default: 10 000. */
  timeoutMs?: number;
  /** Told when the agent takes the identity back, or gives none that can be used; the last one stays. Default: `process.emitWarning`. */
  onWarning?: (warning: Error) => void;
}

const OPTIONS = object({
  socketPath: optional(string),
  spiffeId: optional(text('a SPIFFE ID')),
  timeoutMs: or(ms, 10_000),
  onWarning: or(warningListener, emitWarning),
} satisfies Table<SpiffeOptions>);

/** An {@link Identity} that a SPIFFE agent keeps up to date. */
export interface SpiffeIdentity extends Identity, AsyncDisposable {
  readonly spiffeId: string;
  /** Ends the stream; the last certificate stays. */
  close(): void;
}

/** Between attempts to reach the agent: at first, and at most, in ms. */
const BACKOFF_MS = 250;
const MAX_BACKOFF_MS = 30_000;
const METHOD = '/SpiffeWorkloadAPI/FetchX509SVID';

/**
 * The X.509-SVID of this workload, from the SPIFFE Workload API
 * (https://github.com/spiffe/spiffe/blob/main/standards/SPIFFE_Workload_API.md): streamed over the agent's Unix socket,
 * rotated as it says, with the trust bundle as CA. Resolves with the first certificate; a lost agent is called again while the
 * last certificate serves. Nothing of it holds the process.
 *
 * A certificate that the agent takes back, by an answer without it or PERMISSION_DENIED, serves until it expires, and
 * `onWarning` hears of it. The specification would rather have it out of use (§5.2.1: SHOULD), but agents say the same while
 * they cannot tell who asks, such as SPIRE without its kubelet, and who may come in is the kedge's to decide. Who wants it
 * otherwise ends the dialer in `onWarning`.
 *
 * @example
 * ```ts
 * import { createDialer, single } from 'kedge-dialer';
 * import { spiffeIdentity } from 'kedge-dialer/spiffe';
 *
 * const identity = await spiffeIdentity({ socketPath: 'unix:///run/spire/agent.sock' });
 * const dialer = createDialer({ mapper: single('https://us1.kedge.example.com'), identity });
 * ```
 *
 * @throws `KedgeError` `ERR_KEDGE_IDENTITY` when there is no certificate in time
 */
export async function spiffeIdentity(options: SpiffeOptions = {}): Promise<SpiffeIdentity> {
  const given = check('spiffeIdentity', OPTIONS, options, { code: 'ERR_KEDGE_IDENTITY' });
  const { socketPath = process.env['SPIFFE_ENDPOINT_SOCKET'], spiffeId, timeoutMs, onWarning } = given;
  if (!socketPath) throw invalid('`socketPath` or SPIFFE_ENDPOINT_SOCKET names the agent');
  const identity = new SvidStream(socketPath, spiffeId, onWarning);
  await identity.first(timeoutMs);
  return identity;
}

class SvidStream implements SpiffeIdentity {
  private readonly socketPath: string;
  private readonly wanted: string | undefined;
  private readonly onWarning: (warning: Error) => void;
  private readonly listeners = new Listeners();
  private readonly ready = Promise.withResolvers<void>();
  private snapshot: IdentitySnapshot | undefined;
  private id = '';
  private stream: Stream | undefined;
  private retry: NodeJS.Timeout | undefined;
  private failures = 0;
  private problem: Error | undefined;
  private warned = '';

  constructor(socketPath: string, wanted: string | undefined, onWarning: (warning: Error) => void) {
    this.socketPath = socketPath;
    this.wanted = wanted;
    this.onWarning = onWarning;
    hide(this, `SpiffeIdentity(${socketPath})`);
    this.open();
  }

  get spiffeId(): string {
    return this.id;
  }

  async first(timeoutMs: number): Promise<void> {
    const timer = setTimeout(() => {
      this.ready.reject(invalid(`no X.509-SVID within ${timeoutMs} ms: ${reasonOf(this.problem)}`, this.problem));
    }, timeoutMs);
    try {
      await this.ready.promise;
    } catch (error) {
      this.close();
      throw error;
    } finally {
      clearTimeout(timer);
    }
  }

  current(): IdentitySnapshot {
    return this.snapshot!;
  }

  subscribe(onChange: () => void): () => void {
    return this.listeners.add(onChange);
  }

  close(): void {
    clearTimeout(this.retry);
    this.stream?.close();
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.close();
  }

  private open(): void {
    this.stream = openStream(endpointOf(this.socketPath), METHOD, {
      message: (bytes) => this.receive(bytes),
      ended: (error) => this.ended(error),
    });
    // The first certificate is waited for, later ones are not.
    if (this.snapshot !== undefined) this.stream.unref();
  }

  private ended(error: StreamError): void {
    // Why a message was of no use says more than that its stream ended.
    if (error.status !== Status.OK || this.problem === undefined) this.problem = error;
    // These stay as they are however often they are asked for (SPIFFE Workload Endpoint, appendix A).
    if (error.status === Status.INVALID_ARGUMENT || error.status === Status.UNIMPLEMENTED) {
      this.ready.reject(invalid(`the agent refused the call: ${error.message}`, error));
      this.warn(`the agent refused the call, and is not asked again: ${error.message}`, error);
      return;
    }
    // It takes back what it gave before (SPIFFE Workload API §5.2.1), as a message without it does.
    if (error.status === Status.PERMISSION_DENIED) this.warn(`the agent gives no identity: ${error.message}`, error);
    const pauseMs = backoff(this.failures, BACKOFF_MS, MAX_BACKOFF_MS);
    this.failures += 1;
    debug.identity('SPIFFE agent: %s; again in %d ms', error.message, pauseMs);
    this.retry = setTimeout(() => this.open(), pauseMs);
    if (this.snapshot !== undefined) this.retry.unref();
  }

  private receive(bytes: Buffer): void {
    let next: IdentitySnapshot;
    try {
      const svids = svidsOf(bytes);
      const svid = this.wanted === undefined ? svids[0] : svids.find(({ spiffeId }) => spiffeId === this.wanted);
      if (svid === undefined) throw invalid(`the agent has no ${this.wanted ?? 'X.509-SVID'} for this workload`);
      next = snapshotOfSvid(svid);
      this.id = svid.spiffeId;
    } catch (error) {
      // What was good before stays.
      this.problem = error as Error;
      this.warn(reasonOf(error), error);
      return;
    }
    this.failures = 0;
    this.problem = undefined;
    this.warned = '';
    const old = this.snapshot;
    // An agent says it all again to whoever calls again.
    if (old !== undefined && sameCredentials(old, next)) return;
    this.snapshot = next;
    debug.identity('%s, serial %s: received', this.id, next.serial);
    this.stream?.unref();
    this.ready.resolve();
    this.listeners.notify((error) => this.onWarning(invalid('a subscriber failed', error)));
  }

  /** Once for each reason; before the first certificate the caller hears it from the promise. */
  private warn(reason: string, cause: unknown): void {
    debug.identity('SPIFFE agent: %s', reason);
    if (this.snapshot === undefined || reason === this.warned) return;
    this.warned = reason;
    const { serial, notAfter } = this.snapshot;
    this.onWarning(invalid(`${reason}; serial ${serial} stays in use until ${notAfter.toISOString()}`, cause));
  }
}

/** SPIFFE Workload Endpoint §4. */
function endpointOf(socketPath: string): NetConnectOpts {
  const tcp = /^tcp:\/\/(.+):([0-9]+)$/.exec(socketPath);
  if (tcp !== null) return { host: tcp[1]!.replace(/^\[|\]$/g, ''), port: Number(tcp[2]) };
  return { path: socketPath.replace(/^unix:(?:\/\/(?=\/))?/, '') };
}

function reasonOf(error: unknown): string {
  if (isKedgeError(error)) return error.reason.replace(/^spiffeIdentity: /, '');
  return error instanceof Error ? error.message : 'no answer';
}

function snapshotOfSvid({ chain, key, bundle }: Svid): IdentitySnapshot {
  return snapshotOf({ cert: certificatesPem(chain), key: keyPem(key), ca: certificatesPem(bundle) });
}

function invalid(reason: string, cause?: unknown): KedgeError {
  return new KedgeError('ERR_KEDGE_IDENTITY', `spiffeIdentity: ${reason}`, { cause });
}
