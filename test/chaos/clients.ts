import { type ClientOptions, Metadata } from '@grpc/grpc-js';
import type { Dispatcher } from 'undici';
import { grpcDialer } from '../../src/grpc/index.ts';
import type { Dialer } from '../../src/index.ts';
import { type EchoClient, echoClient } from '../helpers/grpc-kedge.ts';
import { type Answer, ID, PAD } from './backend.ts';
import type { Call } from './load.ts';

export type Wire = 'h1' | 'h2' | 'grpc';

/** Sends calls over one wire, and says when each has ended: as often as it is told. */
export interface Client {
  readonly wire: Wire;
  send(call: Call, settled: () => void): void;
}

export interface HttpCallOptions {
  /** Bytes of the answer besides the echo. */
  pad?: number;
  path?: string;
  headersTimeout?: number;
  bodyTimeout?: number;
}

type Dispatch = Pick<Dispatcher, 'dispatch'>;

/** Below undici's own API, so that a second end of a call, or a second beginning of its answer, does not go unseen. */
export function httpClient(wire: 'h1' | 'h2', dispatcher: Dispatch, options: HttpCallOptions = {}): Client {
  return {
    wire,
    send: (call, settled) => {
      const { pad = 0, path = '/', ...timeouts } = options;
      const body = call.method === 'GET' ? '' : `body of ${call.id}`;
      const chunks: Buffer[] = [];
      let beginnings = 0;
      const handler: Dispatcher.DispatchHandler = {
        onRequestStart: () => {},
        onResponseStart: (_controller, status) => {
          if (status < 200) return;
          beginnings += 1;
          call.status = status;
        },
        onResponseData: (_controller, chunk) => {
          chunks.push(chunk);
        },
        onResponseEnd: () => {
          const text = Buffer.concat(chunks).toString();
          if (call.status === 200) {
            call.crossed ||= beginnings !== 1 || !isAnswer(text, call, body, pad);
            call.ok = !call.crossed;
          } else call.error = new Error(`status ${call.status}: ${text}`);
          settled();
        },
        onResponseError: (_controller, error) => {
          call.error = error;
          settled();
        },
      };
      const headers = { [ID]: call.id, ...(pad > 0 ? { [PAD]: String(pad) } : {}) };
      const request = { origin: `http://${call.host}`, path, method: call.method as 'GET', headers, ...timeouts };
      dispatcher.dispatch(body === '' ? request : { ...request, body }, handler);
    },
  };
}

/** A truncated answer is no answer either. */
function isAnswer(text: string, call: Call, body: string, pad: number): boolean {
  try {
    const answer = JSON.parse(text) as Answer;
    return answer.id === call.id && answer.host === call.host && answer.body === body && answer.pad.length === pad;
  } catch {
    return false;
  }
}

const RETRIES = {
  methodConfig: [
    {
      name: [{}],
      retryPolicy: {
        maxAttempts: 3,
        initialBackoff: '0.05s',
        maxBackoff: '0.5s',
        backoffMultiplier: 2,
        retryableStatusCodes: ['UNAVAILABLE'],
      },
    },
  ],
};
const DEADLINE_MS = 30_000;

/** Two clients for each host: one retries by its service config, the other never does. */
export function grpcClient(dialer: Dialer, { deadlineMs = DEADLINE_MS }: { deadlineMs?: number } = {}): Client {
  const Echo = grpcDialer(dialer).wrap(echoClient());
  const clients = new Map<string, EchoClient>();
  const clientOf = ({ host, method }: Call): EchoClient => {
    const key = `${method} ${host}`;
    let client = clients.get(key);
    if (client === undefined) {
      const options: ClientOptions = method === 'RETRIED' ? { 'grpc.service_config': JSON.stringify(RETRIES) } : {};
      client = new Echo(host, undefined, options);
      clients.set(key, client);
    }
    return client;
  };
  return {
    wire: 'grpc',
    send: (call, settled) => {
      const metadata = new Metadata();
      metadata.set(ID, call.id);
      const fail = (error: unknown) => {
        call.error = error;
        settled();
      };
      try {
        const deadline = Date.now() + deadlineMs;
        clientOf(call).unary({ text: call.id }, metadata, { deadline }, (error, reply) => {
          if (error !== null) return fail(error);
          call.crossed = reply?.text !== call.id || reply.authority !== call.host;
          call.ok = !call.crossed;
          settled();
        });
      } catch (error) {
        fail(error);
      }
    },
  };
}
