import { type AnyIdentity, isIdentity } from './identity/identity.ts';
import { type PeerPolicy, peerPolicy } from './kedge/peer.ts';
import { type ProxyAddress, proxyAddress } from './kedge/proxy.ts';
import type { Mapper } from './mapper/mapper.ts';
import { KedgeError } from './support/errors.ts';

/** Anything that dispatches like an undici `Dispatcher`, of any version from 6 on. */
export interface DispatcherLike {
  dispatch(options: never, handler: never): boolean;
}

/** Options of {@link createDialer}. Every duration is in milliseconds. */
export interface DialerOptions {
  /** Decides which targets are kedge destinations, and where they go. */
  mapper: Mapper;
  /** The client certificate shown to kedges, or the CAs alone that sign theirs. Default: none, and the system's CAs. */
  identity?: AnyIdentity;
  /** What kedges have to prove besides their name. Default: nothing more. */
  peer?: PeerPolicy;
  /** Targets that no mapper knows go `direct`, without any of our credentials, or are a `ERR_KEDGE_UNMAPPED`. Default: `direct`. */
  unmapped?: 'direct' | 'reject';
  /** Where unmapped HTTP requests go. Default: the global dispatcher at the time of the call. */
  fallback?: DispatcherLike;
  http?: HttpOptions;
  grpc?: GrpcOptions;
  connect?: ConnectOptions;
  failover?: FailoverOptions;
  /** How many targets the look-up cache remembers. Default: 10 000. */
  maxTargets?: number;
  /** How many kedges stay connected; the least recently used one drains. Default: 64. */
  maxKedges?: number;
  /** How long connections may finish their calls after a rotation, an eviction or `close()`. Default: 30 000. */
  drainTimeoutMs?: number;
  /** Told about what will hurt later. Default: `process.emitWarning`. */
  onWarning?: (warning: Error) => void;
}

/** The HTTP wire. */
export interface HttpOptions {
  /**
   * `auto` takes HTTP/2 where the kedge offers it. On a short path HTTP/1.1 with many connections serves more requests
   * per second than HTTP/2 with few. Default: `auto`.
   */
  protocol?: 'auto' | 'h1' | 'h2';
  /** Connections per kedge. Default: 4 over HTTP/2, 64 over HTTP/1.1. */
  connections?: number;
  /** Requests at a time on one HTTP/2 connection; the kedge's own limit wins. Default: 1000. */
  maxConcurrentStreams?: number;
  /** HTTP/2 receive window of a stream, in bytes; it bounds the throughput over distance. Default: 8 MiB. */
  windowBytes?: number;
  /** How long an idle connection stays open. Default: 60 000. */
  keepAliveTimeoutMs?: number;
  /** HTTP/2 PING interval. Default: 2 000. */
  pingIntervalMs?: number;
  /** Send `X-Kedge-Request-ID`; the caller's own value wins. Default: true. */
  requestId?: boolean;
  /**
   * Raise an error that the kedge itself reports (`X-Kedge-Error`) as a `KedgeError`, where it would be a response with
   * status 4xx or 5xx. Default: false.
   */
  throwOnKedgeError?: boolean;
}

/** The gRPC wire. */
export interface GrpcOptions {
  /** Connections per kedge and set of channel options. Default: 8. */
  maxConnections?: number;
  /** Calls on one connection before another opens. Default: 100. */
  maxStreamsPerConnection?: number;
  /** HTTP/2 receive window, in bytes. Default: 8 MiB. */
  windowBytes?: number;
  /** PING interval while calls are under way. Default: 30 000. */
  keepaliveTimeMs?: number;
  /** How long a PING may stay unanswered. Default: 10 000. */
  keepaliveTimeoutMs?: number;
}

/** Dialling, for both wires. */
export interface ConnectOptions {
  /** Name look-up and TCP. Default: 5 000. */
  timeoutMs?: number;
  /** The TLS handshake. Default: 5 000. */
  handshakeTimeoutMs?: number;
  /** Connections are replaced at this age, give or take a tenth; their calls finish. Default: never. */
  maxConnectionAgeMs?: number;
  /** How long the kedge's addresses count. Default: the TTL of the DNS record; 30 000 where none is known. */
  dnsTtlMs?: number;
  /**
   * An HTTP proxy that every kedge is dialled through, by CONNECT: `http://user:password@proxy.example.com:3128`. TLS is end to
   * end. Proxy variables of the environment do not count. Default: none.
   */
  proxy?: string | URL;
}

/** Routes with several kedges. What was never sent may go to any of them; the options bound the rest. */
export interface FailoverOptions {
  /** Kedges that one call tries. Default: every one of its route. */
  attempts?: number;
  /**
   * Statuses for which an idempotent HTTP request is sent to the next kedge, such as 503. Default: none; a kedge's answer is
   * an answer.
   */
  statuses?: readonly number[];
  /** Requests sent again because the first attempt may have been lost, as a share of all. Default: 0.2. */
  retryBudget?: number;
  /** Bytes of a one-shot HTTP body that are kept so that it can be sent again. Default: 64 KiB. */
  replayBytes?: number;
  /** When calls that have another kedge avoid one that cannot be dialled. */
  breaker?: {
    /** Failed dials in a row. Default: 1. */
    failures?: number;
    /** How long they avoid it at first; doubled with each failure. Default: 1 000. */
    backoffMs?: number;
    /** At least `backoffMs`. Default: 30 000, or `backoffMs` where that is more. */
    maxBackoffMs?: number;
  };
}

/** {@link DialerOptions} with nothing left open. */
export interface ResolvedOptions {
  readonly mapper: Mapper;
  readonly identity: AnyIdentity | undefined;
  readonly peer: PeerPolicy;
  readonly unmapped: 'direct' | 'reject';
  readonly fallback: DispatcherLike | undefined;
  readonly http: Readonly<Required<Omit<HttpOptions, 'connections'>>> & {
    readonly h1Connections: number;
    readonly h2Connections: number;
  };
  readonly grpc: Readonly<Required<GrpcOptions>>;
  readonly connect: {
    readonly timeoutMs: number;
    readonly handshakeTimeoutMs: number;
    /** Infinity: never. */
    readonly maxConnectionAgeMs: number;
    readonly dnsTtlMs: number | undefined;
    readonly proxy: ProxyAddress | undefined;
  };
  readonly failover: {
    /** Infinity: every kedge of the route. */
    readonly attempts: number;
    readonly statuses: ReadonlySet<number>;
    readonly retryBudget: number;
    readonly replayBytes: number;
    readonly breaker: Readonly<Required<NonNullable<FailoverOptions['breaker']>>>;
  };
  readonly maxTargets: number;
  readonly maxKedges: number;
  readonly drainTimeoutMs: number;
  readonly onWarning: (warning: Error) => void;
}

const MIB = 1024 * 1024;
/** The largest HTTP/2 window (RFC 9113 §6.9.1), and the longest timer that Node keeps. */
const MAX_INT32 = 2 ** 31 - 1;

/**
 * Defaults and validation, without side effects.
 *
 * @throws {@link KedgeError} `ERR_KEDGE_OPTIONS`, naming the option
 */
export function resolveOptions(options: DialerOptions): ResolvedOptions {
  const top = new Section('', options);
  const mapper = top.take('mapper', undefined, 'a function', (v): v is Mapper => typeof v === 'function');
  if (mapper === undefined) throw top.invalid('mapper', 'is required: a function from target to route');
  const identity = top.take('identity', undefined, 'an identity such as pem({ cert, key })', isIdentity);
  const peer = peerPolicy(top.take('peer', {}, 'an object', isObject));
  const unmapped = top.oneOf('unmapped', 'direct', ['direct', 'reject']);
  const fallback = top.take('fallback', undefined, 'an undici Dispatcher', isDispatcher);
  const maxTargets = top.integer('maxTargets', 10_000, 1, 10_000_000);
  const maxKedges = top.integer('maxKedges', 64, 1, 100_000);
  const drainTimeoutMs = top.integer('drainTimeoutMs', 30_000, 1);
  const onWarning = top.take(
    'onWarning',
    emitWarning,
    'a function',
    (v): v is typeof emitWarning => typeof v === 'function',
  );

  const h = new Section('http.', top.take('http', {}, 'an object', isObject));
  const connections = h.integer('connections', undefined, 1, 10_000);
  const http = {
    protocol: h.oneOf('protocol', 'auto', ['auto', 'h1', 'h2']),
    h1Connections: connections ?? 64,
    h2Connections: connections ?? 4,
    maxConcurrentStreams: h.integer('maxConcurrentStreams', 1000, 1),
    windowBytes: h.integer('windowBytes', 8 * MIB, 65_535),
    keepAliveTimeoutMs: h.integer('keepAliveTimeoutMs', 60_000, 1),
    pingIntervalMs: h.integer('pingIntervalMs', 2_000, 1),
    requestId: h.take('requestId', true, 'a boolean', isBoolean),
    throwOnKedgeError: h.take('throwOnKedgeError', false, 'a boolean', isBoolean),
  };
  h.end();

  const g = new Section('grpc.', top.take('grpc', {}, 'an object', isObject));
  const grpc = {
    maxConnections: g.integer('maxConnections', 8, 1, 10_000),
    maxStreamsPerConnection: g.integer('maxStreamsPerConnection', 100, 1),
    windowBytes: g.integer('windowBytes', 8 * MIB, 65_535),
    keepaliveTimeMs: g.integer('keepaliveTimeMs', 30_000, 1),
    keepaliveTimeoutMs: g.integer('keepaliveTimeoutMs', 10_000, 1),
  };
  g.end();

  const c = new Section('connect.', top.take('connect', {}, 'an object', isObject));
  const proxy = c.take(
    'proxy',
    undefined,
    'a URL',
    (v): v is string | URL => typeof v === 'string' || v instanceof URL,
  );
  const connect = {
    timeoutMs: c.integer('timeoutMs', 5_000, 1),
    handshakeTimeoutMs: c.integer('handshakeTimeoutMs', 5_000, 1),
    maxConnectionAgeMs: c.integer('maxConnectionAgeMs', undefined, 1) ?? Number.POSITIVE_INFINITY,
    dnsTtlMs: c.integer('dnsTtlMs', undefined, 1),
    proxy: proxy === undefined ? undefined : proxyAddress(proxy),
  };
  c.end();

  const f = new Section('failover.', top.take('failover', {}, 'an object', isObject));
  const b = new Section('failover.breaker.', f.take('breaker', {}, 'an object', isObject));
  const backoffMs = b.integer('backoffMs', 1_000, 1);
  const failover = {
    attempts: f.integer('attempts', undefined, 1) ?? Number.POSITIVE_INFINITY,
    statuses: new Set(f.take('statuses', [], 'a list of statuses from 400 to 599', isStatuses)),
    retryBudget: f.take('retryBudget', 0.2, 'a number from 0 to 1', isShare),
    replayBytes: f.integer('replayBytes', 65_536, 0),
    breaker: {
      failures: b.integer('failures', 1, 1),
      backoffMs,
      maxBackoffMs: b.integer('maxBackoffMs', Math.max(30_000, backoffMs), backoffMs),
    },
  };
  b.end();
  f.end();
  top.end();
  return {
    mapper,
    identity,
    peer,
    unmapped,
    fallback,
    http,
    grpc,
    connect,
    failover,
    maxTargets,
    maxKedges,
    drainTimeoutMs,
    onWarning,
  };
}

/** One level of the options; whatever was not taken by the end is a mistake. */
class Section {
  private readonly prefix: string;
  private readonly values: Record<string, unknown>;
  private readonly known = new Set<string>();

  constructor(prefix: string, values: unknown) {
    this.prefix = prefix;
    if (!isObject(values)) throw new KedgeError('ERR_KEDGE_OPTIONS', 'createDialer() takes an object');
    this.values = values as Record<string, unknown>;
  }

  take<T, D extends T | undefined>(
    name: string,
    fallback: D,
    expected: string,
    is: (value: unknown) => value is T,
  ): T | D {
    this.known.add(name);
    const value = Object.hasOwn(this.values, name) ? this.values[name] : undefined;
    if (value === undefined) return fallback;
    if (!is(value)) throw this.invalid(name, `is ${expected}`);
    return value;
  }

  integer<D extends number | undefined>(name: string, fallback: D, min: number, max = MAX_INT32): number | D {
    const is = (value: unknown): value is number =>
      Number.isInteger(value) && Number(value) >= min && Number(value) <= max;
    return this.take(name, fallback, `a whole number from ${min} to ${max}`, is);
  }

  oneOf<T extends string>(name: string, fallback: T, choices: readonly T[]): T {
    const is = (value: unknown): value is T => choices.includes(value as T);
    return this.take(name, fallback, choices.map((choice) => `"${choice}"`).join(' or '), is);
  }

  end(): void {
    const unknown = Object.keys(this.values).find((name) => !this.known.has(name));
    if (unknown !== undefined)
      throw this.invalid(unknown, `is not an option; there are: ${[...this.known].join(', ')}`);
  }

  invalid(name: string, reason: string): KedgeError {
    return new KedgeError('ERR_KEDGE_OPTIONS', `\`${this.prefix}${name}\` ${reason}`);
  }
}

function isObject(value: unknown): value is object {
  return typeof value === 'object' && value !== null && !Array.isArray(value);
}

function isBoolean(value: unknown): value is boolean {
  return typeof value === 'boolean';
}

function isStatuses(value: unknown): value is readonly number[] {
  return Array.isArray(value) && value.every((each) => Number.isInteger(each) && each >= 400 && each <= 599);
}

function isShare(value: unknown): value is number {
  return typeof value === 'number' && value >= 0 && value <= 1;
}

function isDispatcher(value: unknown): value is DispatcherLike {
  return isObject(value) && typeof (value as Partial<DispatcherLike>).dispatch === 'function';
}

function emitWarning(warning: Error): void {
  process.emitWarning(warning);
}
