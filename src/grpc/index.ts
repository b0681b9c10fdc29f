import '../support/refuse-old-node.ts';

import { Channel, type ChannelCredentials, type ChannelInterface, type ClientOptions } from '@grpc/grpc-js';
import type { Dialer } from '../dialer.ts';
import { coreOf } from '../engine/core.ts';
import { KedgeError } from '../support/errors.ts';
import { check, is, isFunction, type Reader } from '../support/shape.ts';
import { KedgeChannel } from './channel.ts';
import { callCredentialsOf } from './channel-credentials.ts';

/** A constructor of grpc-js clients: generated, loaded from a `.proto`, or made by `makeGenericClientConstructor()`. */
export type ClientConstructor = abstract new (
  address: string,
  credentials: ChannelCredentials,
  options?: ClientOptions,
) => object;

const CLIENT: Reader<unknown> = is('a constructor of grpc-js clients', isFunction);

/** The same constructor, with credentials that may be left out. */
export type WrappedClient<C extends ClientConstructor> = C &
  (new (
    address: string,
    credentials?: ChannelCredentials,
    options?: ClientOptions,
  ) => InstanceType<C>);

/** gRPC over a dialer's kedges. */
export interface GrpcDialer {
  /**
   * The same client class, dialling through kedges. Its constructor takes `(address, credentials?, options?, ...rest)`;
   * the credentials serve unmapped targets, and call credentials in them serve all. Without them an unmapped target is
   * a `KedgeError` `ERR_KEDGE_UNMAPPED`, thrown by the constructor: it never goes out insecurely.
   */
  wrap<C extends ClientConstructor>(client: C): WrappedClient<C>;
  /** For the option `channelFactoryOverride` of any client. */
  readonly channelFactory: (
    address: string,
    credentials?: ChannelCredentials,
    options?: ClientOptions,
  ) => ChannelInterface;
  /**
   * A channel for what takes one: the option `channelOverride`, or nice-grpc's `createClient()`. Closing it closes no
   * connection that others use.
   *
   * @throws `KedgeError` `ERR_KEDGE_TARGET`, `ERR_KEDGE_ROUTE`, `ERR_KEDGE_UNMAPPED`, `ERR_KEDGE_OPTIONS`, `ERR_KEDGE_CLOSED`
   */
  channel(address: string, credentials?: ChannelCredentials, options?: ClientOptions): Channel;
}

/**
 * Dials gRPC through the kedges of `dialer`, sharing its routes, identity, tokens and life: there is nothing to close.
 * All services behind a kedge whose clients use equal channel options share connections, because `:authority` is set for
 * each call (RFC 9113 §8.3.1) and TLS is verified against the kedge.
 *
 * Mapped channels take grpc-js's options; of a service config what it says of methods counts (timeouts, retries, hedging).
 * Which kedge a call goes to, and when it is dialled again, is for routes and `failover`: `loadBalancingConfig` and the
 * options of grpc-js's own connections, such as `grpc.initial_reconnect_backoff_ms`, count for unmapped targets only.
 *
 * @example
 * ```ts
 * import { createDialer, single } from 'kedge-dialer';
 * import { grpcDialer } from 'kedge-dialer/grpc';
 * import { GreeterClient } from './gen/greeter.js'; // any generated or loaded grpc-js client
 *
 * const dialer = createDialer({ mapper: single('https://us1.kedge.example.com') });
 * const client = new (grpcDialer(dialer).wrap(GreeterClient))('greeter.us1.example:9090');
 * client.sayHello({ name: 'Ada' }, (error, reply) => console.log(error ?? reply));
 * ```
 *
 * @throws `KedgeError` `ERR_KEDGE_OPTIONS` when `dialer` did not come from `createDialer()`
 */
export function grpcDialer(dialer: Dialer): GrpcDialer {
  const core = coreOf(dialer);

  const channelFactory = (
    address: string,
    credentials?: ChannelCredentials,
    options: ClientOptions = {},
  ): ChannelInterface => {
    const resolved = core.resolve('grpc', address);
    if (resolved.plan !== undefined) {
      return new KedgeChannel(core, address, resolved, callCredentialsOf(credentials), options);
    }
    if (credentials !== undefined) return new Channel(address, credentials, options);
    const context = { target: resolved.target.authority };
    throw new KedgeError('ERR_KEDGE_UNMAPPED', 'no mapper knows this target, and there are no credentials', context);
  };

  return Object.freeze({
    channelFactory,
    // nice-grpc wants the class, which has a private member besides the interface that it uses.
    channel: (address, credentials, options) => channelFactory(address, credentials, options) as Channel,
    wrap: <C extends ClientConstructor>(client: C) =>
      new Proxy(check('wrap', CLIENT as Reader<C>, client, { path: 'client' }), {
        construct(
          target,
          [address, credentials, options, ...rest]: [string, ChannelCredentials?, ClientOptions?],
          self,
        ) {
          if (options?.channelOverride !== undefined || options?.channelFactoryOverride !== undefined) {
            const reason = 'a wrapped client takes no `channelOverride` or `channelFactoryOverride`';
            throw new KedgeError('ERR_KEDGE_OPTIONS', reason);
          }
          const own = { ...options, channelFactoryOverride: channelFactory };
          return Reflect.construct(target, [address, credentials, own, ...(rest as unknown[])], self);
        },
      }) as WrappedClient<C>,
  } satisfies GrpcDialer);
}
