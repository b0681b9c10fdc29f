import type { TestContext } from 'node:test';
import * as grpc from '@grpc/grpc-js';
import * as undici from 'undici';
import { grpcDialer } from '../../src/grpc/index.ts';
import { type Dialer, isKedgeError, type KedgeError } from '../../src/index.ts';
import { echoClient, unary } from './grpc-kedge.ts';

/** `map`: through the kedge, with the authority that it saw; `pass`: unmapped; `refuse`: with the code, undefined where a URL parser was first. */
export type Outcome =
  | { readonly is: 'map'; readonly authority: string }
  | { readonly is: 'pass' }
  | { readonly is: 'refuse'; readonly code: string | undefined };

export interface EntryPoint {
  readonly name: string;
  /** Whether the caller's URL parser reads the input first. */
  readonly isUrl: boolean;
  readonly wire: 'http' | 'grpc';
  /** `host[:port]` goes in, whatever it looks like. */
  call(input: string): Promise<Outcome>;
}

const EchoClient = echoClient();

/**
 * Every way into a dialer. `fallback` is where its unmapped requests go; its kedge answers HTTP with JSON that has
 * `authority`, and gRPC as the echo service does.
 */
export function entryPoints(t: TestContext, dialer: Dialer): EntryPoint[] {
  const { dispatcher } = dialer;
  const gRPC = grpcDialer(dialer);
  const fromJson = async (status: number, text: string): Promise<Outcome> =>
    status === 299 ? { is: 'pass' } : { is: 'map', authority: (JSON.parse(text) as { authority: string }).authority };
  const fromUndici = async (answer: Promise<undici.Dispatcher.ResponseData>) => {
    const { statusCode, body } = await answer;
    return fromJson(statusCode, await body.text());
  };
  const http = (name: string, isUrl: boolean, call: (input: string) => Promise<Outcome>): EntryPoint => ({
    name,
    isUrl,
    wire: 'http',
    call: settled(call),
  });
  const rpc = (name: string, connect: (input: string) => InstanceType<typeof EchoClient>): EntryPoint => ({
    name,
    isUrl: false,
    wire: 'grpc',
    call: settled(async (input) => {
      const client = connect(input);
      t.after(() => client.close());
      const { authority } = await unary(client, 'x', undefined, { deadline: Date.now() + 5000 });
      return { is: 'map', authority };
    }),
  });
  const explain = (name: string, wire: 'http' | 'grpc', isUrl: boolean, inputOf: (input: string) => string | URL) => ({
    name,
    isUrl,
    wire,
    call: settled(async (input): Promise<Outcome> => {
      const { outcome, target } = dialer.explain(inputOf(input), { wire });
      return outcome === 'kedge' ? { is: 'map', authority: target } : { is: 'pass' };
    }),
  });
  return [
    http('built-in fetch', true, async (input) => {
      const response = await fetch(`http://${input}/`, { dispatcher } as RequestInit);
      return fromJson(response.status, await response.text());
    }),
    http('undici request, URL text', true, (input) =>
      fromUndici(undici.request(`http://${input}/`, { dispatcher: dispatcher as never })),
    ),
    http('undici request, URL object', true, (input) =>
      fromUndici(undici.request(new URL(`http://${input}/`), { dispatcher: dispatcher as never })),
    ),
    http('dispatcher, origin text', false, (input) =>
      fromUndici(dispatcher.request({ origin: `http://${input}`, path: '/', method: 'GET' }) as never),
    ),
    http('dispatcher, origin URL', true, (input) =>
      fromUndici(
        dispatcher.request({ origin: new URL(new URL(`http://${input}/`).origin), path: '/', method: 'GET' }) as never,
      ),
    ),
    rpc('gRPC wrap', (input) => new (gRPC.wrap(EchoClient))(input)),
    rpc(
      'gRPC channel',
      (input) => new EchoClient(input, grpc.credentials.createInsecure(), { channelOverride: gRPC.channel(input) }),
    ),
    explain('explain, origin text', 'http', false, (input) => `http://${input}`),
    explain('explain, URL', 'http', true, (input) => new URL(`http://${input}/`)),
    explain('explain, gRPC', 'grpc', false, (input) => input),
  ];
}

function settled(call: (input: string) => Promise<Outcome>): (input: string) => Promise<Outcome> {
  return async (input) => {
    try {
      return await call(input);
    } catch (error) {
      const found = kedgeErrorIn(error);
      if (found?.code === 'ERR_KEDGE_UNMAPPED') return { is: 'pass' };
      return { is: 'refuse', code: found?.code };
    }
  };
}

function kedgeErrorIn(error: unknown): KedgeError | undefined {
  for (let at = error; at instanceof Error; at = at.cause) if (isKedgeError(at)) return at;
  return undefined;
}
