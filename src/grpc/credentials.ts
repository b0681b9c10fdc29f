import type { Socket } from 'node:net';
import { type CallCredentials, ChannelCredentials, credentials } from '@grpc/grpc-js';
import type { KedgeError } from '../errors.ts';
import type { Connector } from '../kedge/connector.ts';

type SecureConnector = ReturnType<ChannelCredentials['_createSecureConnector']>;

/** How the dials of a {@link KedgeCredentials} go. */
export interface DialEvents {
  /** TCP, and TLS where the kedge has it, are there; HTTP/2 comes next. */
  secured(socket: Socket): void;
  /** grpc-js keeps no more than the text of an error. */
  failed(error: KedgeError): void;
  /** Whether a connection is of use still; where it is not, no certificate is shown. */
  isWanted(): boolean;
}

/**
 * Lets grpc-js open TCP and our connector do TLS, so that both wires show the same certificate, verify the same name and
 * call a failure the same.
 */
export class KedgeCredentials extends ChannelCredentials {
  private readonly connector: Connector;
  private readonly events: DialEvents;

  constructor(connector: Connector, events: DialEvents) {
    super();
    this.connector = connector;
    this.events = events;
  }

  override _isSecure(): boolean {
    return this.connector.isSecure;
  }

  override _equals(other: ChannelCredentials): boolean {
    return this === other;
  }

  override _createSecureConnector(
    _target: unknown,
    _options: unknown,
    callCredentials?: CallCredentials,
  ): SecureConnector {
    return {
      connect: (socket: Socket) => new Promise((resolve, reject) => this.establish(socket, resolve, reject)),
      waitForReady: () => Promise.resolve(),
      getCallCredentials: () => callCredentials ?? NO_CALL_CREDENTIALS,
      destroy: () => {},
    };
  }

  private establish(
    tcp: Socket,
    resolve: (result: Awaited<ReturnType<SecureConnector['connect']>>) => void,
    reject: (error: Error) => void,
  ): void {
    const { connector, events } = this;
    const unwanted = () => reject(new Error('nobody waits for this connection'));
    if (!events.isWanted()) {
      unwanted();
      return;
    }
    connector.establish(tcp, ['h2'], (error, socket) => {
      if (error !== null) {
        events.failed(error);
        reject(error);
        return;
      }
      if (!events.isWanted()) {
        socket!.destroy();
        unwanted();
        return;
      }
      // With TLS 1.3 the kedge's verdict on our certificate comes after the handshake.
      socket!.once('error', () => {
        if (connector.refusal !== undefined) events.failed(connector.refusal);
      });
      events.secured(socket!);
      resolve({ socket: socket!, secure: connector.isSecure });
    });
  }
}

/** Call credentials that add nothing. */
const NO_CALL_CREDENTIALS = credentials.createEmpty();

/** The call credentials that a caller composed into its channel credentials: they are kept, whatever is dialled. */
export function callCredentialsOf(channelCredentials: ChannelCredentials | undefined): CallCredentials | undefined {
  if (channelCredentials === undefined) return undefined;
  const connector = channelCredentials._createSecureConnector({ scheme: 'dns', path: 'localhost' }, {});
  const callCredentials = connector.getCallCredentials();
  connector.destroy();
  return callCredentials._equals(NO_CALL_CREDENTIALS) ? undefined : callCredentials;
}
