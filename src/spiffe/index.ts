import { type ClientReadableStream, credentials, Metadata, makeClientConstructor } from '@grpc/grpc-js';
import { debug } from '../debug.ts';
import { isKedgeError, KedgeError } from '../errors.ts';
import { hide } from '../hide.ts';
import type { Identity, IdentitySnapshot } from '../identity/identity.ts';
import { snapshotOf } from '../identity/snapshot.ts';
import { certificatesPem, keyPem } from './der.ts';
import { type Svid, svidsOf } from './messages.ts';

/** Options of {@link spiffeIdentity}. */
export interface SpiffeOptions {
  /** The agent's socket, as a path or `unix:` URI. Default: `SPIFFE_ENDPOINT_SOCKET`. */
  socketPath?: string;
  /** Which of several identities. Default: the first, which the specification calls the default identity. */
  spiffeId?: string;
  /** How long the first certificate may take, in ms. Default: 10 000. */
  timeoutMs?: number;
}

/** An {@link Identity} that a SPIFFE agent keeps up to date. */
export interface SpiffeIdentity extends Identity, AsyncDisposable {
  readonly spiffeId: string;
  /** Ends the stream; the last certificate stays. */
  close(): void;
}

/** Between attempts to reach the agent: at first, and at most, in ms. */
const BACKOFF_MS = 250;
const MAX_BACKOFF_MS = 30_000;
/** The agent answers only callers that send it, so that no browser can be made to ask (SPIFFE Workload Endpoint §3). */
const SECURITY_HEADER = 'workload.spiffe.io';

const Client = makeClientConstructor(
  {
    fetchX509Svid: {
      path: '/SpiffeWorkloadAPI/FetchX509SVID',
      requestStream: false,
      responseStream: true,
      requestSerialize: () => Buffer.alloc(0),
      requestDeserialize: (bytes: Buffer) => bytes,
      responseSerialize: (bytes: Buffer) => bytes,
      responseDeserialize: (bytes: Buffer) => bytes,
    },
  },
  'SpiffeWorkloadAPI',
);
type WorkloadClient = InstanceType<typeof Client> & {
  fetchX509Svid(request: object, metadata: Metadata): ClientReadableStream<Buffer>;
};

/**
 * The X.509-SVID of this workload, from the SPIFFE Workload API
 * (https://github.com/spiffe/spiffe/blob/main/standards/SPIFFE_Workload_API.md): streamed over the agent's Unix socket,
 * rotated as it says, with the trust bundle as CA. Resolves with the first certificate; a lost agent is called again while the
 * last certificate serves. Nothing of it holds the process.
 *
 * @throws `KedgeError` `ERR_KEDGE_IDENTITY` when there is no certificate in time
 */
export async function spiffeIdentity(options: SpiffeOptions = {}): Promise<SpiffeIdentity> {
  const { socketPath = process.env['SPIFFE_ENDPOINT_SOCKET'], spiffeId, timeoutMs = 10_000 } = options;
  if (typeof socketPath !== 'string' || socketPath === '')
    throw invalid('`socketPath` or SPIFFE_ENDPOINT_SOCKET names the agent');
  const stream = new SvidStream(socketPath, spiffeId);
  await stream.first(timeoutMs);
  return stream;
}

class SvidStream implements SpiffeIdentity {
  private readonly wanted: string | undefined;
  private readonly client: WorkloadClient;
  private readonly listeners = new Set<() => void>();
  private readonly ready = Promise.withResolvers<void>();
  private snapshot: IdentitySnapshot | undefined;
  private id = '';
  private call: ClientReadableStream<Buffer> | undefined;
  private retry: NodeJS.Timeout | undefined;
  private failures = 0;
  private problem: Error | undefined;
  private closed = false;

  constructor(socketPath: string, wanted: string | undefined) {
    this.wanted = wanted;
    const target = socketPath.startsWith('unix:') ? socketPath : `unix:${socketPath}`;
    // Proxy variables in the environment are not for a socket of this machine.
    this.client = new Client(target, credentials.createInsecure(), { 'grpc.enable_http_proxy': 0 }) as never;
    hide(this, `SpiffeIdentity(${target})`);
    this.open();
  }

  get spiffeId(): string {
    return this.id;
  }

  async first(timeoutMs: number): Promise<void> {
    const timer = setTimeout(() => {
      const reason = isKedgeError(this.problem) ? this.problem.reason : (this.problem?.message ?? 'no answer');
      this.ready.reject(invalid(`no X.509-SVID within ${timeoutMs} ms: ${reason}`, this.problem));
      this.close();
    }, timeoutMs);
    await this.ready.promise;
    clearTimeout(timer);
  }

  current(): IdentitySnapshot {
    return this.snapshot!;
  }

  subscribe(onChange: () => void): () => void {
    const listener = () => onChange();
    this.listeners.add(listener);
    return () => this.listeners.delete(listener);
  }

  close(): void {
    this.closed = true;
    clearTimeout(this.retry);
    this.call?.cancel();
    this.client.close();
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.close();
  }

  private open(): void {
    const metadata = new Metadata();
    metadata.set(SECURITY_HEADER, 'true');
    const call = this.client.fetchX509Svid({}, metadata);
    this.call = call;
    call.on('data', (bytes: Buffer) => this.receive(bytes));
    // Always followed by 'close'; without a listener it would end the process.
    call.on('error', (error) => {
      this.problem = error;
    });
    call.on('close', () => this.again());
  }

  private again(): void {
    if (this.closed) return;
    const backoff = Math.min(BACKOFF_MS * 2 ** this.failures, MAX_BACKOFF_MS) * (0.5 + Math.random() / 2);
    this.failures += 1;
    debug.identity('SPIFFE agent: %s; again in %d ms', this.problem?.message ?? 'the stream ended', backoff);
    this.retry = setTimeout(() => this.open(), backoff);
    // The first certificate is waited for, later ones are not.
    if (this.snapshot !== undefined) this.retry.unref();
  }

  private receive(bytes: Buffer): void {
    try {
      const svids = svidsOf(bytes);
      const svid = this.wanted === undefined ? svids[0] : svids.find(({ spiffeId }) => spiffeId === this.wanted);
      if (svid === undefined) throw invalid(`the agent has no ${this.wanted ?? 'X.509-SVID'} for this workload`);
      this.snapshot = snapshotOfSvid(svid);
      this.id = svid.spiffeId;
    } catch (error) {
      // What was good before stays.
      this.problem = error as Error;
      debug.identity('SPIFFE agent: %s', (error as Error).message);
      return;
    }
    this.failures = 0;
    debug.identity('%s, serial %s: received', this.id, this.snapshot.serial);
    this.ready.resolve();
    for (const listener of [...this.listeners]) listener();
  }
}

function snapshotOfSvid({ chain, key, bundle }: Svid): IdentitySnapshot {
  return snapshotOf({ cert: certificatesPem(chain), key: keyPem(key), ca: certificatesPem(bundle) });
}

function invalid(reason: string, cause?: unknown): KedgeError {
  return new KedgeError('ERR_KEDGE_IDENTITY', 'config', `spiffeIdentity: ${reason}`, { cause });
}
