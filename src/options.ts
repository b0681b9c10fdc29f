import { type PeerPolicy, peerPolicy } from './dial/peer.ts';
import { proxyAddress } from './dial/tunnel.ts';
import { type AnyIdentity, identityReader } from './identity/identity.ts';
import type { Mapper } from './mapper/mapper.ts';
import * as shape from './support/shape.ts';
import { MAX_INT32 } from './support/timer.ts';
import { emitWarning, warningListener } from './support/warnings.ts';

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

const MIB = 1024 * 1024;
const window = shape.whole(65_535, MAX_INT32, 'bytes');

const HTTP = {
  protocol: shape.or(shape.oneOf('auto', 'h1', 'h2'), 'auto'),
  connections: shape.optional(shape.whole(1, 10_000)),
  maxConcurrentStreams: shape.or(shape.whole(1), 1000),
  windowBytes: shape.or(window, 8 * MIB),
  keepAliveTimeoutMs: shape.or(shape.ms, 60_000),
  pingIntervalMs: shape.or(shape.ms, 2_000),
  requestId: shape.or(shape.boolean, true),
  throwOnKedgeError: shape.or(shape.boolean, false),
} satisfies shape.Table<HttpOptions>;

const GRPC = {
  maxConnections: shape.or(shape.whole(1, 10_000), 8),
  maxStreamsPerConnection: shape.or(shape.whole(1), 100),
  windowBytes: shape.or(window, 8 * MIB),
  keepaliveTimeMs: shape.or(shape.ms, 30_000),
  keepaliveTimeoutMs: shape.or(shape.ms, 10_000),
} satisfies shape.Table<GrpcOptions>;

const CONNECT = {
  timeoutMs: shape.or(shape.ms, 5_000),
  handshakeTimeoutMs: shape.or(shape.ms, 5_000),
  /** Infinity: never. */
  maxConnectionAgeMs: shape.or(shape.ms, Number.POSITIVE_INFINITY),
  dnsTtlMs: shape.optional(shape.ms),
  proxy: shape.optional(proxyAddress),
} satisfies shape.Table<ConnectOptions>;

const BREAKER = {
  failures: shape.or(shape.whole(1), 1),
  backoffMs: shape.or(shape.ms, 1_000),
  maxBackoffMs: shape.optional(shape.ms),
} satisfies shape.Table<NonNullable<FailoverOptions['breaker']>>;

const FAILOVER = {
  /** Infinity: every kedge of the route. */
  attempts: shape.or(shape.whole(1), Number.POSITIVE_INFINITY),
  statuses: shape.or(shape.is('a list of statuses from 400 to 599', isStatuses), []),
  retryBudget: shape.or(shape.is('a number from 0 to 1', isShare), 0.2),
  replayBytes: shape.or(shape.whole(0, MAX_INT32, 'bytes'), 65_536),
  breaker: shape.section(BREAKER),
} satisfies shape.Table<FailoverOptions>;

const DIALER = shape.object({
  mapper: shape.is('a function from target to route', (value): value is Mapper => shape.isFunction(value)),
  identity: shape.optional(identityReader),
  peer: shape.or(peerPolicy, {} as PeerPolicy),
  unmapped: shape.or(shape.oneOf('direct', 'reject'), 'direct'),
  fallback: shape.optional(shape.is('an undici Dispatcher', isDispatcher)),
  http: shape.section(HTTP),
  grpc: shape.section(GRPC),
  connect: shape.section(CONNECT),
  failover: shape.section(FAILOVER),
  maxTargets: shape.or(shape.whole(1, 10_000_000), 10_000),
  maxKedges: shape.or(shape.whole(1, 100_000), 64),
  drainTimeoutMs: shape.or(shape.ms, 30_000),
  onWarning: shape.or(warningListener, emitWarning),
} satisfies shape.Table<DialerOptions>);

/**
 * Defaults and validation, without side effects.
 *
 * @throws {@link KedgeError} `ERR_KEDGE_OPTIONS`, naming the option
 */
export function resolveOptions(options: DialerOptions) {
  const { http, failover, ...rest } = shape.check('createDialer', DIALER, options);
  const { connections, ...ownHttp } = http;
  const { backoffMs } = failover.breaker;
  const longest = shape.or(shape.whole(backoffMs, MAX_INT32, 'ms'), Math.max(30_000, backoffMs));
  const path = 'failover.breaker.maxBackoffMs';
  const maxBackoffMs = shape.check('createDialer', longest, failover.breaker.maxBackoffMs, { path });
  return {
    ...rest,
    http: { ...ownHttp, h1Connections: connections ?? 64, h2Connections: connections ?? 4 },
    failover: {
      ...failover,
      statuses: new Set(failover.statuses),
      breaker: { ...failover.breaker, maxBackoffMs },
    },
  };
}

/** {@link DialerOptions} with nothing left open. */
export type ResolvedOptions = Readonly<ReturnType<typeof resolveOptions>>;

function isStatuses(value: unknown): value is readonly number[] {
  return Array.isArray(value) && value.every((each) => Number.isInteger(each) && each >= 400 && each <= 599);
}

function isShare(value: unknown): value is number {
  return typeof value === 'number' && value >= 0 && value <= 1;
}

function isDispatcher(value: unknown): value is DispatcherLike {
  return shape.isObject(value) && shape.isFunction((value as Partial<DispatcherLike>).dispatch);
}
