import type { Socket } from 'node:net';
import { type CallCredentials, ChannelCredentials, credentials } from '@grpc/grpc-js';
import type { KedgeError } from '../errors.ts';
import type { Connector } from '../kedge/connector.ts';

type SecureConnector = ReturnType<ChannelCredentials['_createSecureConnector']>;

/**
 * Lets grpc-js open TCP and our connector do TLS, so that both wires show the same certificate, verify the same name and
 * call a failure the same. `onFailure` hears of it, because grpc-js keeps no more than its text.
 */
export class KedgeCredentials extends ChannelCredentials {
  private readonly connector: Connector;
  private readonly onFailure: (error: KedgeError) => void;

  constructor(connector: Connector, onFailure: (error: KedgeError) => void) {
    super();
    this.connector = connector;
    this.onFailure = onFailure;
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
    const { connector, onFailure } = this;
    return {
      connect: (socket: Socket) =>
        new Promise((resolve, reject) => {
          if (!connector.isSecure) {
            resolve({ socket, secure: false });
            return;
          }
          connector.secure(socket, ['h2'], (error, secured) => {
            if (error !== null) {
              onFailure(error);
              reject(error);
              return;
            }
            secured!.once('error', () => {
              if (connector.refusal !== undefined) onFailure(connector.refusal);
            });
            resolve({ socket: secured!, secure: true });
          });
        }),
      waitForReady: () => Promise.resolve(),
      getCallCredentials: () => callCredentials ?? NO_CALL_CREDENTIALS,
      destroy: () => {},
    };
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
