import './support/refuse-old-node.ts';

export { type CachedTokenOptions, cachedToken, type FetchedToken } from './auth/cached-token.ts';
export { type ExecTokenOptions, execToken } from './auth/exec-token.ts';
export { type FileTokenOptions, fileToken } from './auth/file-token.ts';
export { type GoogleServiceAccountTokenOptions, googleServiceAccountToken } from './auth/google-token.ts';
export { type KubeconfigTokenOptions, kubeconfigToken } from './auth/kubeconfig-token.ts';
export { type OidcTokenOptions, oidcToken } from './auth/oidc-token.ts';
export { type StaticTokenOptions, staticToken } from './auth/static-token.ts';
export type { TokenSource } from './auth/token-source.ts';
export type { PeerPolicy } from './dial/peer.ts';
export { createDialer, type Dialer, type DialerStats } from './dialer.ts';
export type { ExplainedIdentity, ExplainedKedge, Explanation } from './explain.ts';
export type { KedgeDispatcher } from './http/types.ts';
export type { AnyIdentity, AnySnapshot, Identity, IdentitySnapshot, TrustSnapshot } from './identity/identity.ts';
export { pem } from './identity/pem.ts';
export { type IdentityFilesOptions, type PemFilesInit, pemFiles, type TrustFilesInit } from './identity/pem-files.ts';
export { type Pkcs12FileInit, pkcs12, pkcs12File } from './identity/pkcs12.ts';
export type { PemInit, Pkcs12Init, TrustInit } from './identity/snapshot.ts';
export type { KedgeStats } from './kedge/kedge.ts';
export { kedgeErrorOf } from './kedge-error-report.ts';
export { firstMatch } from './mapper/first-match.ts';
export { hostPorts, hosts, type RouteTable } from './mapper/hosts.ts';
export type { Mapper } from './mapper/mapper.ts';
export { type RegexpOptions, regexp } from './mapper/regexp.ts';
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
export { type Route, type RouteInit, type RouteOptions, route } from './route.ts';
export {
  isKedgeError,
  KedgeError,
  type KedgeErrorCode,
  type KedgeErrorContext,
  type KedgeStage,
} from './support/errors.ts';
export { parseTarget, type Target, type Wire } from './target.ts';
export type { WinchLogin } from './winch/auth.ts';
export { loadWinchConfig, type WinchConfig, type WinchConfigOptions } from './winch/config.ts';
