import type { LookupAddress } from 'node:dns';
import type { ClientHttp2Session, Settings } from 'node:http2';
import type { Socket } from 'node:net';
import { Channel, type ChannelOptions, connectivityState, type Deadline, type experimental } from '@grpc/grpc-js';
import { debug } from '../debug.ts';
import { KedgeError } from '../errors.ts';
import type { Connector, DialObserver, DialTimeouts } from '../kedge/connector.ts';
import { keepAlive } from '../kedge/keep-alive.ts';
import { watchStreams } from '../kedge/streams.ts';
import { KedgeCredentials } from './credentials.ts';
import { followSockets } from './dialling.ts';
import { Processed } from './processed.ts';

/** How long a kedge may take to close its half of a connection that is closed, in ms. */
const CLOSE_MS = 1_000;

/** How long a socket may take. */
interface Limit {
  readonly timer: NodeJS.Timeout;
  /** Bytes that had been read when it began. */
  readonly before: number;
}

/** A call that waits for a connection. */
export interface Waiter {
  ready(connection: Connection): void;
  failed(connection: Connection, error: KedgeError): void;
}

/** `lost`: it was there, and what is left of its calls is ending. `closed` is final, also after a failed dial. */
export type ConnectionState = 'connecting' | 'ready' | 'lost' | 'closed';

/** What a connection belongs to. */
export interface ConnectionOwner {
  readonly connector: Connector;
  /** Hears of what the connector cannot know. */
  readonly observer: DialObserver;
  readonly timeouts: DialTimeouts;
  /** The kedge's own limit of streams on a connection (RFC 9113 §6.5.2), which grpc-js keeps to itself. */
  streamLimit(limit: number): void;
  changed(connection: Connection): void;
}

/**
 * One grpc-js channel that never shares its subchannel, so that it is one TLS connection, to addresses that both wires
 * agree on. The deadlines that grpc-js lacks for TCP and SETTINGS are here, and so is the reason of a failed dial. A dial
 * that fails ends the connection: grpc-js would dial on in the background, behind the breaker's back.
 */
export class Connection {
  /** Calls on it, those that wait for it too. */
  calls = 0;
  state: ConnectionState = 'connecting';
  /** When the dial began, on the clock of `performance.now()`. */
  readonly since = performance.now();
  /** When it had its last call. */
  idleSince = this.since;
  /** Why it is closed, after a failed dial. */
  failure: KedgeError | undefined;
  readonly processed = new Processed();
  private readonly owner: ConnectionOwner;
  private readonly options: ChannelOptions;
  /** Whether calls use all addresses: otherwise they race, and one is enough. */
  private readonly usesAll: boolean;
  private readonly waiters = new Set<Waiter>();
  /** For what no socket is there for yet: the look-up, and calls that grpc-js dials for again by itself. */
  private deadline: NodeJS.Timeout | undefined;
  /** grpc-js targets not tried yet: one for each address family, as it takes no mixture. */
  private targets: string[] = [];
  private channel: Channel | undefined;
  private credentials: KedgeCredentials | undefined;
  private dialError: KedgeError | undefined;
  /** What waits for TCP or SETTINGS, and how long it may; the connector has a deadline for TLS. */
  private readonly dialling = new Map<Socket, Limit>();
  /** What grpc-js has been given. */
  private readonly sockets = new Set<Socket>();
  private stopFollowing: (() => void) | undefined;

  constructor(owner: ConnectionOwner, options: ChannelOptions) {
    this.owner = owner;
    this.options = options;
    this.usesAll = usesAllAddresses(options);
    this.startDeadline();
    owner.connector.resolve((error, addresses) => {
      if (this.state === 'closed') return;
      if (error !== null) {
        this.fail(error);
        return;
      }
      this.targets = targetsOf(addresses, owner.connector.endpoint.port);
      this.dial();
    });
  }

  /** Hands the connection over as soon as it is there. */
  wait(waiter: Waiter): void {
    this.waiters.add(waiter);
    // Calls that wait hold the process: grpc-js's own timers and sockets do not.
    for (const timer of this.timers) timer.ref();
  }

  forget(waiter: Waiter): void {
    this.waiters.delete(waiter);
    if (this.waiters.size === 0) for (const timer of this.timers) timer.unref();
  }

  createCall(
    method: string,
    deadline: Deadline,
    authority: string,
    parentCall: unknown,
    propagateFlags: number | null | undefined,
  ): experimental.CallStream {
    return this.channel!.createCall(method, deadline, authority, parentCall as never, propagateFlags);
  }

  /** Calls under way go on; grpc-js closes the socket after the last of them. */
  close(): void {
    if (this.state === 'closed') return;
    this.stopDeadline();
    this.stopFollowing?.();
    this.giveUpSilent();
    this.setState('closed');
    this.channel?.close();
    if (this.calls > 0) return;
    // Node waits for the kedge to close its half, too.
    for (const socket of this.sockets) setTimeout(() => socket.destroy(), CLOSE_MS).unref();
  }

  private dial(): void {
    const { owner } = this;
    this.dialError = undefined;
    this.startDeadline();
    const credentials: KedgeCredentials = new KedgeCredentials(owner.connector, {
      secured: (socket) => this.secured(socket),
      failed: (error) => {
        this.dialError = error;
      },
      isWanted: (): boolean => this.isDialling && this.credentials === credentials,
    });
    const channel = new Channel(this.targets.shift()!, credentials, { ...this.options, ...NO_KEEPALIVE });
    this.credentials = credentials;
    this.channel = channel;
    this.watch(channel);
    this.follow(() => channel.getConnectivityState(true));
  }

  private secured(socket: Socket): void {
    this.sockets.add(socket);
    socket.once('close', () => this.sockets.delete(socket));
    let known: ClientHttp2Session | undefined;
    watchStreams(socket, (stream, session) => {
      this.processed.saw(stream, session);
      if (session !== known) this.learn(session, socket);
      known = session;
    });
    this.limit(socket, this.owner.timeouts.handshakeTimeoutMs, 'HTTP/2 SETTINGS');
  }

  /** What grpc-js does not do with a session, or not for us. */
  private learn(session: ClientHttp2Session, socket: Socket): void {
    const { owner, options } = this;
    const learn = ({ maxConcurrentStreams }: Settings) => owner.streamLimit(maxConcurrentStreams!);
    learn(session.remoteSettings);
    session.on('remoteSettings', learn);
    const timeMs = Number(options['grpc.keepalive_time_ms']);
    const timeoutMs = Number(options['grpc.keepalive_timeout_ms']);
    if (!(timeMs > 0)) return;
    keepAlive(session, socket, {
      timeMs,
      timeoutMs,
      isNeeded: () => this.calls > 0 || options['grpc.keepalive_permit_without_calls'] === 1,
      frozen: () => new Error(`nothing arrived within ${timeoutMs} ms of a PING`),
      owner: owner.observer,
    });
  }

  /** Each socket has its own deadline: grpc-js dials several addresses, one after the other and side by side. */
  private limit(socket: Socket, ms: number, what: string): void {
    this.stopLimit(socket);
    const late = () => {
      if (!this.dialling.has(socket)) return;
      if (this.hasSpoken(socket)) {
        this.stopLimit(socket);
        return;
      }
      if (this.state === 'connecting') {
        this.dialError = this.own('ERR_KEDGE_CONNECT_TIMEOUT', `no ${what} within ${ms} ms`);
      }
      this.giveUp(socket);
    };
    // What came while this process stood still is read first.
    const timer = setTimeout(() => setImmediate(late), ms);
    if (this.waiters.size === 0) timer.unref();
    // A plain kedge may have spoken already.
    this.dialling.set(socket, { timer, before: socket.bytesRead - socket.readableLength });
  }

  /** Whether SETTINGS came on one of its sockets: grpc-js does not say on which. */
  private hasSpoken(socket: Socket): boolean {
    return this.state !== 'connecting' && socket.bytesRead > this.dialling.get(socket)!.before;
  }

  private stopLimit(socket: Socket): void {
    clearTimeout(this.dialling.get(socket)?.timer);
    this.dialling.delete(socket);
  }

  /** Whether new sockets are of use. */
  private get isDialling(): boolean {
    return this.state === 'connecting' || this.state === 'lost' || (this.state === 'ready' && this.usesAll);
  }

  /** Ends what is still being dialled: grpc-js would keep it for a while. */
  private giveUpSilent(): void {
    for (const socket of this.dialling.keys()) if (!this.hasSpoken(socket)) this.giveUp(socket);
  }

  private giveUp(socket: Socket): void {
    this.stopLimit(socket);
    socket.destroy();
  }

  private get timers(): NodeJS.Timeout[] {
    const limits = [...this.dialling.values()].map(({ timer }) => timer);
    return this.deadline === undefined ? limits : [...limits, this.deadline];
  }

  private follow(dial: () => void): void {
    const attempted = (socket: Socket, _address: string, port: number) => {
      if (!this.isDialling || port !== this.owner.connector.endpoint.port) return;
      this.stopDeadline();
      this.owner.connector.adopt(socket);
      this.limit(socket, this.owner.timeouts.timeoutMs, 'TCP connection');
      const failed = (error: Error) => {
        if (this.state === 'connecting') this.dialError = this.owner.connector.connectError(error);
      };
      socket.once('error', failed);
      socket.once('connect', () => {
        socket.off('error', failed);
        this.stopLimit(socket);
      });
      socket.once('close', () => this.stopLimit(socket));
    };
    this.stopFollowing?.();
    this.stopFollowing = followSockets(attempted, dial);
  }

  private watch(channel: Channel): void {
    const seen = channel.getConnectivityState(false);
    channel.watchConnectivityState(seen, Number.POSITIVE_INFINITY, () => {
      if (this.channel !== channel || this.state === 'closed') return;
      this.watch(channel);
      this.changed(channel.getConnectivityState(false));
    });
  }

  private changed(now: connectivityState): void {
    if (now === connectivityState.READY) {
      // From here on the socket belongs to grpc-js and the calls on it.
      this.stopDeadline();
      this.setState('ready');
      if (!this.usesAll) {
        this.stopFollowing?.();
        this.giveUpSilent();
      }
      const waiters = [...this.waiters];
      this.waiters.clear();
      for (const waiter of waiters) waiter.ready(this);
    } else if (now === connectivityState.TRANSIENT_FAILURE) {
      if (this.state === 'connecting' && this.targets.length > 0) {
        this.channel!.close();
        this.dial();
        return;
      }
      const reason = 'the kedge closed the connection before it spoke HTTP/2';
      this.fail(this.dialError ?? this.own('ERR_KEDGE_CONNECT', reason));
    } else if (now === connectivityState.IDLE && this.state === 'ready') {
      // grpc-js dials again for calls that it still queues; new ones get a connection of their own.
      this.setState('lost');
      if (this.calls === 0) this.close();
    } else if (now === connectivityState.CONNECTING && this.state === 'lost') {
      this.startDeadline(this.owner.timeouts.timeoutMs + this.owner.timeouts.handshakeTimeoutMs);
    }
  }

  private startDeadline(ms = this.owner.timeouts.timeoutMs): void {
    this.stopDeadline();
    this.deadline = setTimeout(() => {
      this.fail(this.dialError ?? this.own('ERR_KEDGE_CONNECT_TIMEOUT', `no TCP connection within ${ms} ms`));
    }, ms);
    if (this.waiters.size === 0) this.deadline.unref();
  }

  private stopDeadline(): void {
    clearTimeout(this.deadline);
    this.deadline = undefined;
  }

  private own(code: 'ERR_KEDGE_CONNECT' | 'ERR_KEDGE_CONNECT_TIMEOUT', reason: string): KedgeError {
    const error = new KedgeError(code, 'connect', reason, { kedge: this.owner.connector.name });
    debug.dial('%s', error.message);
    this.owner.observer.failed(error);
    return error;
  }

  private fail(error: KedgeError): void {
    this.failure = error;
    this.close();
    const waiters = [...this.waiters];
    this.waiters.clear();
    for (const waiter of waiters) waiter.failed(this, error);
  }

  private setState(state: ConnectionState): void {
    this.state = state;
    if (debug.grpc.enabled) debug.grpc('%s: connection %s, %d calls', this.owner.connector.name, state, this.calls);
    this.owner.changed(this);
  }
}

/** PINGs are ours: grpc-js forgets with each channel that the kedge found them too many, and reads no answer after a pause. */
const NO_KEEPALIVE: ChannelOptions = { 'grpc.keepalive_time_ms': -1 };

/** By the policy that the caller's service config names (gRFC A24); without one, addresses race. */
function usesAllAddresses(options: ChannelOptions): boolean {
  try {
    const { loadBalancingConfig } = JSON.parse(options['grpc.service_config'] ?? '{}');
    const policies = Array.isArray(loadBalancingConfig) ? loadBalancingConfig.map((each) => Object.keys(each)[0]) : [];
    return policies.length > 0 && policies[0] !== 'pick_first';
  } catch {
    return false;
  }
}

function targetsOf(addresses: readonly LookupAddress[], port: number): string[] {
  const families = new Map<number, string[]>();
  for (const { address, family } of addresses) {
    const own = families.get(family) ?? [];
    families.set(family, own);
    own.push(family === 6 ? `[${address}]:${port}` : `${address}:${port}`);
  }
  return [...families].map(([family, own]) => `ipv${family}:${own.join(',')}`);
}
