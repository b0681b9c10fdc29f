import { CallCredentials, Metadata, status } from '@grpc/grpc-js';
import type { Tokens } from '../engine/credentials.ts';
import { hide } from '../support/redact.ts';
import { checkMetadata, setTokens } from './metadata.ts';

type CallMetadataOptions = Parameters<CallCredentials['generateMetadata']>[0];

/** The call that {@link RouteCredentials} are for. */
export interface CredentialsOwner {
  /** What goes out anyway; grpc-js adds what the credentials give. */
  readonly metadata: Metadata;
  /** Those of the route, fetched if need be. */
  tokensOf(): Promise<Tokens>;
  /** What the headers have besides, for their limit. */
  ownBytes(tokens: Tokens): number;
  /** Ends the call, before anything is sent. */
  fail(error: Error, code?: status): void;
}

/**
 * The caller's call credentials and the route's tokens as one: setCredentials() replaces, and two generators that both
 * give an authorization end the connection. Whatever goes wrong in the caller's ends this call only.
 */
export class RouteCredentials extends CallCredentials {
  private readonly caller: CallCredentials | undefined;
  private readonly owner: CredentialsOwner;

  constructor(caller: CallCredentials | undefined, owner: CredentialsOwner) {
    super();
    this.caller = caller;
    this.owner = owner;
    hide(this, 'RouteCredentials');
  }

  override async generateMetadata(options: CallMetadataOptions): Promise<Metadata> {
    let tokens: Tokens;
    try {
      tokens = await this.owner.tokensOf();
    } catch (error) {
      throw this.ended(error as Error);
    }
    const generated = this.caller === undefined ? new Metadata() : await this.ask(this.caller, options);
    try {
      return this.merge(generated, tokens);
    } catch (error) {
      throw this.ended(error as Error, status.UNAUTHENTICATED);
    }
  }

  private async ask(caller: CallCredentials, options: CallMetadataOptions): Promise<Metadata> {
    let generated: unknown;
    try {
      generated = await caller.generateMetadata(options);
    } catch (error) {
      throw error ?? noMetadata();
    }
    if (!(generated instanceof Metadata)) throw noMetadata();
    return generated;
  }

  /** @throws {@link KedgeError} `ERR_KEDGE_REQUEST` */
  private merge(generated: Metadata, tokens: Tokens): Metadata {
    const { metadata } = this.owner;
    const own = this.owner.ownBytes(tokens);
    checkMetadata(generated, tokens.proxyAuth !== undefined, own);
    const added = generated.clone();
    // An authorization in the call's own metadata is nearer to the call than its credentials.
    if (metadata.get('authorization').length > 0) {
      added.remove('authorization');
      setTokens(added, { ...tokens, backendAuth: undefined });
    } else setTokens(added, tokens);
    const all = metadata.clone();
    all.merge(added);
    checkMetadata(all, false, own);
    return added;
  }

  /** The call has ended with the error itself; grpc-js would keep no more than the text. */
  private ended(error: Error, code?: status): Error {
    this.owner.fail(error, code);
    return withCode(error, status.UNAUTHENTICATED);
  }

  override compose(other: CallCredentials): CallCredentials {
    return new RouteCredentials(this.caller?.compose(other) ?? other, this.owner);
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
