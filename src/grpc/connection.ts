import { Channel, type ChannelOptions, connectivityState } from '@grpc/grpc-js';
import { debug } from '../debug.ts';
import { KedgeError } from '../errors.ts';
import type { Connector } from '../kedge/connector.ts';
import { KedgeCredentials } from './credentials.ts';

/** A call that waits for a connection. */
export interface Waiter {
  ready(connection: Connection): void;
  /** False: it waits on, for the next dial. */
  failed(error: KedgeError): boolean;
}

export type ConnectionState = 'connecting' | 'ready' | 'idle' | 'failed' | 'closed';

/** What a connection tells its pool. */
export interface ConnectionEvents {
  changed(connection: Connection): void;
}

/**
 * One grpc-js channel that never shares its subchannel, so that it is one TLS connection. grpc-js keeps it connected; the
 * deadlines that it lacks for TCP and SETTINGS are here, and so is the reason of a failed dial.
 */
export class Connection {
  readonly channel: Channel;
  /** Calls on it, those that wait for it too. */
  calls = 0;
  state: ConnectionState = 'idle';
  private readonly connector: Connector;
  private readonly events: ConnectionEvents;
  private readonly deadlineMs: number;
  private readonly waiters = new Set<Waiter>();
  private failure: KedgeError | undefined;
  private deadline: NodeJS.Timeout | undefined;

  constructor(connector: Connector, options: ChannelOptions, deadlineMs: number, events: ConnectionEvents) {
    this.connector = connector;
    this.events = events;
    this.deadlineMs = deadlineMs;
    const credentials = new KedgeCredentials(connector, (error) => {
      this.failure = error;
    });
    this.channel = new Channel(`dns:///${connector.name}`, credentials, options);
    this.watch();
  }

  /** Hands the connection over as soon as it is there. */
  wait(waiter: Waiter): void {
    this.waiters.add(waiter);
    this.connect();
  }

  forget(waiter: Waiter): void {
    this.waiters.delete(waiter);
    if (this.waiters.size === 0) this.stopDeadline();
  }

  connect(): void {
    if (this.state === 'closed') return;
    this.channel.getConnectivityState(true);
    if (this.state === 'idle') this.setState('connecting');
    // Also holds the process while calls wait: grpc-js's own timers and sockets do not.
    if (this.waiters.size > 0) this.deadline ??= setTimeout(() => this.timeOut(), this.deadlineMs);
  }

  /** Calls under way go on; grpc-js closes the socket after the last of them. */
  close(): void {
    if (this.state === 'closed') return;
    this.stopDeadline();
    this.setState('closed');
    this.channel.close();
  }

  private failWaiters(error: KedgeError): void {
    for (const waiter of [...this.waiters]) if (waiter.failed(error)) this.waiters.delete(waiter);
    if (this.waiters.size === 0) this.stopDeadline();
  }

  private watch(): void {
    if (this.state === 'closed') return;
    const seen = this.channel.getConnectivityState(false);
    this.channel.watchConnectivityState(seen, Number.POSITIVE_INFINITY, () => {
      if (this.state === 'closed') return;
      this.watch();
      this.follow();
    });
  }

  private follow(): void {
    switch (this.channel.getConnectivityState(false)) {
      case connectivityState.READY: {
        this.stopDeadline();
        this.failure = undefined;
        this.setState('ready');
        const waiters = [...this.waiters];
        this.waiters.clear();
        for (const waiter of waiters) waiter.ready(this);
        return;
      }
      case connectivityState.TRANSIENT_FAILURE:
        this.setState('failed');
        this.explain();
        return;
      case connectivityState.CONNECTING:
        this.setState('connecting');
        return;
      case connectivityState.IDLE:
        // A connection that was lost is dialled again only when somebody wants it.
        this.setState('idle');
        if (this.waiters.size > 0) this.connect();
    }
  }

  /** TLS failures are known already; for DNS and TCP, which grpc-js does by itself, our own dial says why. */
  private explain(): void {
    const { failure } = this;
    if (failure !== undefined) {
      this.failWaiters(failure);
      this.events.changed(this);
      return;
    }
    this.connector.connect(['h2'], (error, socket) => {
      socket?.destroy();
      const reason = 'the kedge closed the connection before it spoke HTTP/2';
      this.failWaiters(error ?? new KedgeError('ERR_KEDGE_CONNECT', 'connect', reason, { kedge: this.connector.name }));
      this.events.changed(this);
    });
  }

  private timeOut(): void {
    const reason = `no connection that speaks HTTP/2 within ${this.deadlineMs} ms`;
    const error = new KedgeError('ERR_KEDGE_CONNECT_TIMEOUT', 'connect', reason, { kedge: this.connector.name });
    this.deadline = undefined;
    this.failWaiters(this.failure ?? error);
    if (this.waiters.size > 0) this.connect();
    else this.close();
  }

  private stopDeadline(): void {
    clearTimeout(this.deadline);
    this.deadline = undefined;
  }

  private setState(state: ConnectionState): void {
    if (state === this.state) return;
    this.state = state;
    if (debug.grpc.enabled) debug.grpc('%s: connection %s, %d calls', this.connector.name, state, this.calls);
    this.events.changed(this);
  }
}
