export { type StaticTokenOptions, staticToken } from './auth/static-token.ts';
export type { TokenSource } from './auth/token-source.ts';
export { createDialer, type Dialer, type DialerStats } from './dialer.ts';
export {
  isKedgeError,
  KedgeError,
  type KedgeErrorCode,
  type KedgeErrorContext,
  type KedgeStage,
} from './errors.ts';
export type { KedgeDispatcher } from './http/types.ts';
export type { Identity, IdentitySnapshot } from './identity/identity.ts';
export { pem } from './identity/pem.ts';
export type { PemInit } from './identity/snapshot.ts';
export type { KedgeStats } from './kedge/kedge.ts';
export type { PeerPolicy } from './kedge/peer.ts';
export { firstMatch } from './mapper/first-match.ts';
export { hostPorts, hosts, type RouteTable } from './mapper/hosts.ts';
export type { Mapper } from './mapper/mapper.ts';
export { single } from './mapper/single.ts';
export { type SuffixOptions, suffix } from './mapper/suffix.ts';
export type {
  ConnectOptions,
  DialerOptions,
  DispatcherLike,
  FailoverOptions,
  GrpcOptions,
  HttpOptions,
} from './options.ts';
export { kedgeErrorOf } from './reported.ts';
export { type Route, type RouteInit, type RouteOptions, route } from './route.ts';
export { parseTarget, type Target, type Wire } from './target.ts';
