import type { ClientUnaryCall, ServiceError } from '@grpc/grpc-js';
import type { Dialer } from '../dialer.ts';
import { KedgeError } from '../support/errors.ts';
import { loadOptional } from '../support/optional-package.ts';

/** The origin of a target that may be given without a scheme. */
export function originOf(target: string): string {
  return new URL(target.includes('://') ? target : `http://${target}`).origin;
}

/** A gRPC client whose messages are bytes; `call` is one unary call with so many ms for its answer. */
export async function rawClient(dialer: Dialer, target: string) {
  const grpc = await loadOptional(
    '@grpc/grpc-js',
    () => import('@grpc/grpc-js'),
    (reason) => new KedgeError('ERR_KEDGE_OPTIONS', `--grpc ${reason}`),
  );
  const { grpcDialer } = await import('../grpc/index.ts');
  const client = new (grpcDialer(dialer).wrap(grpc.Client))(target);
  const pass = (bytes: Buffer) => bytes;
  const call = (
    path: string,
    message: Buffer,
    timeoutMs: number,
    done: (error: ServiceError | null) => void,
  ): ClientUnaryCall => {
    const options = { deadline: Date.now() + timeoutMs };
    return client.makeUnaryRequest(path, pass, pass, message, new grpc.Metadata(), options, done);
  };
  return { grpc, client, call };
}
