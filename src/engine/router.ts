import { LRUCache } from 'lru-cache';
import { Bearer } from '../auth/bearer.ts';
import type { TokenSource } from '../auth/token-source.ts';
import type { AnyIdentity } from '../identity/identity.ts';
import { hop } from '../kedge/kedge.ts';
import type { PeerPolicy } from '../kedge/peer.ts';
import type { Mapper } from '../mapper/mapper.ts';
import { addressesOf, type Route, route } from '../route.ts';
import { abandon } from '../support/abandon.ts';
import { debug } from '../support/debug.ts';
import { isKedgeError, KedgeError } from '../support/errors.ts';
import { isIP, type Target, targetOf, type Wire } from '../target.ts';
import { Credentials } from './credentials.ts';
import type { Plan, Resolved } from './plan.ts';

/** What routes inherit from the dialer. */
export interface RouterDefaults {
  readonly identity: AnyIdentity | undefined;
  readonly peer: PeerPolicy;
  readonly maxKedges: number;
}

/**
 * Target to plan, cached by the caller's own spelling in a bounded LRU (misses too), so that a repeated look-up by
 * origin string parses nothing.
 */
export class Router {
  private readonly mapper: Mapper;
  private readonly defaults: RouterDefaults;
  private readonly cache: Readonly<Record<Wire, LRUCache<string, Resolved>>>;
  private readonly last: Record<Wire, { readonly input: string; readonly resolved: Resolved } | undefined> = {
    http: undefined,
    grpc: undefined,
  };
  private readonly plans = new WeakMap<Route, Plan>();
  private readonly bearers = new WeakMap<object, Bearer>();

  constructor(mapper: Mapper, maxTargets: number, defaults: RouterDefaults) {
    this.mapper = mapper;
    this.defaults = defaults;
    this.cache = { http: new LRUCache({ max: maxTargets }), grpc: new LRUCache({ max: maxTargets }) };
  }

  /** @throws {@link KedgeError} `ERR_KEDGE_TARGET`, `ERR_KEDGE_ROUTE` */
  resolve(wire: Wire, input: string | URL): Resolved {
    if (typeof input !== 'string') return this.map(targetOf(input, wire));
    // Most calls go where the last one went: comparing is cheaper than hashing a string that was just made.
    const last = this.last[wire];
    if (last !== undefined && last.input === input) return last.resolved;
    const cache = this.cache[wire];
    let resolved = cache.get(input);
    if (resolved === undefined) {
      resolved = this.map(targetOf(input, wire));
      cache.set(input, resolved);
    }
    this.last[wire] = { input, resolved };
    return resolved;
  }

  private map(target: Target): Resolved {
    const found = isIP(target) ? undefined : this.ask(target);
    const plan = found === undefined ? undefined : this.plan(target, found);
    if (debug.map.enabled) {
      const to = plan === undefined ? 'no kedge destination' : plan.hops.map(({ address }) => address.name).join(', ');
      debug.map('%s %s -> %s', target.wire, target.authority, to);
    }
    return { target, plan };
  }

  private ask(target: Target): Route | undefined {
    try {
      const found: unknown = this.mapper(target);
      if (found === undefined) return undefined;
      if (found instanceof Promise) {
        abandon(found);
        throw new TypeError('a mapper is synchronous');
      }
      return addressesOf(found) === undefined ? route(found as Route as never) : (found as Route);
    } catch (error) {
      throw refuse(target, isKedgeError(error) ? error.reason : 'the mapper failed', error);
    }
  }

  private plan(target: Target, found: Route): Plan {
    let plan = this.plans.get(found);
    if (plan === undefined) {
      plan = this.prepare(target, found);
      this.plans.set(found, plan);
    }
    if (target.protocol === 'https:' && plan.hops.some(({ address }) => !address.secure)) {
      throw refuse(target, 'an https: target is not sent over an http: kedge');
    }
    return plan;
  }

  private prepare(target: Target, found: Route): Plan {
    const peer = found.peer ?? this.defaults.peer;
    const hasTokens = found.proxyAuth !== undefined || found.backendAuth !== undefined;
    if (peer.dangerouslySkipVerification && hasTokens) throw refuse(target, 'tokens need a verified kedge');
    const hops = addressesOf(found)!.map((address) => {
      // A plain kedge cannot ask for a certificate, so the dialer's identity stays out of its connections.
      const identity = address.secure ? (found.identity ?? this.defaults.identity) : undefined;
      return hop(address, identity, peer);
    });
    const { maxKedges } = this.defaults;
    const kedges = new Set(hops.map(({ key }) => key)).size;
    // Each would be given up for the other with every look at them.
    if (kedges > maxKedges) throw refuse(target, `a route of ${kedges} kedges needs \`maxKedges\` of as many`);
    return { hops, credentials: new Credentials(found, (source) => this.bearer(source)) };
  }

  /** One for each source, so that routes which share a source share its checked token. */
  private bearer(source: TokenSource): Bearer {
    let bearer = this.bearers.get(source);
    if (bearer === undefined) {
      bearer = new Bearer(source);
      this.bearers.set(source, bearer);
    }
    return bearer;
  }
}

function refuse(target: Target, reason: string, cause?: unknown): KedgeError {
  return new KedgeError('ERR_KEDGE_ROUTE', reason, { target: target.authority, stage: 'map', cause });
}
