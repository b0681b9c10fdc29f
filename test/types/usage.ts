// What users write, compiled with each version of @types/node; nothing runs it. There must be no cast in here.
import { Client, credentials, type ServiceError } from '@grpc/grpc-js';
import { createDialer, type Dialer, isKedgeError, type KedgeDispatcher, pem, staticToken, suffix } from 'kedge-dialer';
import { grpcDialer } from 'kedge-dialer/grpc';
import * as undici from 'undici';

declare class GreeterClient extends Client {
  sayHello(request: { name: string }, callback: (error: ServiceError | null, reply?: { text: string }) => void): void;
}

const URL_ = 'http://orders.shop.svc.us1.prod.clusters.local:8080/';
const ADDRESS = 'greeter.shop.svc.us1.prod.clusters.local:9090';

export function dialer(): Dialer {
  return createDialer({
    mapper: suffix({
      match: '*.*.clusters.local',
      suffix: '.kedge.example.com',
      proxyAuth: staticToken('proxy'),
    }),
    identity: pem({ cert: '', key: Buffer.alloc(0), ca: '' }),
    fallback: new undici.Agent(),
    onWarning: (warning) => console.warn(warning.message),
  });
}

export async function builtIn(dispatcher: KedgeDispatcher): Promise<unknown[]> {
  const init: RequestInit = { method: 'POST', body: '{}', dispatcher };
  const response: Response = await fetch(URL_, { dispatcher, signal: AbortSignal.timeout(1000) });
  return [
    await response.json(),
    await fetch(new URL(URL_), init),
    await fetch(new Request(URL_, { dispatcher })),
    new WebSocket('ws://orders.shop.svc.us1.prod.clusters.local/', { dispatcher }),
  ];
}

export async function withUndici(dispatcher: KedgeDispatcher): Promise<void> {
  const asItsOwn: undici.Dispatcher = dispatcher;
  undici.setGlobalDispatcher(dispatcher);
  const { statusCode, body } = await undici.request(URL_, { dispatcher });
  await undici.stream(URL_, { dispatcher, method: 'GET' }, () => process.stdout);
  await (await undici.fetch(URL_, { dispatcher, method: 'POST', body: new undici.FormData() })).text();
  const retrying: undici.Dispatcher = dispatcher.compose(
    undici.interceptors.retry(),
    (dispatch) => (options, handler) => {
      return dispatch({ ...options, path: options.path.toLowerCase() }, handler);
    },
  );
  await undici.request(URL_, { dispatcher: retrying });
  await undici.request(URL_, { dispatcher: new undici.RetryAgent(asItsOwn) });
  const chunks: Buffer[] = [];
  for await (const chunk of body) chunks.push(chunk);
  console.log(statusCode.toFixed(), chunks.length);
}

export async function directly(dispatcher: KedgeDispatcher): Promise<void> {
  const { opaque, trailers, body } = await dispatcher.request({
    origin: URL_,
    path: '/',
    method: 'PUT',
    headers: { 'x-number': 1 },
    opaque: { attempt: 1 },
    onInfo: ({ headers }) => console.log(headers['link']),
  });
  console.log(opaque.attempt.toFixed(), trailers['grpc-status'], await body.text());
  dispatcher.request({ origin: URL_, path: '/', method: 'GET' }, (error, data) => console.log(error, data.statusCode));
  await dispatcher.stream({ origin: URL_, path: '/', method: 'GET' }, ({ statusCode }) => {
    console.log(statusCode.toFixed());
    return process.stdout;
  });
  dispatcher.pipeline({ origin: URL_, path: '/', method: 'GET' }, (response) => response.body).end();
  const accepted: boolean = dispatcher.dispatch(
    { origin: new URL(URL_), path: '/', method: 'GET' },
    {
      onRequestStart: (controller) => controller.abort(new Error('not today')),
      onResponseError: (_controller, error) => console.error(error.message),
    },
  );
  if (!accepted) dispatcher.once('drain', (origin) => console.log(origin.href));
  dispatcher.on('disconnect', (origin, targets, error) => console.log(origin.href, targets.length, error.code));
  // @ts-expect-error: a wrong type is still found
  dispatcher.request({ origin: URL_, path: 1, method: 'GET' });
  // @ts-expect-error: and a wrong name
  dispatcher.on('nothing', (origin: string) => origin);
  dispatcher.close(() => {});
  await dispatcher.destroy(new Error('over'));
  const chained: KedgeDispatcher = dispatcher
    .on('connect', (origin) => console.log(origin.href))
    .off('drain', () => {});
  const options: Parameters<KedgeDispatcher['dispatch']>[0] = { path: '/', method: 'GET' };
  // @ts-expect-error: nor may what is required be left out
  chained.request();
  console.log(options.path);
}

export async function wholeProcess(): Promise<void> {
  await using own = dialer();
  const restore: () => void = own.install();
  try {
    const response: Response = await own.fetch(URL_, { method: 'POST', body: 'x' });
    console.log(response.status, own.stats().handshakes);
  } catch (error) {
    if (isKedgeError(error) && error.code === 'ERR_KEDGE_TLS') console.error(error.kedge, error.cause);
  } finally {
    restore();
  }
  await own.close();
}

export function overGrpc(own: Dialer): void {
  const grpc = grpcDialer(own);
  const Greeter = grpc.wrap(GreeterClient);
  for (const client of [
    new Greeter(ADDRESS),
    new Greeter(ADDRESS, credentials.createInsecure(), { 'grpc.primary_user_agent': 'usage' }),
    new GreeterClient(ADDRESS, credentials.createInsecure(), { channelFactoryOverride: grpc.channelFactory }),
    new GreeterClient(ADDRESS, credentials.createInsecure(), { channelOverride: grpc.channel(ADDRESS) }),
  ]) {
    client.sayHello({ name: 'kedge' }, (error, reply) => console.log(error?.code, reply?.text));
  }
}
