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
import type { Kedge } from '../kedge/kedge.ts';
import type { Plan, Resolved } from '../mapper/router.ts';
import { KedgeCall } from './call.ts';
import type { ParentCall } from './hold.ts';
import { grpcPool, type PoolState, type SharedOptions } from './pool.ts';
import { type RetriesUnavailable, retriesUnavailable } from './retry-policy.ts';
import { Watched } from './watched.ts';

/** Options that would change what is dialled or which name is verified; the route decides both. */
const REFUSED = [
  'grpc.default_authority',
  'grpc.ssl_target_name_override',
  'grpc.http_connect_target',
  'grpc.http_connect_creds',
] as const;

const STATES: Readonly<Record<PoolState, connectivityState>> = {
  connecting: connectivityState.CONNECTING,
  ready: connectivityState.READY,
  idle: connectivityState.IDLE,
  failed: connectivityState.TRANSIENT_FAILURE,
  closed: connectivityState.IDLE,
};
/** The state of a route with several kedges is the best of theirs. */
const BEST_FIRST: readonly PoolState[] = ['ready', 'connecting', 'idle', 'failed', 'closed'];

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
  private readonly retries: RetriesUnavailable;
  private readonly channelCredentials: CallCredentials | undefined;
  private readonly watched: Watched;
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
    this.retries = retriesUnavailable(options);
    this.shared = shareable(options, core, resolved.target.authority);
    this.watched = new Watched({
      kedges: () => this.kedges(),
      options: core.options,
      state: (kedges) => STATES[this.best(kedges)],
      isClosed: () => this.closed || core.closed,
    });
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
      retriesUnavailable: this.retries,
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
    this.watched.check();
  }

  getTarget(): string {
    return this.address;
  }

  getConnectivityState(tryToConnect: boolean): connectivityState {
    if (this.closed || this.core.closed) return connectivityState.SHUTDOWN;
    const kedges = this.kedges();
    const state = this.best(kedges);
    if (!tryToConnect || state === 'ready' || state === 'connecting') return STATES[state];
    const first = kedges.find(({ breaker }) => breaker.isClosed) ?? kedges[0]!;
    grpcPool(first, this.core.options).state(this.shared, true);
    return STATES[this.best(kedges)];
  }

  /**
   * As grpc-js's: calls back when the state is no longer `currentState`, or with an error at `deadline`. When the kedge is
   * given up, as `maxKedges` may want, it calls back in any case: looking again would bring it back.
   */
  watchConnectivityState(
    currentState: connectivityState,
    deadline: Date | number,
    callback: (error?: Error) => void,
  ): void {
    if (this.closed || this.core.closed) throw new KedgeError('ERR_KEDGE_CLOSED', 'map', 'the client is closed');
    this.watched.add(currentState, Number(deadline), callback);
  }

  getChannelzRef(): ReturnType<ChannelInterface['getChannelzRef']> {
    // Of no channelz: the connections behind this have entries of their own.
    return { kind: 'channel', id: 0, name: this.address } as ReturnType<ChannelInterface['getChannelzRef']>;
  }

  private kedges(): Kedge[] {
    return this.plan.hops.map((hop) => this.core.kedges.get(hop));
  }

  private best(kedges: readonly Kedge[]): PoolState {
    const states = kedges.map((kedge) => grpcPool(kedge, this.core.options).state(this.shared, false));
    return BEST_FIRST.find((state) => states.includes(state))!;
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
      // Retry policies are the caller's choice, not that of who writes the kedge's DNS zone (TXT records, gRFC A2).
      'grpc.service_config_disable_resolution': 1,
      // One channel is one connection, and proxy variables in the environment do not reach us.
      'grpc.use_local_subchannel_pool': 1,
      'grpc.enable_http_proxy': 0,
    },
  };
}
