import {
  type CallCredentials,
  Channel,
  type ChannelInterface,
  type ChannelOptions,
  connectivityState,
  credentials,
  type experimental,
} from '@grpc/grpc-js';
import type { Core } from '../engine/core.ts';
import type { Plan, Resolved } from '../engine/plan.ts';
import type { Endpoint } from '../kedge/kedge.ts';
import type { SessionSettings } from '../rpc/session.ts';
import { type PoolState, peekSessionPool, type SessionPool, sessionPool } from '../rpc/session-pool.ts';
import { KedgeError } from '../support/errors.ts';
import { hide } from '../support/redact.ts';
import { KedgeCall } from './call.ts';
import type { CallContext, CallInit } from './call-context.ts';
import { ownOptions } from './channel-options.ts';
import { Connectivity } from './connectivity.ts';
import { type PolicyRoute, policyOptions, policyTarget } from './policy.ts';

const STATES: Readonly<Record<PoolState, connectivityState>> = {
  ready: connectivityState.READY,
  connecting: connectivityState.CONNECTING,
  idle: connectivityState.IDLE,
  failed: connectivityState.TRANSIENT_FAILURE,
};
/** The state of a route with several kedges is the best of theirs. */
const BEST_FIRST = Object.keys(STATES) as PoolState[];
/** How long a call with `waitForReady` rests when every kedge of its route has failed it, in ms. */
const REST_MS = 300;
/** How long TRANSIENT_FAILURE lasts where no kedge could be made, such as without certificate files, in ms. */
const COOL_MS = 250;
/** The longest that grpc-js can write as `grpc-timeout`, in ms: 8 digits of hours. */
const MAX_TIMEOUT_MS = 1e8 * 3_600_000;

type CreateCall = ChannelInterface['createCall'];

/**
 * The channel of one client: grpc-js's own, with our policy, over connections that it shares with others. Closing it takes
 * no connection from anybody.
 *
 * @remarks Large, for it keeps grpc-js's contract of a channel and is what its calls know of it.
 */
export class KedgeChannel implements ChannelInterface, CallContext, PolicyRoute {
  readonly userAgent: string;
  readonly maxMessageBytes: number;
  readonly core: Core;
  private readonly address: string;
  private readonly resolved: Resolved;
  private readonly plan: Plan;
  private readonly settings: SessionSettings;
  private readonly channelCredentials: CallCredentials | undefined;
  private readonly inner: Channel;
  private readonly connectivity: Connectivity;
  private readonly pools = new Set<SessionPool>();
  private pickAgain: (() => void) | undefined;
  private rest: NodeJS.Timeout | undefined;
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
    const { authority } = resolved.target;
    hide(this, `KedgeChannel(${authority})`);
    const { settings, userAgent, maxMessageBytes } = ownOptions(options, core.options.grpc, authority);
    this.settings = settings;
    this.userAgent = userAgent;
    this.maxMessageBytes = maxMessageBytes;
    this.connectivity = new Connectivity(() => this.getConnectivityState(false));
    this.inner = this.open(options);
  }

  /** @throws TypeError where grpc-js's own does: it would throw it later, when nobody can hear it */
  createCall(...[method, deadline, host, parentCall, propagateFlags]: Parameters<CreateCall>): KedgeCall {
    if (typeof method !== 'string') throw new TypeError('Channel#createCall: method must be a string');
    if (!(typeof deadline === 'number' || deadline instanceof Date) || Number.isNaN(Number(deadline))) {
      throw new TypeError('Channel#createCall: deadline must be a number or Date');
    }
    const { authority } = this.resolved.target;
    const credentials = this.channelCredentials;
    return new KedgeCall(this, { method, deadline, host, parentCall, propagateFlags, authority, credentials });
  }

  /** As grpc-js's: calls that are under way go on, those that still wait end. */
  close(): void {
    if (this.closed) return;
    this.closed = true;
    clearTimeout(this.rest);
    clearTimeout(this.cooling);
    this.core.endPending(clientClosed(), (call) => call instanceof KedgeCall && call.context === this);
    this.inner.close();
    for (const pool of [...this.pools]) this.leave(pool);
    this.connectivity.check();
  }

  getTarget(): string {
    return this.address;
  }

  /** As grpc-js's, it never throws. Only `tryToConnect` brings a kedge into use. */
  getConnectivityState(tryToConnect: boolean): connectivityState {
    if (this.closed || this.core.closed) return connectivityState.SHUTDOWN;
    const state = this.state();
    if (!tryToConnect || state === 'ready' || state === 'connecting') return STATES[state];
    this.connect();
    return STATES[this.state()];
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
    this.connectivity.watch(currentState, Number(deadline), callback);
  }

  getChannelzRef(): ReturnType<ChannelInterface['getChannelzRef']> {
    return this.inner.getChannelzRef();
  }

  // -- for its calls

  /** A `host` of the call's own is mapped like any other target, so it cannot carry tokens elsewhere. */
  route(host: string | null | undefined): Resolved {
    const { core } = this;
    // A status with a code, where grpc-js's own channel throws an error without one.
    if (this.closed) throw clientClosed();
    if (core.closed) throw new KedgeError('ERR_KEDGE_CLOSED', 'the dialer is closed');
    if (host === undefined || host === null || host === this.resolved.target.authority) return this.resolved;
    const resolved = core.resolve('grpc', host);
    if (resolved.plan !== undefined) return resolved;
    throw new KedgeError('ERR_KEDGE_UNMAPPED', 'the host of a call through a kedge is a kedge destination');
  }

  createLive({ method, deadline, parentCall, propagateFlags }: CallInit, authority: string): experimental.CallStream {
    const until = Number(deadline) - Date.now() < MAX_TIMEOUT_MS ? deadline : Number.POSITIVE_INFINITY;
    return this.inner.createCall(method, until, authority, parentCall as never, propagateFlags as never);
  }

  readonly poolOf = (endpoint: Endpoint): SessionPool => {
    const pool = sessionPool(this.core.kedges.get(endpoint), this.settings, this.core.options);
    this.join(pool);
    return pool;
  };

  lookAgain(): void {
    this.rest ??= setTimeout(() => {
      this.rest = undefined;
      this.pickAgain?.();
    }, REST_MS).unref();
  }

  // -- for its policy

  follow(again: (() => void) | undefined): void {
    this.pickAgain = again;
  }

  private open(options: ChannelOptions): Channel {
    const { authority } = this.resolved.target;
    try {
      // Its own credentials dial nothing.
      return new Channel(policyTarget(authority), credentials.createInsecure(), {
        // What another kedge is sent again; with one, grpc-js's own measure.
        ...(this.plan.endpoints.length > 1 && {
          'grpc.per_rpc_retry_buffer_size': this.core.options.failover.replayBytes,
        }),
        ...options,
        ...policyOptions(this, options['grpc.service_config']),
        'grpc.enable_http_proxy': 0,
      });
    } catch (cause) {
      // Nothing else of the options is read so early.
      const reason = 'channel option `grpc.service_config` is not a service config';
      throw new KedgeError('ERR_KEDGE_OPTIONS', reason, { target: authority, cause });
    }
  }

  /** Of the kedges that are in use; one that is not is idle. */
  private state(): PoolState {
    const states = this.plan.endpoints.map((endpoint): PoolState => {
      const kedge = this.core.kedges.find(endpoint.key);
      const pool = kedge === undefined ? undefined : peekSessionPool(kedge, this.settings);
      if (pool === undefined || pool.closed) return this.cooling === undefined ? 'idle' : 'failed';
      this.join(pool);
      return pool.state;
    });
    return BEST_FIRST.find((state) => states.includes(state))!;
  }

  /** Dials for who asks for a connection without a call. */
  private connect(): void {
    const { core, plan } = this;
    try {
      this.poolOf(plan.endpoints[core.likely(plan)]!).choose();
    } catch {
      // It has no certificate, say.
      clearTimeout(this.cooling);
      this.cooling = setTimeout(() => {
        this.cooling = undefined;
        this.connectivity.check();
      }, COOL_MS).unref();
    }
    this.connectivity.check();
  }

  private readonly changed = (): void => {
    let isGivenUp = false;
    for (const pool of this.pools) {
      isGivenUp ||= pool.kedge.closed;
      if (pool.gone) this.leave(pool);
    }
    this.pickAgain?.();
    if (isGivenUp) this.connectivity.slowDown();
    else this.connectivity.check();
  };

  private join(pool: SessionPool): void {
    if (this.pools.has(pool) || this.closed) return;
    this.pools.add(pool);
    pool.use();
    pool.onChange(this.changed);
  }

  private leave(pool: SessionPool): void {
    if (!this.pools.delete(pool)) return;
    pool.unuse();
    pool.offChange(this.changed);
  }
}

function clientClosed(): KedgeError {
  return new KedgeError('ERR_KEDGE_CLOSED', 'the client is closed');
}
