import {
  type CallCredentials,
  type ChannelInterface,
  type ChannelOptions,
  connectivityState,
  type Deadline,
  type experimental,
} from '@grpc/grpc-js';
import type { Core } from '../core.ts';
import { KedgeError } from '../errors.ts';
import { hide } from '../hide.ts';
import type { Plan, Resolved } from '../mapper/router.ts';
import { KedgeCall, type ParentCall } from './call.ts';
import type { ConnectionState } from './connection.ts';
import { type GrpcPool, grpcPool, type SharedOptions } from './pool.ts';

/** Options that would change what is dialled or which name is verified; the route decides both. */
const REFUSED = [
  'grpc.default_authority',
  'grpc.ssl_target_name_override',
  'grpc.http_connect_target',
  'grpc.http_connect_creds',
] as const;

const STATES: Readonly<Record<ConnectionState, connectivityState>> = {
  connecting: connectivityState.CONNECTING,
  ready: connectivityState.READY,
  idle: connectivityState.IDLE,
  failed: connectivityState.TRANSIENT_FAILURE,
  closed: connectivityState.IDLE,
};

interface Watcher {
  readonly from: connectivityState;
  readonly callback: (error?: Error) => void;
  timer: NodeJS.Timeout | undefined;
}

/**
 * The channel of one client: a facade over connections that it shares with others. Closing it takes no connection from
 * anybody.
 */
export class KedgeChannel implements ChannelInterface {
  private readonly core: Core;
  private readonly address: string;
  private readonly resolved: Resolved;
  private readonly plan: Plan;
  private readonly shared: SharedOptions;
  private readonly channelCredentials: CallCredentials | undefined;
  private readonly watchers = new Set<Watcher>();
  private watched: { pool: GrpcPool; stop: () => void } | undefined;
  private closed = false;

  constructor(
    core: Core,
    address: string,
    resolved: Resolved,
    channelCredentials: CallCredentials | undefined,
    options: ChannelOptions,
  ) {
    this.core = core;
    this.address = address;
    this.resolved = resolved;
    this.plan = resolved.plan!;
    this.channelCredentials = channelCredentials;
    hide(this, `KedgeChannel(${resolved.target.authority})`);
    this.shared = shareable(options, core, resolved.target.authority);
  }

  createCall(
    method: string,
    deadline: Deadline,
    host: string | null | undefined,
    parentCall: unknown,
    propagateFlags: number | null | undefined,
  ): experimental.CallStream {
    const call = new KedgeCall({
      core: this.core,
      resolved: this.resolved,
      shared: this.shared,
      channelCredentials: this.channelCredentials,
      method,
      deadline,
      host,
      parentCall: (parentCall as ParentCall | undefined) ?? null,
      propagateFlags,
    });
    // A status with a code, where grpc-js's own channel throws an error without one.
    if (this.closed) call.refuse(new KedgeError('ERR_KEDGE_CLOSED', 'map', 'the client is closed'));
    return call;
  }

  close(): void {
    this.closed = true;
    this.notify();
  }

  getTarget(): string {
    return this.address;
  }

  getConnectivityState(tryToConnect: boolean): connectivityState {
    if (this.closed || this.core.closed) return connectivityState.SHUTDOWN;
    return STATES[this.pool().state(this.shared, tryToConnect)];
  }

  watchConnectivityState(
    currentState: connectivityState,
    deadline: Date | number,
    callback: (error?: Error) => void,
  ): void {
    if (this.closed || this.core.closed) throw new KedgeError('ERR_KEDGE_CLOSED', 'map', 'the client is closed');
    const watcher: Watcher = { from: currentState, callback, timer: undefined };
    const left = Number(deadline) - Date.now();
    if (left <= 2 ** 31 - 1) {
      watcher.timer = setTimeout(
        () => {
          this.settle(watcher, new Error('Deadline passed without connectivity state change'));
        },
        Math.max(left, 0),
      );
    }
    this.watchers.add(watcher);
    this.watch();
    process.nextTick(() => this.notify());
  }

  getChannelzRef(): ReturnType<ChannelInterface['getChannelzRef']> {
    // Of no channelz: the connections behind this have entries of their own.
    return { kind: 'channel', id: 0, name: this.address } as ReturnType<ChannelInterface['getChannelzRef']>;
  }

  private pool(): GrpcPool {
    return grpcPool(this.core.kedges.get(this.plan.hops[0]!).generation, this.core.options);
  }

  /** Follows the pool that new calls would use: a rotation replaces it. */
  private watch(): void {
    if (this.watchers.size === 0 || this.closed || this.core.closed) {
      this.watched?.stop();
      this.watched = undefined;
      return;
    }
    const pool = this.pool();
    if (this.watched?.pool === pool) return;
    this.watched?.stop();
    this.watched = { pool, stop: pool.onChange(() => this.notify()) };
  }

  private notify(): void {
    for (const watcher of [...this.watchers]) {
      if (this.getConnectivityState(false) !== watcher.from) this.settle(watcher);
    }
    this.watch();
  }

  private settle(watcher: Watcher, error?: Error): void {
    if (!this.watchers.delete(watcher)) return;
    clearTimeout(watcher.timer);
    this.watch();
    if (error === undefined) watcher.callback();
    else watcher.callback(error);
  }
}

/** What a client's connections are opened with, and which clients may share them. */
function shareable(options: ChannelOptions, core: Core, target: string): SharedOptions {
  const { windowBytes, keepaliveTimeMs, keepaliveTimeoutMs } = core.options.grpc;
  const refused = REFUSED.find((name) => Object.hasOwn(options, name));
  if (refused !== undefined) {
    const reason = `channel option \`${refused}\`: the route decides what is dialled and verified`;
    throw new KedgeError('ERR_KEDGE_OPTIONS', 'config', reason, { target });
  }
  const own = Object.entries(options).filter(([, value]) => value !== undefined);
  const key = JSON.stringify(own.sort(([a], [b]) => (a < b ? -1 : 1)));
  return {
    key,
    options: {
      'grpc-node.flow_control_window': windowBytes,
      'grpc.keepalive_time_ms': keepaliveTimeMs,
      'grpc.keepalive_timeout_ms': keepaliveTimeoutMs,
      // grpc-js waits up to two minutes otherwise.
      'grpc.max_reconnect_backoff_ms': 10_000,
      ...Object.fromEntries(own),
      // One channel is one connection, and proxy variables in the environment do not reach us.
      'grpc.use_local_subchannel_pool': 1,
      'grpc.enable_http_proxy': 0,
    },
  };
}
