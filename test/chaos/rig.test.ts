import assert from 'node:assert/strict';
import { describe, it } from 'node:test';
import { Agent, Dispatcher } from 'undici';
import type { Dialer } from '../../src/index.ts';
import { noneFailed } from './asserts.ts';
import { httpClient } from './clients.ts';
import { AMPLE_BUDGET, startPair } from './kedges.ts';
import { Load } from './load.ts';
import { type Row, runScenario, type Scenario } from './run.ts';
import { Secrets } from './secrets.ts';

type Dispatch = (options: Dispatcher.DispatchOptions, handler: Dispatcher.DispatchHandler) => boolean;
type Sabotage = (dispatcher: Dialer['dispatcher'], urls: readonly string[]) => Dialer['dispatcher'];

/** A second under load, in which one kedge is reset: short, and with all that the rig looks at. */
const SCENARIO: Scenario = {
  name: 'a reset',
  run: async (world) => {
    const { urls, relays } = await startPair(world);
    // What is broken below is an HTTP dispatcher.
    const load = world.load(world.clients(urls, { wires: ['h1', 'h2'], dialer: AMPLE_BUDGET }));
    await world.pass(1);
    relays[0]!.reset();
    await world.pass(1);
    await load.stop();
    noneFailed(world, load.calls, 'idempotent');
  },
};

async function run(sabotage?: Sabotage, scenario = SCENARIO): Promise<Row> {
  const secrets = new Secrets();
  secrets.watch();
  try {
    return await runScenario(scenario, { seed: 7, scale: 1, secrets, ...(sabotage === undefined ? {} : { sabotage }) });
  } finally {
    secrets.unwatch();
  }
}

/** A dispatcher of which only `dispatch()` is called. */
function dispatcher(dispatch: Dispatch): Dialer['dispatcher'] {
  return Object.assign(new (class extends Dispatcher {})(), { dispatch }) as Dialer['dispatcher'];
}

/** Everything that a handler hears, with some of it replaced. */
function around(handler: Dispatcher.DispatchHandler, own: Dispatcher.DispatchHandler): Dispatcher.DispatchHandler {
  return {
    onRequestStart: (...args) => handler.onRequestStart?.(...args),
    onResponseStart: (...args) => handler.onResponseStart?.(...args),
    onResponseData: (...args) => handler.onResponseData?.(...args),
    onResponseEnd: (...args) => handler.onResponseEnd?.(...args),
    onResponseError: (...args) => handler.onResponseError?.(...args),
    ...own,
  };
}

/** The canary of the scenario that runs. */
let token = '';

const BROKEN: Record<string, { sabotage: Sabotage; violation: RegExp }> = {
  'sends every POST twice': {
    sabotage: (real) =>
      dispatcher((options, handler) => {
        if (options.method === 'POST') real.dispatch(options, { onRequestStart: () => {}, onResponseError: () => {} });
        return real.dispatch(options, handler);
      }),
    violation: /not idempotent were executed more than once/,
  },
  'retries what was lost, whatever it is': {
    sabotage: (real) =>
      dispatcher((options, handler) => {
        // A retry after the answer: what an interceptor without a look at the method does with a lost connection.
        const onResponseEnd: Dispatcher.DispatchHandler['onResponseEnd'] = () => void real.dispatch(options, handler);
        const quiet = { onResponseStart: () => {}, onResponseData: () => {}, onResponseEnd };
        return real.dispatch(options, options.method === 'POST' ? around(handler, quiet) : handler);
      }),
    violation: /not idempotent were executed more than once/,
  },
  'swaps the answers of two calls': {
    sabotage: (real) => {
      let waiting: (() => Dispatcher.DispatchHandler) | undefined;
      let swap: (handler: Dispatcher.DispatchHandler) => void = () => {};
      return dispatcher((options, handler) => {
        if (waiting !== undefined) {
          const first = waiting();
          swap(handler);
          return real.dispatch(options, first);
        }
        const alone = setTimeout(() => swap(handler), 100);
        swap = (theirs) => {
          clearTimeout(alone);
          waiting = undefined;
          real.dispatch(options, theirs);
        };
        waiting = () => handler;
        return true;
      });
    },
    violation: /an answer that was not theirs/,
  },
  'cuts answers short': {
    sabotage: (real) =>
      dispatcher((options, handler) => {
        const onResponseData: Dispatcher.DispatchHandler['onResponseData'] = (controller, chunk) =>
          handler.onResponseData?.(controller, chunk.subarray(0, 10));
        return real.dispatch(options, around(handler, { onResponseData }));
      }),
    violation: /not whole/,
  },
  'ends calls twice': {
    sabotage: (real) =>
      dispatcher((options, handler) => {
        const onResponseEnd: Dispatcher.DispatchHandler['onResponseEnd'] = (controller, trailers) => {
          handler.onResponseEnd?.(controller, trailers);
          handler.onResponseError?.(controller, new Error('late'));
        };
        return real.dispatch(options, around(handler, { onResponseEnd }));
      }),
    violation: /settled more than once/,
  },
  'puts the token into errors': {
    sabotage: (real) =>
      dispatcher((options, handler) => {
        const onResponseEnd: Dispatcher.DispatchHandler['onResponseEnd'] = (controller) => {
          const error = Object.assign(new Error('failed'), { request: { headers: [`Bearer ${token}`] } });
          handler.onResponseError?.(controller, error);
        };
        return real.dispatch(options, around(handler, { onResponseEnd }));
      }),
    violation: /a secret was printed: an error/,
  },
  'is an undici Agent that pins no server name': {
    sabotage: (_real, [url]) => {
      const agent = new Agent();
      return dispatcher((options, handler) => agent.dispatch({ ...options, origin: url! }, handler));
    },
    violation: /calls failed/,
  },
};

describe('the rig', () => {
  it('finds nothing in the dialer', async () => {
    const row = await run();
    assert.deepEqual(row.violations, []);
    assert.ok(row.calls > 150, `${row.calls} calls`);
    assert.deepEqual([row.duplicated, row.crossed], [0, 0]);
  });

  for (const [what, { sabotage, violation }] of Object.entries(BROKEN)) {
    it(`finds a dialer that ${what}`, async () => {
      const row = await run(sabotage, {
        ...SCENARIO,
        run: (world) => {
          token = world.token;
          return SCENARIO.run(world);
        },
      });
      assert.match(row.violations.join('\n'), violation);
    });
  }

  it('keeps to its schedule however slow the answers are', async () => {
    const silent = httpClient(
      'h1',
      dispatcher(() => true),
    );
    const load = new Load([silent], () => 0.5, { rate: 200 });
    await new Promise((resolve) => setTimeout(resolve, 500));
    assert.ok(load.calls.length > 60, `${load.calls.length} calls began`);
    clearInterval((load as unknown as { timer: NodeJS.Timeout }).timer);
  });
});
