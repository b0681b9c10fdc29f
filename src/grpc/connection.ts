import type { LookupAddress } from 'node:dns';
import type { ClientHttp2Session, Settings } from 'node:http2';
import type { Socket } from 'node:net';
import { Channel, type ChannelOptions, connectivityState, type Deadline, type experimental } from '@grpc/grpc-js';
import { debug } from '../debug.ts';
import { KedgeError } from '../errors.ts';
import type { Connector, DialObserver, DialTimeouts } from '../kedge/connector.ts';
import { watchStreams } from '../kedge/streams.ts';
import { KedgeCredentials } from './credentials.ts';
import { followSockets } from './dialling.ts';
import { Processed } from './processed.ts';

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
  /** Why it is closed, after a failed dial. */
  failure: KedgeError | undefined;
  readonly processed = new Processed();
  private readonly owner: ConnectionOwner;
  private readonly options: ChannelOptions;
  private readonly waiters = new Set<Waiter>();
  /** For DNS and TCP, and again for SETTINGS; the connector has one for TLS. */
  private deadline: NodeJS.Timeout | undefined;
  /** grpc-js targets not tried yet: one for each address family, as it takes no mixture. */
  private targets: string[] = [];
  private channel: Channel | undefined;
  private credentials: KedgeCredentials | undefined;
  private dialError: KedgeError | undefined;
  /** TCP connections that are being made, and then the one that waits for SETTINGS. */
  private readonly dialling = new Set<Socket>();
  private session: ClientHttp2Session | undefined;
  private stopFollowing: (() => void) | undefined;

  constructor(owner: ConnectionOwner, options: ChannelOptions) {
    this.owner = owner;
    this.options = options;
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
    this.deadline?.ref();
  }

  forget(waiter: Waiter): void {
    this.waiters.delete(waiter);
    if (this.waiters.size === 0) this.deadline?.unref();
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
    this.credentials?.close();
    for (const socket of this.dialling) socket.destroy();
    this.setState('closed');
    this.channel?.close();
  }

  private dial(): void {
    const { owner } = this;
    this.dialError = undefined;
    this.startDeadline();
    const credentials = new KedgeCredentials(owner.connector, {
      secured: (socket) => {
        this.dialling.clear();
        this.dialling.add(socket);
        watchStreams(socket, (stream, session) => {
          this.processed.saw(stream, session);
          this.learnLimit(session);
        });
        this.startDeadline(owner.timeouts.handshakeTimeoutMs, 'HTTP/2 SETTINGS');
      },
      failed: (error) => {
        this.dialError = error;
      },
    });
    const channel = new Channel(this.targets.shift()!, credentials, this.options);
    this.credentials = credentials;
    this.channel = channel;
    this.watch(channel);
    this.follow(() => channel.getConnectivityState(true));
  }

  private learnLimit(session: ClientHttp2Session): void {
    if (this.session === session) return;
    this.session = session;
    const learn = ({ maxConcurrentStreams }: Settings) => this.owner.streamLimit(maxConcurrentStreams!);
    learn(session.remoteSettings);
    session.on('remoteSettings', learn);
  }

  private follow(dial: () => void): void {
    const attempted = (socket: Socket, _address: string, port: number) => {
      if (this.state !== 'connecting' || port !== this.owner.connector.endpoint.port) return;
      this.owner.connector.adopt(socket);
      this.dialling.add(socket);
      const failed = (error: Error) => {
        if (this.state === 'connecting') this.dialError = this.owner.connector.connectError(error);
      };
      socket.once('error', failed);
      socket.once('connect', () => {
        socket.off('error', failed);
        this.stopDeadline();
      });
      socket.once('close', () => this.dialling.delete(socket));
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
      this.dialling.clear();
      this.stopDeadline();
      this.stopFollowing?.();
      this.setState('ready');
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
    }
  }

  private startDeadline(ms = this.owner.timeouts.timeoutMs, what = 'TCP connection'): void {
    this.stopDeadline();
    this.deadline = setTimeout(() => {
      this.fail(this.dialError ?? this.own('ERR_KEDGE_CONNECT_TIMEOUT', `no ${what} within ${ms} ms`));
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

function targetsOf(addresses: readonly LookupAddress[], port: number): string[] {
  const families = new Map<number, string[]>();
  for (const { address, family } of addresses) {
    const own = families.get(family) ?? [];
    families.set(family, own);
    own.push(family === 6 ? `[${address}]:${port}` : `${address}:${port}`);
  }
  return [...families].map(([family, own]) => `ipv${family}:${own.join(',')}`);
}
