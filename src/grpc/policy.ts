import {
  type ChannelOptions,
  connectivityState,
  credentials,
  type experimental as Experimental,
  experimental,
  Metadata,
  type StatusObject,
  status,
} from '@grpc/grpc-js';
import { Session } from '../rpc/session.ts';
import type { StreamCall, StreamListener } from './stream-call.ts';

/** A call that asks for a place; found again in the metadata that grpc-js copies for each attempt. */
export interface PickingCall {
  /** A session to use, `'over'` for a call that has ended, `'wait'` until the policy is told to look again, or the status that says why there is none. */
  pick(): Session | 'over' | 'wait' | StatusObject;
  /** Opens the call's stream on the session that was picked. */
  open(
    session: Session,
    metadata: Metadata,
    authority: string,
    listener: StreamListener,
    callNumber: number,
  ): StreamCall;
}

/** Who knows when calls that wait should ask again. */
export interface PolicyRoute {
  /** Has `again` called whenever that is so; until it is given another. */
  follow(again: (() => void) | undefined): void;
}

/** The channel option that hands a policy its route. */
const ROUTE = 'kedge-dialer.route';
/** Of the options of a call's metadata, which grpc-js hands on by reference. */
const CALL = Symbol('kedge-dialer.call');
const NAME = 'kedge-dialer';

type Helper = Experimental.ChannelControlHelper;
type PickResult = ReturnType<Experimental.Picker['pick']>;

/** Call credentials that add nothing. */
export const NO_CALL_CREDENTIALS = credentials.createEmpty();

/** What a channel is opened with so that this policy serves it. */
export function policyOptions(route: PolicyRoute, serviceConfig: unknown): ChannelOptions {
  const config = serviceConfig === undefined ? {} : JSON.parse(String(serviceConfig));
  return {
    [ROUTE]: route as never,
    'grpc.service_config': JSON.stringify({ methodConfig: [], ...config, loadBalancingConfig: [{ [NAME]: {} }] }),
  };
}

/** The target of such a channel: nothing is resolved. */
export function policyTarget(authority: string): string {
  return `${NAME}:${authority}`;
}

/** The options of a call's metadata, with the way back to the call. */
export function markedOptions(metadata: Metadata, call: PickingCall): ReturnType<Metadata['getOptions']> {
  return { ...metadata.getOptions(), [CALL]: call } as never;
}

/**
 * grpc-js's load-balancing policy for kedges (as gRFC A42's and others are one): each call is asked which session it wants,
 * and what grpc-js does for calls (deadlines, waiting, retries and hedging by the caller's policy, one more attempt for a
 * refused stream, filters) stays grpc-js's. The connections are ours, because grpc-js's cannot be given a deadline for TCP,
 * share one subchannel by address, do not tell why they failed, nor what a GOAWAY says was not processed.
 * Measured (`npm run bench -- --only grpc`): 0.90 to 0.94 of the rate of a raw channel with 100 calls at a time, where what
 * it replaced, which held, replayed, timed and watched calls beside grpc-js, had 0.85 to 0.97.
 *
 * What this relies on, beyond the documented `experimental` API, is pinned by `test/grpc/policy.test.ts`: that metadata hands
 * its options on by reference, that a call is made by `getRealSubchannel().createCall()`
 * (https://github.com/grpc/grpc-node/blob/master/packages/grpc-js/src/load-balancing-call.ts), what becomes of each pick
 * result, and that `rstCode` 7 means once more (https://github.com/grpc/grpc-node/blob/master/packages/grpc-js/src/retrying-call.ts).
 */
class KedgePolicy implements Experimental.LoadBalancer {
  private readonly helper: Helper;
  private route: PolicyRoute | undefined;

  constructor(helper: Helper) {
    this.helper = helper;
  }

  updateAddressList(_endpoints: unknown, _config: unknown, options: ChannelOptions): boolean {
    this.route = options[ROUTE] as unknown as PolicyRoute;
    this.route.follow(() => this.pickAgain());
    this.pickAgain();
    return true;
  }

  /** A call that is picked dials by itself. */
  exitIdle(): void {}

  resetBackoff(): void {}

  destroy(): void {
    this.route?.follow(undefined);
    this.route = undefined;
  }

  getTypeName(): string {
    return NAME;
  }

  /** Always READY, for what follows from other states is not for us: each call finds out how its own kedges are. */
  private pickAgain(): void {
    this.helper.updateState(connectivityState.READY, PICKER, null);
  }
}

const PICKER: Experimental.Picker = {
  pick({ metadata }): PickResult {
    const call = (metadata.getOptions() as { [CALL]: PickingCall })[CALL];
    const picked = call.pick();
    if (picked === 'wait') return { ...NOTHING, pickResultType: QUEUE };
    if (picked === 'over') return { ...NOTHING, pickResultType: DROP, status: OVER };
    if (!(picked instanceof Session)) return { ...NOTHING, pickResultType: TRANSIENT_FAILURE, status: picked };
    return { ...NOTHING, pickResultType: COMPLETE, subchannel: new PickedSession(call, picked) as never };
  },
};

const { COMPLETE, DROP, QUEUE, TRANSIENT_FAILURE } = experimental.PickResultType;
/** grpc-js picks for calls, too, that were cancelled before it got to them. */
const OVER = { code: status.CANCELLED, details: 'the call is over', metadata: new Metadata() };
const NOTHING = { subchannel: null, status: null, onCallStarted: null, onCallEnded: null };

/** The subchannel of one attempt: the part of grpc-js's `SubchannelInterface` that a call uses. */
class PickedSession {
  private readonly call: PickingCall;
  private readonly session: Session;

  constructor(call: PickingCall, session: Session) {
    this.call = call;
    this.session = session;
  }

  /** While credentials were fetched the session may have gone; grpc-js then picks again. */
  getConnectivityState(): connectivityState {
    return this.session.state === 'ready' ? connectivityState.READY : connectivityState.IDLE;
  }

  getCallCredentials(): unknown {
    return NO_CALL_CREDENTIALS;
  }

  getRealSubchannel(): this {
    return this;
  }

  getAddress(): string {
    return this.session.peer;
  }

  createCall(
    metadata: Metadata,
    authority: string,
    _path: string,
    listener: StreamListener,
    callNumber: number,
  ): StreamCall {
    return this.call.open(this.session, metadata, authority, listener, callNumber);
  }
}

/** Its channels have one answer to where they lead, at once: the policy asks no address. */
class NoResolver implements Experimental.Resolver {
  private readonly listener: Experimental.ResolverListener;
  private isAsked = false;

  constructor(_target: unknown, listener: Experimental.ResolverListener) {
    this.listener = listener;
  }

  updateResolution(): void {
    if (this.isAsked) return;
    this.isAsked = true;
    process.nextTick(() => {
      if (this.isAsked) this.listener(experimental.statusOrFromValue([]), {}, null, '');
    });
  }

  destroy(): void {
    this.isAsked = false;
  }

  static getDefaultAuthority(target: Experimental.GrpcUri): string {
    return target.path;
  }
}

/** Its configuration is the channel's route, which JSON cannot hold. */
class NoConfig implements Experimental.TypedLoadBalancingConfig {
  getLoadBalancerName(): string {
    return NAME;
  }

  toJsonObject(): object {
    return { [NAME]: {} };
  }

  static createFromJson(): NoConfig {
    return new NoConfig();
  }
}

experimental.registerResolver(NAME, NoResolver);
experimental.registerLoadBalancerType(NAME, KedgePolicy as never, NoConfig);
