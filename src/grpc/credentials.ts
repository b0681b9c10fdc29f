import type { Socket } from 'node:net';
import { type CallCredentials, ChannelCredentials, credentials } from '@grpc/grpc-js';
import { KedgeError } from '../errors.ts';
import { Connector } from '../kedge/connector.ts';

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
            secured!.once('error', (late: Error) => {
              // TLS 1.3: the kedge's verdict on our certificate comes after the handshake.
              if (!Connector.isClientCertificateRefusal(late)) return;
              const context = { kedge: connector.name, cause: late };
              const reason = 'the kedge refused the client certificate';
              onFailure(new KedgeError('ERR_KEDGE_CLIENT_CERTIFICATE', 'tls', reason, context));
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
