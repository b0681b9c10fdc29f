/** Kedges that break off, turn away or drag out what was sent on an open connection. */
import http from 'node:http';
import http2 from 'node:http2';
import type { Socket } from 'node:net';
import { setTimeout as sleep } from 'node:timers/promises';
import { type KedgeHandler, startKedge } from '../../helpers/kedge.ts';
import { codeOf, failures, noneFailed, tally, typed, within } from '../asserts.ts';
import { answer, echo, ID } from '../backend.ts';
import { httpClient } from '../clients.ts';
import { AMPLE_BUDGET, startFaulty } from '../kedges.ts';
import type { Scenario } from '../run.ts';
import type { World } from '../world.ts';

type Request = Parameters<KedgeHandler>[0];
type Response = Parameters<KedgeHandler>[1];

/** A handler that goes wrong once in a while, and answers otherwise. */
function everyNth(world: World, nth: number, fault: (request: Request, response: Response) => void): KedgeHandler {
  let count = 0;
  return (request, response) => {
    count += 1;
    request.on('error', () => {});
    if (count % nth === 0) fault(request, response);
    else void answer(world.ledger, request, response);
  };
}

const beforeHeaders: Scenario = {
  name: 'RST before headers',
  executions: 3,
  run: async (world) => {
    const fault = (request: Request) => {
      world.ledger.execute(request.headers);
      setTimeout(() => cut(request), 2);
    };
    const [bad, good] = await Promise.all([startFaulty(world, everyNth(world, 20, fault)), startFaulty(world)]);
    const load = world.load(world.clients([bad.url, good.url], { dialer: AMPLE_BUDGET }));
    await world.pass(15, 3);
    await load.stop();
    noneFailed(world, load.calls, 'idempotent');
    typed(world, load.calls, ['ERR_KEDGE_CONNECTION']);
    const often = load.calls.filter(({ id, wire }) => wire !== 'grpc' && (world.ledger.executions.get(id) ?? 0) > 2);
    world.check(often.length === 0, `${often.length} HTTP requests were sent again more than once`);
    world.check(good.seen.length > 0, 'nothing was sent again elsewhere');
    world.note(`lost: ${tally(failures(load.calls))}`);
  },
};

function cut(request: Request): void {
  const socket = request instanceof http.IncomingMessage ? request.socket : request.stream.session?.socket;
  // The socket of a TLS server is reset below TLS.
  const tcp = (socket as unknown as { _parent?: Socket } | undefined)?._parent;
  if (tcp?.destroyed === false) tcp.resetAndDestroy();
  socket?.destroy();
}

const midBody: Scenario = {
  name: 'RST mid-body',
  executions: 1,
  run: async (world) => {
    const hit = new Set<string>();
    const fault = async (request: Request, response: Response) => {
      world.ledger.execute(request.headers);
      hit.add(String(request.headers[ID]));
      const body = echo(request, '');
      response.setHeader('content-type', 'application/json');
      // Without a length, the end of the connection is all that a truncated answer would have for an end.
      if (hit.size % 2 === 0) response.setHeader('content-length', body.length + 1000);
      (response as NodeJS.WritableStream).write(body);
      await sleep(30);
      cut(request);
    };
    // A connection that is cut takes others with it that had no answer yet: one at a time keeps those apart.
    const [bad, good] = await Promise.all([
      startFaulty(
        world,
        everyNth(world, 5, (request, response) => void fault(request, response)),
      ),
      startFaulty(world),
    ]);
    for (const client of world.clients([bad.url, good.url], { wires: ['h1', 'h2'] })) {
      const end = performance.now() + Math.max(6000 * world.scale, 1500);
      while (performance.now() < end) await world.call(client, 'GET');
    }
    const spared = world.calls.filter(({ id, ok }) => hit.has(id) && ok);
    world.check(hit.size > 0, 'nothing was cut');
    world.check(spared.length === 0, `${spared.length} truncated answers passed for whole`);
    noneFailed(
      world,
      world.calls.filter(({ id }) => !hit.has(id)),
    );
    typed(world, world.calls, ['ERR_KEDGE_CONNECTION', 'ERR_KEDGE_RESPONSE']);
  },
};

const graceful: Scenario = {
  name: 'graceful GOAWAY every 100 streams',
  run: async (world) => {
    const served = new WeakMap<object, number>();
    let goaways = 0;
    const handler: KedgeHandler = (request, response) => {
      if (!(request instanceof http.IncomingMessage)) {
        const session = request.stream.session!;
        const count = (served.get(session) ?? 0) + 1;
        served.set(session, count);
        if (count === 100) {
          goaways += 1;
          session.close();
        }
      }
      void answer(world.ledger, request, response);
    };
    const kedges = await Promise.all([startFaulty(world, handler), startFaulty(world, handler)]);
    const load = world.load(
      world.clients(
        kedges.map(({ url }) => url),
        { wires: ['h2', 'grpc'] },
      ),
      { rate: 150 },
    );
    await world.pass(15, 4);
    await load.stop();
    noneFailed(world, load.calls);
    world.check(goaways >= 4, `${goaways} GOAWAYs`);
    world.note(`${goaways} GOAWAYs`);
  },
};

const abrupt: Scenario = {
  name: 'abrupt GOAWAY',
  executions: 3,
  run: async (world) => {
    const leaving = new WeakSet<object>();
    const served = new WeakMap<object, number>();
    const handler: KedgeHandler = (request, response) => {
      if (request instanceof http.IncomingMessage) return;
      const session = request.stream.session!;
      if (leaving.has(session)) return; // it said so
      const count = (served.get(session) ?? 0) + 1;
      served.set(session, count);
      if (count % 60 !== 0) return void answer(world.ledger, request, response);
      // This one is executed and its answer lost; all later ones are not looked at.
      leaving.add(session);
      world.ledger.execute(request.headers);
      session.goaway(http2.constants.NGHTTP2_NO_ERROR, request.stream.id);
      setTimeout(() => session.destroy(), 40);
    };
    const kedges = await Promise.all([startFaulty(world, handler), startFaulty(world, handler)]);
    const load = world.load(
      world.clients(
        kedges.map(({ url }) => url),
        { wires: ['h2', 'grpc'] },
      ),
      { rate: 100 },
    );
    await world.pass(15, 4);
    await load.stop();
    noneFailed(world, load.calls, 'idempotent');
    const unprocessed = failures(load.calls).filter(({ id }) => !world.ledger.executions.has(id));
    world.check(
      unprocessed.length === 0,
      `${unprocessed.length} calls failed that were not processed: ${tally(unprocessed)}`,
    );
    typed(world, load.calls, ['ERR_KEDGE_CONNECTION']);
    world.note(`processed and lost: ${tally(failures(load.calls))}`);
  },
};

const refusedStream: Scenario = {
  name: 'REFUSED_STREAM from one whole kedge',
  run: async (world) => {
    let turned = 0;
    const bad = await startFaulty(world, (request) => {
      turned += 1;
      if (!(request instanceof http.IncomingMessage)) request.stream.close(http2.constants.NGHTTP2_REFUSED_STREAM);
    });
    const good = await startFaulty(world);
    const load = world.load(world.clients([bad.url, good.url], { wires: ['h2', 'grpc'] }));
    await world.pass(10, 2);
    await load.stop();
    noneFailed(world, load.calls);
    world.check(turned > 0, 'nothing was turned away');
    world.note(`${turned} streams refused`);
  },
};

const PATIENCE_MS = 1000;

const slowLoris: Scenario = {
  name: 'slow-loris response',
  run: async (world) => {
    const kedge = await startKedge(world.asTest, {
      settings: { maxConcurrentStreams: 1000 },
      handler: (request, response) => {
        const { url } = request;
        if (url === '/silent') return void request.resume();
        if (url !== '/idle') return void answer(world.ledger, request, response);
        request.resume();
        (response as NodeJS.WritableStream).write('{');
      },
    });
    const urls = [kedge.url];
    const dialer = { http: { connections: 64 } };
    const load = world.load(world.clients(urls));
    const timeouts = { headersTimeout: PATIENCE_MS, bodyTimeout: PATIENCE_MS };
    const dragged = ['/silent', '/idle'].flatMap((path) =>
      world.clients(urls, { ...timeouts, path, dialer, wires: ['h1', 'h2'] }),
    );
    const slow = world.load(dragged, { rate: 10, methods: ['GET'] });
    await world.pass(10, 3);
    await Promise.all([slow.stop(), load.stop()]);
    noneFailed(world, load.calls);
    within(world, load.calls, 1000, 'other streams');
    world.check(
      slow.calls.every(({ ok }) => !ok),
      'a silent answer went well',
    );
    const kinds = new Set(slow.calls.map(codeOf));
    world.check([...kinds].join() === 'ERR_KEDGE_TIMEOUT', `slow answers end as ${[...kinds]}`);
    // undici's timers turn once a second.
    within(world, slow.calls, PATIENCE_MS + 2000, 'the deadline');
    // One dialer, so that those that wait and those that do not are streams of one connection.
    const shared = world.dialer(urls, { http: { protocol: 'h2', connections: 1 } });
    const [silent, quick] = [{ path: '/silent', ...timeouts }, {}].map((options) =>
      httpClient('h2', shared.dispatcher, options),
    );
    const both = await Promise.all([
      ...Array.from({ length: 50 }, () => world.call(silent!)),
      ...Array.from({ length: 50 }, () => world.call(quick!)),
    ]);
    noneFailed(world, both.slice(50));
    within(world, both.slice(50), 1000, 'other streams of one connection');
    typed(world, both.slice(0, 50), ['ERR_KEDGE_TIMEOUT']);
  },
};

export const streams: readonly Scenario[] = [beforeHeaders, midBody, graceful, abrupt, refusedStream, slowLoris];
