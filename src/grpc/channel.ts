import {
  type CallCredentials,
  Channel,
  type ChannelInterface,
  type ChannelOptions,
  connectivityState,
  credentials,
  type Deadline,
  type experimental,
} from '@grpc/grpc-js';
import type { Core } from '../core.ts';
import { KedgeError } from '../errors.ts';
import { hide } from '../hide.ts';
import type { Plan, Resolved } from '../mapper/router.ts';
import { KedgeCall } from './call.ts';
import type { ParentCall } from './hold.ts';
import { type MethodConfigs, methodConfigs } from './method-config.ts';
import { countClient, type GrpcPool, grpcPool, type PoolState, type SharedOptions } from './pool.ts';
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
/** How long TRANSIENT_FAILURE lasts where no kedge could be made, such as without certificate files, in ms. */
const COOL_MS = 250;
/** The longest that grpc-js can write as `grpc-timeout`, in ms: 8 digits of hours. */
const MAX_TIMEOUT_MS = 1e8 * 3_600_000;

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
  private readonly sharedOnce: SharedOptions;
  private readonly configs: MethodConfigs;
  private readonly channelCredentials: CallCredentials | undefined;
  private readonly watched: Watched;
  private readonly held = new Set<KedgeCall>();
  private cooling: NodeJS.Timeout | undefined;
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
    const { key, options: own } = this.shared;
    this.sharedOnce = { key: `${key} once`, options: { ...own, 'grpc.enable_retries': 0 } };
    this.configs = methodConfigs(options);
    this.count(1);
    this.watched = new Watched({
      pools: () => this.pools(),
      state: () => this.state(),
      isClosed: () => this.closed || core.closed,
    });
  }

  /** @throws TypeError where grpc-js's own does: it would throw it later, when nobody can hear it */
  createCall(
    method: string,
    deadline: Deadline,
    host: string | null | undefined,
    parentCall: unknown,
    propagateFlags: number | null | undefined,
  ): experimental.CallStream {
    if (typeof method !== 'string') throw new TypeError('Channel#createCall: method must be a string');
    if (!(typeof deadline === 'number' || deadline instanceof Date) || Number.isNaN(Number(deadline))) {
      throw new TypeError('Channel#createCall: deadline must be a number or Date');
    }
    const call = new KedgeCall({
      core: this.core,
      resolved: this.resolved,
      shared: this.shared,
      sharedOnce: this.sharedOnce,
      channelCredentials: this.channelCredentials,
      method,
      config: this.configs(method),
      held: this.held,
      deadline: Number(deadline) - Date.now() < MAX_TIMEOUT_MS ? deadline : Number.POSITIVE_INFINITY,
      host,
      parentCall: (parentCall as ParentCall | undefined) ?? null,
      propagateFlags,
    });
    // A status with a code, where grpc-js's own channel throws an error without one.
    if (this.closed) call.refuse(clientClosed());
    return call;
  }

  /** As grpc-js's: calls that are under way go on, those that still wait for a connection end. */
  close(): void {
    if (!this.closed) this.count(-1);
    this.closed = true;
    for (const call of [...this.held]) call.fail(clientClosed());
    this.watched.check();
  }

  getTarget(): string {
    return this.address;
  }

  /** As grpc-js's, it never throws. Only `tryToConnect` brings a kedge into use. */
  getConnectivityState(tryToConnect: boolean): connectivityState {
    if (this.closed || this.core.closed) return connectivityState.SHUTDOWN;
    const state = this.state();
    if (!tryToConnect || state === connectivityState.READY || state === connectivityState.CONNECTING) return state;
    const { kedges, options } = this.core;
    const { hops } = this.plan;
    const hop = hops.find(({ key }) => kedges.find(key)?.breaker.isClosed ?? true) ?? hops[0]!;
    try {
      grpcPool(kedges.get(hop), options).state(this.shared, true);
    } catch {
      this.cool();
    }
    return this.state();
  }

  /**
   * As grpc-js's: calls back when the state is no longer `currentState`, or with an error at `deadline`. A kedge that comes
   * into use by another client, or is given up for others as `maxKedges` may want, is seen a moment later.
   */
  watchConnectivityState(
    currentState: connectivityState,
    deadline: Date | number,
    callback: (error?: Error) => void,
  ): void {
    if (this.closed || this.core.closed) throw clientClosed();
    this.watched.add(currentState, Number(deadline), callback);
  }

  getChannelzRef(): ReturnType<ChannelInterface['getChannelzRef']> {
    // Of no channelz: the connections behind this have entries of their own.
    return { kind: 'channel', id: 0, name: this.address } as ReturnType<ChannelInterface['getChannelzRef']>;
  }

  private count(by: 1 | -1): void {
    for (const shared of [this.shared, this.sharedOnce]) countClient(this.core.options, shared, by);
  }

  /** Of the kedges that are in use. */
  private pools(): GrpcPool[] {
    const { kedges, options } = this.core;
    const used = this.plan.hops.map(({ key }) => kedges.find(key)).filter((kedge) => kedge !== undefined);
    // One that is just being given up may still be found.
    return used.map((kedge) => grpcPool(kedge, options)).filter(({ closed }) => !closed);
  }

  private state(): connectivityState {
    const states = this.pools().map((pool) => pool.state(this.shared, false));
    // A kedge that is not in use is idle.
    if (states.length < this.plan.hops.length) states.push(this.cooling === undefined ? 'idle' : 'failed');
    return STATES[BEST_FIRST.find((state) => states.includes(state))!];
  }

  private cool(): void {
    clearTimeout(this.cooling);
    this.cooling = setTimeout(() => {
      this.cooling = undefined;
      this.watched.check();
    }, COOL_MS).unref();
  }
}

function clientClosed(): KedgeError {
  return new KedgeError('ERR_KEDGE_CLOSED', 'map', 'the client is closed');
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
  checkServiceConfig(options['grpc.service_config'], target);
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

/** By grpc-js itself, as it does when a channel is made; a connection is made later, when nobody can hear it. */
function checkServiceConfig(text: string | undefined, target: string): void {
  if (text === undefined) return;
  try {
    new Channel('ipv4:127.0.0.1:1', credentials.createInsecure(), { 'grpc.service_config': text }).close();
  } catch (cause) {
    const reason = 'channel option `grpc.service_config` is not a service config';
    throw new KedgeError('ERR_KEDGE_OPTIONS', 'config', reason, { target, cause });
  }
}
