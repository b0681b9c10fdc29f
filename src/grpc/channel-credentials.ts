import type { CallCredentials, ChannelCredentials } from '@grpc/grpc-js';
import { NO_CALL_CREDENTIALS } from './policy.ts';

/** The call credentials that a caller composed into its channel credentials: they are kept, whatever is dialled. */
export function callCredentialsOf(channelCredentials: ChannelCredentials | undefined): CallCredentials | undefined {
  if (channelCredentials === undefined) return undefined;
  const connector = channelCredentials._createSecureConnector({ scheme: 'dns', path: 'localhost' }, {});
  const callCredentials = connector.getCallCredentials();
  connector.destroy();
  return callCredentials._equals(NO_CALL_CREDENTIALS) ? undefined : callCredentials;
}
