import { CallCredentials, type Metadata, status } from '@grpc/grpc-js';
import { KedgeError } from '../errors.ts';

type CallMetadataOptions = Parameters<CallCredentials['generateMetadata']>[0];

/**
 * Headers that belong to a connection (RFC 9113 §8.2.2) or name its other end. grpc-js sends them as they are, and nghttp2
 * then ends the whole connection, with everybody else's calls.
 */
const FORBIDDEN = new Set([
  'connection',
  'content-length',
  'host',
  'http2-settings',
  'keep-alive',
  'proxy-connection',
  'transfer-encoding',
  'upgrade',
]);

/**
 * Headers that node:http2 takes once only (`kSingleValueHeaders` in lib/internal/http2/util.js): a second one makes grpc-js
 * give up the connection and dial again, over and over.
 */
const SINGLE = new Set([
  'access-control-allow-credentials',
  'access-control-max-age',
  'access-control-request-method',
  'age',
  'authorization',
  'content-encoding',
  'content-language',
  'content-location',
  'content-md5',
  'content-range',
  'content-type',
  'date',
  'dnt',
  'etag',
  'expires',
  'from',
  'if-match',
  'if-modified-since',
  'if-none-match',
  'if-range',
  'if-unmodified-since',
  'last-modified',
  'location',
  'max-forwards',
  'proxy-authorization',
  'range',
  'referer',
  'retry-after',
  'te',
  'tk',
  'upgrade-insecure-requests',
  'user-agent',
  'x-content-type-options',
]);

/** The tokens of a call, as header values. */
export interface CallTokens {
  readonly proxyAuth: string | undefined;
  readonly backendAuth: string | undefined;
  readonly overrideAuthorization: boolean;
}

/**
 * Checks what a caller put into its metadata.
 *
 * @throws {@link KedgeError} `ERR_KEDGE_REQUEST` naming the header
 */
export function checkMetadata(metadata: Metadata, bringsProxyAuth: boolean): void {
  // Only what is there is looked at: most calls bring nothing, or one or two.
  for (const name of Object.keys(metadata.getMap())) {
    if (FORBIDDEN.has(name)) throw refuse(`metadata \`${name}\` belongs to a connection, not to a call`);
    if (SINGLE.has(name) && metadata.get(name).length > 1) throw refuse(`metadata \`${name}\` is there more than once`);
  }
  const [te] = metadata.get('te');
  if (te !== undefined && te !== 'trailers') throw refuse('metadata `te` is always `trailers`');
  if (bringsProxyAuth && metadata.get('proxy-authorization').length > 0) {
    throw refuse('the route brings its own proxy-authorization');
  }
}

/**
 * Adds the tokens: a caller's own authorization stays unless the route overrides it. `set`, never `add`: a second value
 * ends the connection.
 */
export function setTokens(metadata: Metadata, tokens: CallTokens): void {
  if (tokens.proxyAuth !== undefined) metadata.set('proxy-authorization', tokens.proxyAuth);
  if (tokens.backendAuth === undefined) return;
  if (tokens.overrideAuthorization || metadata.get('authorization').length === 0) {
    metadata.set('authorization', tokens.backendAuth);
  }
}

/**
 * The caller's call credentials and the route's tokens as one: setCredentials() replaces, and two generators that both
 * give an authorization end the connection. Whatever goes wrong in the caller's ends this call only.
 */
export class ComposedCredentials extends CallCredentials {
  private readonly caller: CallCredentials;
  private readonly tokens: CallTokens;
  /** Whether the call's own metadata has an authorization, which no credentials may double. */
  private readonly hasAuthorization: boolean;

  constructor(caller: CallCredentials, tokens: CallTokens, hasAuthorization: boolean) {
    super();
    this.caller = caller;
    this.tokens = tokens;
    this.hasAuthorization = hasAuthorization;
  }

  override async generateMetadata(options: CallMetadataOptions): Promise<Metadata> {
    const generated = await this.caller.generateMetadata(options).catch((error: unknown) => {
      // A generator that calls back with neither error nor metadata rejects with nothing, which grpc-js cannot read.
      throw error ?? withCode(new Error('the call credentials gave no metadata'), status.UNAUTHENTICATED);
    });
    const metadata = generated.clone();
    try {
      checkMetadata(metadata, this.tokens.proxyAuth !== undefined);
    } catch (error) {
      throw withCode(error as Error, status.UNAUTHENTICATED);
    }
    if (this.hasAuthorization) metadata.remove('authorization');
    else setTokens(metadata, { ...this.tokens, proxyAuth: undefined });
    return metadata;
  }

  override compose(other: CallCredentials): CallCredentials {
    return new ComposedCredentials(this.caller.compose(other), this.tokens, this.hasAuthorization);
  }

  override _equals(other: CallCredentials): boolean {
    return this === other;
  }
}

/** grpc-js takes a numeric code as the call's status, and turns everything else into UNKNOWN. */
function withCode(error: Error, code: status): Error {
  return Object.assign(new Error(error.message), { code });
}

function refuse(reason: string): KedgeError {
  return new KedgeError('ERR_KEDGE_REQUEST', 'request', reason);
}
