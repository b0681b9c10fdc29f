import { setTimeout as sleep } from 'node:timers/promises';
import { type Call, isIdempotent, took } from './load.ts';
import { World, type WorldOptions } from './world.ts';

/** One row of the fault table. */
export interface Scenario {
  readonly name: string;
  run(world: World): Promise<void>;
  /** The most that an idempotent call may be executed. Default: 2, for one extra attempt. */
  readonly executions?: number;
}

/** What came of a scenario. */
export interface Row {
  scenario: string;
  calls: number;
  failed: number;
  /** Calls that must run once and were executed more often. */
  duplicated: number;
  crossed: number;
  recoveryMs: number;
  seconds: number;
  violations: string[];
  notes: string[];
}

/** How many errors are searched for secrets, in their whole depth. */
const INSPECTED = 200;

export async function runScenario(scenario: Scenario, options: WorldOptions): Promise<Row> {
  const began = performance.now();
  const world = new World(options);
  const unhandled = (reason: unknown) => world.violations.push(`unhandled: ${reason}`);
  process.on('unhandledRejection', unhandled);
  process.on('uncaughtException', unhandled);
  try {
    await world.begin();
    await scenario.run(world);
  } catch (error) {
    world.violations.push(`the scenario broke off: ${(error as Error).stack}`);
  }
  try {
    await world.end();
  } catch (error) {
    world.violations.push(`the end broke off: ${(error as Error).stack}`);
  }
  // What nobody handles comes a turn later.
  await sleep(20);
  process.off('unhandledRejection', unhandled);
  process.off('uncaughtException', unhandled);
  return judge(scenario, world, (performance.now() - began) / 1000);
}

/** What holds in every scenario, whatever else it asserts. */
function judge(scenario: Scenario, world: World, seconds: number): Row {
  const { ledger, secrets, violations } = world;
  const calls = world.allCalls;
  const count = (is: (call: Call) => boolean) => calls.filter(is).length;
  const executions = (call: Call) => ledger.executions.get(call.id) ?? 0;
  const unsettled = count(({ settled }) => settled === 0);
  const twice = count(({ settled }) => settled > 1);
  const crossed = count((call) => call.crossed);
  const duplicated = count((call) => !isIdempotent(call) && executions(call) > 1);
  const most = scenario.executions ?? 2;
  const repeated = count((call) => isIdempotent(call) && executions(call) > most);
  const invented = count((call) => call.ok && executions(call) === 0);
  world.check(unsettled === 0, `${unsettled} calls never settled`);
  world.check(twice === 0, `${twice} calls settled more than once`);
  world.check(crossed === 0, `${crossed} calls got an answer that was not theirs, or not whole`);
  world.check(duplicated === 0, `${duplicated} calls that are not idempotent were executed more than once`);
  world.check(repeated === 0, `${repeated} idempotent calls were executed more than ${most} times`);
  world.check(invented === 0, `${invented} calls succeeded that nobody executed`);
  world.check(ledger.leaked === 0, `${ledger.leaked} requests brought the kedge's token to the backend`);
  const errors = calls.flatMap(({ error }) => (error === undefined ? [] : [error]));
  for (const error of errors.slice(0, INSPECTED)) secrets.inspect('an error', error);
  for (const error of errors) secrets.scan('an error', String(error));
  const leaks = [...new Set(secrets.leaks.splice(0))];
  world.check(leaks.length === 0, `a secret was printed: ${leaks.join(', ')}`);
  const slowest = calls.reduce((most, call) => (call.ok ? Math.max(most, took(call)) : most), 0);
  return {
    scenario: scenario.name,
    calls: calls.length + world.uncounted,
    failed: count(({ ok }) => !ok),
    duplicated,
    crossed,
    recoveryMs: Math.round(world.recoveryMs || slowest),
    seconds,
    violations: [...new Set(violations)],
    notes: world.notes,
  };
}
