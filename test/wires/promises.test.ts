/** What every wire promises, once: each row is a thing that happens to a call, and runs on all of them. */
import assert from 'node:assert/strict';
import type http2 from 'node:http2';
import { describe, it, type TestContext } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { createGrpcTransport } from '@connectrpc/connect-node';
import * as grpc from '@grpc/grpc-js';
import { connectDialer } from '../../src/connectrpc/index.ts';
import { grpcDialer } from '../../src/grpc/index.ts';
import {
  createDialer,
  type Dialer,
  type DialerOptions,
  isKedgeError,
  type KedgeError,
  pem,
  type RouteOptions,
  single,
  type TokenSource,
} from '../../src/index.ts';
import { greeterClient } from '../helpers/greeter.ts';
import { KEDGE_NAME, type KedgeHandler, type Seen, startKedge, type TestKedge } from '../helpers/kedge.ts';

const HOST = 'a.us1:9090';

/** What a caller of this wire writes for one call that may not be executed twice; `caller`: headers of its own. */
type Send = (dialer: Dialer, caller?: Record<string, string>) => Promise<unknown>;

interface Wire {
  readonly send: Send;
  readonly options?: Partial<DialerOptions>;
  readonly isH2: boolean;
  readonly isRpc: boolean;
}

const text = Buffer.from('\x0a\x02hi');
const identity = (value: Buffer) => value;

const fetching: Send = async (dialer, caller = {}) => {
  const response = await dialer.fetch(`http://${HOST}/`, { method: 'POST', body: 'hi', headers: caller });
  await response.arrayBuffer();
  if (!response.ok) throw new Error(`HTTP ${response.status}`);
};

const WIRES: Readonly<Record<string, Wire>> = {
  'HTTP/1.1': { send: fetching, options: { http: { protocol: 'h1' } }, isH2: false, isRpc: false },
  'HTTP/2': { send: fetching, isH2: true, isRpc: false },
  'grpc-js': {
    send: async (dialer, caller = {}) => {
      const Client = grpcDialer(dialer).wrap(grpc.Client);
      const client = new Client(HOST, grpc.credentials.createInsecure());
      const metadata = new grpc.Metadata();
      for (const [name, value] of Object.entries(caller)) metadata.set(name, value);
      try {
        await new Promise((resolve, reject) => {
          client.makeUnaryRequest('/test.Greeter/Unary', identity, identity, text, metadata, (error, reply) =>
            error === null ? resolve(reply) : reject(error),
          );
        });
      } finally {
        client.close();
      }
    },
    isH2: true,
    isRpc: true,
  },
  'connect-es': {
    send: async (dialer, caller = {}) => {
      const baseUrl = `http://${HOST}`;
      const transport = createGrpcTransport({ baseUrl, sessionManager: connectDialer(dialer).sessionManager(baseUrl) });
      await greeterClient(transport).unary({ value: 'hi' }, { headers: caller });
    },
    isH2: true,
    isRpc: true,
  },
};

const answer: KedgeHandler = (request, response) => {
  request.on('error', () => {});
  request.resume().on('end', () => {
    if (!/^application\/grpc/.test(String(request.headers['content-type']))) {
      response.end('hi');
      return;
    }
    const compat = response as http2.Http2ServerResponse;
    compat.setHeader('content-type', 'application/grpc');
    compat.addTrailers({ 'grpc-status': '0' });
    compat.end(Buffer.concat([Buffer.from([0, 0, 0, 0, text.length]), text]));
  });
};

/** As a kedge refuses the token for itself: 407 with its own header, on gRPC as well. */
const refuse: KedgeHandler = (request, response) => {
  request.on('error', () => {}).resume();
  response.statusCode = 407;
  response.setHeader('x-kedge-error', 'bad token');
  response.end();
};

const streamOf = (response: Parameters<KedgeHandler>[1]) => (response as http2.Http2ServerResponse).stream;

/** A dialer whose route has these kedges, in turn. */
function dialerOf(t: TestContext, wire: Wire, kedges: readonly TestKedge[], more: Extra = {}): Dialer {
  const { cert, key } = kedges[0]!.client;
  const { route, ...options } = more;
  const dialer = createDialer({
    mapper: single({ kedge: kedges.map(({ url }) => url), serverName: KEDGE_NAME, ...route }),
    identity: pem({ cert, key, ca: kedges[0]!.ca.cert }),
    ...wire.options,
    ...options,
  });
  t.after(() => dialer.destroy());
  return dialer;
}

type Extra = Partial<DialerOptions> & { route?: RouteOptions };

async function failureOf(call: Promise<unknown>): Promise<KedgeError> {
  let error: unknown;
  try {
    await call;
  } catch (caught) {
    error = caught;
  }
  assert.ok(error !== undefined, 'the call failed');
  for (let each: unknown = error; each !== undefined; each = (each as Error).cause) if (isKedgeError(each)) return each;
  throw error;
}

/** Tokens `t1`, `t2`, ... of which one comes a moment late. */
function tokens(): TokenSource & { readonly asked: number } {
  let current: string | undefined;
  let asked = 0;
  return {
    name: 'counted',
    get asked() {
      return asked;
    },
    peek: () => current,
    token: async () => {
      asked += 1;
      await sleep(5);
      current = `t${asked}`;
      return current;
    },
    invalidate: () => {
      current = undefined;
    },
  };
}

async function gone(t: TestContext): Promise<TestKedge> {
  const kedge = await startKedge(t);
  await kedge.close();
  return kedge;
}

const header = (seen: Seen | undefined, name: string) => seen?.headers[name];

interface Row {
  readonly promise: string;
  /** Only where the wire has such a thing. */
  readonly on?: (wire: Wire) => boolean;
  run(t: TestContext, wire: Wire): Promise<void>;
}

const ROWS: readonly Row[] = [
  {
    promise: 'a call whose first kedge is down goes to the second, once, and the next one goes there at once',
    run: async (t, wire) => {
      const second = await startKedge(t, { handler: answer });
      const dialer = dialerOf(t, wire, [await gone(t), second]);
      for (let i = 1; i <= 4; i += 1) {
        await wire.send(dialer);
        assert.equal(second.seen.length, i);
      }
      assert.ok(second.handshakes <= (wire.isH2 ? 1 : 2));
      assert.equal(dialer.stats().kedges[0]!.breaker, 'open');
    },
  },
  {
    promise: 'nothing is sent to a kedge whose certificate is for another name',
    run: async (t, wire) => {
      const second = await startKedge(t, { handler: answer });
      const dialer = createDialer({
        mapper: single(second.url),
        identity: pem({ cert: second.client.cert, key: second.client.key, ca: second.ca.cert }),
        ...wire.options,
      });
      t.after(() => dialer.destroy());
      const error = await failureOf(wire.send(dialer));
      assert.equal(error.code, 'ERR_KEDGE_CERTIFICATE');
      assert.equal(second.seen.length, 0);
    },
  },
  {
    promise: 'when all kedges are down, the error names code, stage, target and kedge',
    run: async (t, wire) => {
      const last = await gone(t);
      const error = await failureOf(wire.send(dialerOf(t, wire, [await gone(t), last])));
      const { code, stage, target, kedge } = error;
      assert.deepEqual({ code, stage, target }, { code: 'ERR_KEDGE_CONNECT', stage: 'connect', target: HOST });
      assert.match(String(kedge), /^127\.0\.0\.1:\d+$/);
    },
  },
  {
    promise: 'a stream that a kedge refuses is sent once more, and no oftener',
    on: ({ isH2 }) => isH2,
    run: async (t, wire) => {
      let refused = 0;
      const kedge = await startKedge(t, {
        handler: (request, response, seen) => {
          if (refused > 0) {
            refused -= 1;
            request.on('error', () => {});
            streamOf(response).close(7);
          } else answer(request, response, seen);
        },
      });
      const dialer = dialerOf(t, wire, [kedge]);
      await wire.send(dialer);
      refused = 1;
      if (wire === WIRES['connect-es']) {
        // It has no way to send a stream's messages again.
        assert.equal((await failureOf(wire.send(dialer))).code, 'ERR_KEDGE_CONNECTION');
      } else {
        await wire.send(dialer);
        assert.equal(kedge.seen.length, 3);
        refused = 2;
        await failureOf(wire.send(dialer));
        assert.equal(kedge.seen.length, 5);
      }
    },
  },
  {
    promise: 'a call that may have been executed is not sent again, and its error names the kedge',
    run: async (t, wire) => {
      let isBad = false;
      const handler: KedgeHandler = (request, response, seen) => {
        if (!isBad) answer(request, response, seen);
        else
          request
            .on('error', () => {})
            .resume()
            .on('end', () => first.reset());
      };
      const first: TestKedge = await startKedge(t, { handler });
      const second = await startKedge(t, { handler: answer });
      const dialer = dialerOf(t, wire, [first, second]);
      await wire.send(dialer);
      isBad = true;
      const { code, kedge, target } = await failureOf(wire.send(dialer));
      const expected = { code: 'ERR_KEDGE_CONNECTION', kedge: new URL(first.url).host, target: HOST };
      assert.deepEqual({ code, kedge, target }, expected);
      assert.deepEqual([first.seen.length, second.seen.length], [2, 0]);
    },
  },
  {
    promise: 'a token that comes late is waited for, and asked for once by many calls',
    run: async (t, wire) => {
      const kedge = await startKedge(t, { handler: answer });
      const source = tokens();
      const dialer = dialerOf(t, wire, [kedge], { route: { proxyAuth: source } });
      await wire.send(dialer);
      await Promise.all(Array.from({ length: 5 }, () => wire.send(dialer)));
      assert.equal(source.asked, 1);
      assert.ok(kedge.seen.every((seen) => header(seen, 'proxy-authorization') === 'Bearer t1'));
    },
  },
  {
    promise: 'a token that the kedge refuses is fetched anew: HTTP sends the call once more, RPCs give it to the next',
    run: async (t, wire) => {
      const kedge = await startKedge(t, {
        handler: (request, response, seen) =>
          (header(seen, 'proxy-authorization') === 'Bearer t1' ? refuse : answer)(request, response, seen),
      });
      const source = tokens();
      const dialer = dialerOf(t, wire, [kedge], { route: { proxyAuth: source } });
      if (wire.isRpc) await assert.rejects(wire.send(dialer));
      await wire.send(dialer);
      assert.deepEqual(
        kedge.seen.map((seen) => header(seen, 'proxy-authorization')),
        ['Bearer t1', 'Bearer t2'],
      );
    },
  },
  {
    promise: 'no call goes round in circles when every token is refused',
    run: async (t, wire) => {
      const kedge = await startKedge(t, { handler: refuse });
      const source = tokens();
      const dialer = dialerOf(t, wire, [kedge], { route: { proxyAuth: source } });
      const error = wire.isRpc ? undefined : await failureOf(wire.send(dialer));
      if (wire.isRpc) await assert.rejects(wire.send(dialer));
      else assert.equal(error!.code, 'ERR_KEDGE_UNAUTHORIZED');
      assert.equal(kedge.seen.length, wire.isRpc ? 1 : 2);
      assert.ok(source.asked <= 2);
    },
  },
  {
    promise: "a caller's own authorization stays, unless the route overrides it",
    run: async (t, wire) => {
      const kedge = await startKedge(t, { handler: answer });
      for (const overrideAuthorization of [false, true]) {
        const dialer = dialerOf(t, wire, [kedge], { route: { backendAuth: tokens(), overrideAuthorization } });
        await wire.send(dialer, { authorization: 'own' });
        const sent = header(kedge.seen.at(-1), 'authorization');
        assert.equal(sent, overrideAuthorization ? 'Bearer t1' : 'own');
        await wire.send(dialer);
        assert.equal(header(kedge.seen.at(-1), 'authorization'), 'Bearer t1');
      }
    },
  },
  {
    promise: "a caller's own proxy-authorization is refused where the route brings one, and nothing is sent",
    run: async (t, wire) => {
      const kedge = await startKedge(t, { handler: answer });
      const dialer = dialerOf(t, wire, [kedge], { route: { proxyAuth: tokens() } });
      const error = await failureOf(wire.send(dialer, { 'proxy-authorization': 'own' }));
      assert.equal(error.code, 'ERR_KEDGE_REQUEST');
      assert.equal(kedge.seen.length, 0);
    },
  },
  {
    promise: 'a token source that fails fails the call with its name, before anything is dialled',
    run: async (t, wire) => {
      const kedge = await startKedge(t, { handler: answer });
      const failing: TokenSource = {
        name: 'broken',
        peek: () => undefined,
        token: async () => {
          throw new Error('no disk');
        },
      };
      const error = await failureOf(wire.send(dialerOf(t, wire, [kedge], { route: { proxyAuth: failing } })));
      assert.equal(error.code, 'ERR_KEDGE_TOKEN_UNAVAILABLE');
      assert.match(error.message, /broken/);
      assert.equal(kedge.seen.length, 0);
    },
  },
  {
    promise: 'destroy() ends a call that waits for a token, and one that waits for its answer',
    run: async (t, wire) => {
      const kedge = await startKedge(t, { handler: (request) => void request.on('error', () => {}).resume() });
      const never: TokenSource = { name: 'never', peek: () => undefined, token: () => new Promise(() => {}) };
      for (const proxyAuth of [never, tokens()]) {
        const dialer = dialerOf(t, wire, [kedge], { route: { proxyAuth } });
        const before = kedge.seen.length;
        const call = failureOf(wire.send(dialer));
        if (proxyAuth === never) await sleep(20);
        else while (kedge.seen.length === before) await sleep(5);
        assert.equal(dialer.stats().inFlight, 1);
        const destroyed = dialer.destroy();
        assert.equal((await call).code, 'ERR_KEDGE_CLOSED');
        await destroyed;
        assert.equal(dialer.stats().inFlight, 0);
      }
    },
  },
  {
    promise: 'close() waits for the call under way and takes no other',
    run: async (t, wire) => {
      let release = () => {};
      const kedge = await startKedge(t, {
        handler: (...call) => {
          release = () => answer(...call);
        },
      });
      const dialer = dialerOf(t, wire, [kedge]);
      const call = wire.send(dialer);
      while (kedge.seen.length === 0) await sleep(5);
      let isClosed = false;
      const closed = dialer.close().then(() => {
        isClosed = true;
      });
      await sleep(20);
      assert.equal(isClosed, false);
      assert.equal((await failureOf(wire.send(dialer))).code, 'ERR_KEDGE_CLOSED');
      release();
      await call;
      await closed;
      assert.equal(kedge.seen.length, 1);
    },
  },
];

for (const [name, wire] of Object.entries(WIRES)) {
  describe(`what ${name} promises as the other wires do`, () => {
    for (const { promise, on, run } of ROWS) if (on?.(wire) !== false) it(promise, (t) => run(t, wire));
  });
}
