import { CallCredentials, Metadata, status } from '@grpc/grpc-js';
import type { KedgeError } from '../errors.ts';
import { hide } from '../hide.ts';
import type { CallTokens } from '../kedge/call-headers.ts';
import { checkMetadata, setTokens } from './metadata.ts';

type CallMetadataOptions = Parameters<CallCredentials['generateMetadata']>[0];

/** The call that {@link ComposedCredentials} are for. */
export interface CredentialsOwner {
  /** What goes out anyway; grpc-js adds what the credentials give. */
  readonly metadata: Metadata;
  readonly tokens: CallTokens;
  readonly ownBytes: number;
  /** Ends the call, before anything is sent. */
  fail(error: Error, code: status): void;
}

/**
 * The caller's call credentials and the route's tokens as one: setCredentials() replaces, and two generators that both
 * give an authorization end the connection. Whatever goes wrong in the caller's ends this call only.
 */
export class ComposedCredentials extends CallCredentials {
  private readonly caller: CallCredentials;
  private readonly owner: CredentialsOwner;

  constructor(caller: CallCredentials, owner: CredentialsOwner) {
    super();
    this.caller = caller;
    this.owner = owner;
    hide(this, 'ComposedCredentials');
  }

  override async generateMetadata(options: CallMetadataOptions): Promise<Metadata> {
    let generated: unknown;
    try {
      generated = await this.caller.generateMetadata(options);
    } catch (error) {
      throw error ?? noMetadata();
    }
    if (!(generated instanceof Metadata)) throw noMetadata();
    try {
      return this.merge(generated);
    } catch (error) {
      // grpc-js would keep no more than the text.
      this.owner.fail(error as KedgeError, status.UNAUTHENTICATED);
      throw withCode(error as Error, status.UNAUTHENTICATED);
    }
  }

  /** @throws {@link KedgeError} `ERR_KEDGE_REQUEST` */
  private merge(generated: Metadata): Metadata {
    const { metadata, tokens, ownBytes } = this.owner;
    checkMetadata(generated, tokens.proxyAuth !== undefined, ownBytes);
    const added = generated.clone();
    // An authorization in the call's own metadata is nearer to the call than its credentials.
    if (metadata.get('authorization').length > 0) added.remove('authorization');
    else setTokens(added, { ...tokens, proxyAuth: undefined });
    const all = metadata.clone();
    all.merge(added);
    checkMetadata(all, false, ownBytes);
    return added;
  }

  override compose(other: CallCredentials): CallCredentials {
    return new ComposedCredentials(this.caller.compose(other), this.owner);
  }

  override _equals(other: CallCredentials): boolean {
    return this === other;
  }
}

/** A generator that calls back with neither error nor metadata rejects with nothing, which grpc-js cannot read. */
function noMetadata(): Error {
  return withCode(new Error('the call credentials gave no metadata'), status.UNAUTHENTICATED);
}

/** grpc-js takes a numeric code as the call's status, and turns everything else into UNKNOWN. */
function withCode(error: Error, code: status): Error {
  return Object.assign(new Error(error.message), { code });
}
