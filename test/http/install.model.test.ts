import assert from 'node:assert/strict';
import http from 'node:http';
import type { AddressInfo } from 'node:net';
import { after, describe, it } from 'node:test';
import * as undici from 'undici';
import undici6 from 'undici-6';
import undici7 from 'undici-7';
import { createDialer, type Dialer, pem, single } from '../../src/index.ts';
import { pick, random } from '../chaos/random.ts';
import { startKedge } from '../helpers/kedge.ts';

const STEPS = Number(process.env.KEDGE_TEST_MODEL_STEPS ?? 100_000);
const SEED = Number(process.env.KEDGE_TEST_SEED ?? Date.now() % 1_000_000);
const STEPS_PER_WALK = 100;
/** A walk in which real requests are sent at every step comes once in so many. */
const WALKS_PER_REAL_ONE = 100;
const DIALERS = 3;

const KINDS = ['current', 'legacy'] as const;
type Kind = (typeof KINDS)[number];
const SYMBOLS = {
  current: Symbol.for('undici.globalDispatcher.2'),
  legacy: Symbol.for('undici.globalDispatcher.1'),
} as const;
const globals = globalThis as unknown as Record<symbol, object>;
const globalNow = (): Record<Kind, object> => ({
  current: globals[SYMBOLS.current]!,
  legacy: globals[SYMBOLS.legacy]!,
});

/** One dialer of the walk. */
interface Slot {
  readonly name: string;
  dialer: Dialer;
  /** Every undo that this dialer has given out, the latest last. */
  undos: { undo: () => void; of: Install }[];
  /** Its dispatcher is closed, which ends its part although nothing has undone the install. */
  closed: boolean;
  installed: Install | undefined;
}

/** What stands at a global symbol, as the model has it: what a request passes through, the outermost first. */
type Layer =
  | { is: 'agent'; name: string }
  | { is: 'wrapper'; name: string | undefined; under: object; modern: boolean }
  | Install;
interface Install {
  is: 'install';
  slot: Slot;
  undone: boolean;
  replaced: Record<Kind, object>;
}

/** What a request would pass through had nobody installed anything. */
type Names = readonly string[];

/** A request that an agent only writes down. */
const PROBE = Symbol('probe');
let trace: string[] = [];

class Walk {
  private readonly next: () => number;
  private readonly layers = new Map<object, Layer>();
  private readonly slots: Slot[];
  private readonly makeDialer: (name: string) => Dialer;
  private readonly agents: undici.Dispatcher[] = [];
  private readonly closing: Promise<void>[] = [];
  /** The symbols as they would be without us. */
  private without: Record<Kind, Names> = { current: [], legacy: [] };
  private kept: { values: Record<Kind, object>; without: Record<Kind, Names> }[] = [];
  private count = 0;

  constructor(next: () => number, makeDialer: (name: string) => Dialer) {
    this.next = next;
    this.makeDialer = makeDialer;
    this.slots = Array.from({ length: DIALERS }, (_, i) => this.fresh(`dialer${i}`));
    this.setAgent(8);
  }

  step(): string {
    const slot = pick(this.next, this.slots);
    const events: Record<string, () => unknown> = {
      install: () => this.install(slot),
      undo: () => slot.undos.length > 0 && this.undo(slot, slot.undos.at(-1)!),
      'undo any': () => slot.undos.length > 0 && this.undo(slot, pick(this.next, slot.undos)),
      close: () => this.close(slot),
      'close its dispatcher': () => {
        slot.closed = true;
        this.closing.push(slot.dialer.dispatcher.close());
      },
      'set undici 6': () => this.setAgent(6),
      'set undici 7': () => this.setAgent(7),
      'set undici 8': () => this.setAgent(8),
      wrap: () => this.wrap(),
      keep: () => this.kept.push({ values: globalNow(), without: { ...this.without } }),
      'put back': () => this.putBack(),
      'assign one': () => this.assignOne(),
    };
    const name = pick(this.next, Object.keys(events));
    events[name]!();
    return `${name} ${slot.name}`;
  }

  /** Sends a request along both symbols, as far as the agent that would write it to a socket. */
  check(unmapped: string): void {
    const now = globalNow();
    for (const kind of KINDS) {
      const expected = this.passes(now[kind], kind);
      trace = [];
      const options = { origin: `http://${unmapped}-${kind}.invalid`, path: '/', method: 'GET', [PROBE]: true };
      (now[kind] as undici.Dispatcher).dispatch(options as never, handlerOf(kind) as never);
      assert.deepEqual(trace, expected, `through the ${kind} symbol`);
      const names = this.slots.map(({ name }) => name);
      assert.deepEqual(
        trace.filter((name) => !names.includes(name)),
        this.without[kind],
        `others see what they would see without us, through the ${kind} symbol`,
      );
      assert.equal(new Set(trace).size, trace.length, 'nothing is passed twice');
    }
  }

  /** Real requests, by the built-in fetch and by undici's. */
  async checkForReal(port: number): Promise<void> {
    const now = globalNow();
    const builtIn = process.versions.undici!.startsWith('8') ? 'current' : 'legacy';
    for (const [kind, call] of [
      [builtIn, fetch] as const,
      ['current', undici.fetch as never as typeof fetch] as const,
    ]) {
      assert.equal(await (await call(`http://127.0.0.1:${port}/`)).text(), 'direct');
      const through = this.passes(now[kind as Kind], kind as Kind);
      for (const { name } of this.slots) {
        const text = await (await call(`http://orders.${name}.invalid:${port}/`)).text();
        assert.equal(text, through.includes(name) ? 'kedge' : 'direct', name);
      }
    }
  }

  /** Ends every install; nothing of ours is left at the symbols, but where others have put it back themselves. */
  end(): void {
    for (const slot of this.slots) this.close(slot);
    const left = globalNow();
    const putBack = this.kept.flatMap(({ values }) => Object.values(values));
    for (const kind of KINDS) {
      const layer = this.layers.get(left[kind])!;
      assert.ok(layer.is !== 'install' || putBack.includes(left[kind]), `the ${kind} symbol is restored`);
    }
  }

  async settled(): Promise<void> {
    await Promise.all([...this.closing, ...this.slots.map(({ dialer }) => dialer.close())]);
    await Promise.all(this.agents.map((agent) => agent.close()));
  }

  private fresh(name: string): Slot {
    return { name, dialer: this.makeDialer(name), undos: [], closed: false, installed: undefined };
  }

  private install(slot: Slot): void {
    if (slot.closed) {
      assert.throws(() => slot.dialer.install(), { code: 'ERR_KEDGE_CLOSED' });
      return;
    }
    const before = globalNow();
    const undo = slot.dialer.install();
    const now = globalNow();
    if (slot.installed !== undefined) {
      assert.ok(
        KINDS.every((kind) => now[kind] === before[kind]),
        'installed already',
      );
      slot.undos.push({ undo, of: slot.installed });
      return;
    }
    assert.equal(now.current, now.legacy);
    assert.ok(!this.layers.has(now.current), 'an install has a dispatcher of its own');
    const replaced = { current: this.below(before.current, 'current'), legacy: this.below(before.legacy, 'legacy') };
    slot.installed = { is: 'install', slot, undone: false, replaced };
    slot.undos.push({ undo, of: slot.installed });
    this.layers.set(now.current, slot.installed);
  }

  /** Twice, as a caller may; an undo belongs to its install, and one of an earlier install does nothing. */
  private undo(slot: Slot, { undo, of }: Slot['undos'][number]): void {
    const before = globalNow();
    undo();
    undo();
    if (of === slot.installed) this.undone(slot);
    else assert.ok(KINDS.every((kind) => globalNow()[kind] === before[kind]));
  }

  private close(slot: Slot): void {
    this.closing.push(slot.dialer.close());
    this.undone(slot);
    Object.assign(slot, this.fresh(slot.name));
  }

  private undone(slot: Slot): void {
    const { installed } = slot;
    if (installed === undefined) return;
    installed.undone = true;
    slot.installed = undefined;
    const now = globalNow();
    for (const kind of KINDS) {
      const layer = this.layers.get(now[kind]);
      assert.ok(layer !== undefined, `an undo leaves what was there, not something new, at the ${kind} symbol`);
      assert.notEqual(layer, installed, `the ${kind} symbol is restored`);
    }
  }

  private below(value: object, kind: Kind): object {
    const layer = this.layers.get(value);
    return layer?.is === 'install' && layer.undone ? this.below(layer.replaced[kind], kind) : value;
  }

  private passes(value: object, kind: Kind): string[] {
    const layer = this.layers.get(value)!;
    if (layer.is === 'agent') return [layer.name];
    if (layer.is === 'wrapper') {
      const rest = this.passes(layer.under, layer.modern ? 'current' : kind);
      return layer.name === undefined ? rest : [layer.name, ...rest];
    }
    const rest = this.passes(layer.replaced[kind], kind);
    return layer.undone || layer.slot.closed ? rest : [layer.slot.name, ...rest];
  }

  private setAgent(version: 6 | 7 | 8): void {
    const name = `agent${version}-${++this.count}`;
    const agent = agentOf(version, name);
    this.agents.push(agent);
    this.layers.set(agent, { is: 'agent', name });
    const before = globalNow();
    ({ 6: undici6 as never as typeof undici, 7: undici7 as never as typeof undici, 8: undici })[
      version
    ].setGlobalDispatcher(agent as never);
    this.adopt(before, agent, [name]);
  }

  /** As an instrumentation does: whatever is global, with something before it. */
  private wrap(): void {
    const name = `wrapper-${++this.count}`;
    const under = globals[SYMBOLS.current] as undici.Dispatcher;
    const wrapper = under.compose((dispatch) => (options, handler) => {
      trace.push(name);
      return dispatch(options, handler);
    });
    this.layers.set(wrapper, { is: 'wrapper', name, under, modern: false });
    const before = globalNow();
    const names = [name, ...this.without.current];
    undici.setGlobalDispatcher(wrapper);
    this.adopt(before, wrapper, names);
  }

  /** Takes note of what an undici's setGlobalDispatcher() has done to the symbols. */
  private adopt(before: Record<Kind, object>, set: object, names: Names): void {
    const now = globalNow();
    for (const kind of KINDS) {
      if (now[kind] === before[kind]) continue;
      // undici 7 and 8 make one of their dispatchers for the older ones, too.
      if (!this.layers.has(now[kind]))
        this.layers.set(now[kind], { is: 'wrapper', name: undefined, under: set, modern: true });
      this.without[kind] = names;
    }
  }

  private putBack(): void {
    if (this.kept.length === 0) return;
    const { values, without } = pick(this.next, this.kept);
    for (const kind of KINDS) globals[SYMBOLS[kind]] = values[kind];
    this.without = { ...without };
  }

  private assignOne(): void {
    const kind = pick(this.next, KINDS);
    const version = kind === 'current' ? 8 : pick(this.next, [6, 7] as const);
    const name = `assigned${version}-${++this.count}`;
    const agent = agentOf(version, name);
    this.agents.push(agent);
    this.layers.set(agent, { is: 'agent', name });
    globals[SYMBOLS[kind]] = agent;
    this.without[kind] = [name];
  }
}

/** An agent that finds every name at this machine, and only writes probes down. */
function agentOf(version: 6 | 7 | 8, name: string): undici.Dispatcher {
  const { Agent } = { 6: undici6 as never as typeof undici, 7: undici7 as never as typeof undici, 8: undici }[version];
  const lookup = (_name: string, _options: unknown, done: (...args: unknown[]) => void) =>
    done(null, [{ address: '127.0.0.1', family: 4 }]);
  const agent = new Agent({ connect: { lookup: lookup as never }, keepAliveTimeout: 1000 });
  const dispatch = agent.dispatch.bind(agent);
  agent.dispatch = (options, handler) => {
    if (!(PROBE in options)) return dispatch(options, handler);
    trace.push(name);
    return true;
  };
  return agent as undici.Dispatcher;
}

function handlerOf(kind: Kind): object {
  const onError = (error: Error): void => {
    throw error;
  };
  const none = (): void => {};
  if (kind === 'legacy') return { onConnect: none, onHeaders: none, onData: none, onComplete: none, onError };
  const onResponseError = (_controller: unknown, error: Error) => onError(error);
  return { onRequestStart: none, onResponseStart: none, onResponseData: none, onResponseEnd: none, onResponseError };
}

describe('installs, undos and ends of dialers, among others who set the global dispatchers', () => {
  it(`never harm a request, and leave nothing behind (KEDGE_TEST_SEED=${SEED}, ${STEPS} steps)`, async (t) => {
    await fetch('data:,x');
    const before = globalNow();
    after(() => {
      for (const kind of KINDS) globals[SYMBOLS[kind]] = before[kind];
    });
    const kedge = await startKedge(t, { handler: (_request, response) => void response.end('kedge') });
    const direct = http.createServer((_request, response) => response.end('direct'));
    await new Promise<void>((resolve) => direct.listen(0, '127.0.0.1', resolve));
    t.after(() => direct.close());
    const { port } = direct.address() as AddressInfo;
    const identity = pem({ cert: kedge.client.cert, key: kedge.client.key, ca: kedge.ca.cert });
    const route = single(kedge.route());
    const makeDialer = (name: string) =>
      createDialer({
        mapper: (target) => {
          if (target.hostname.startsWith('probe')) trace.push(name);
          return target.hostname.endsWith(`.${name}.invalid`) ? route(target) : undefined;
        },
        identity,
      });

    const next = random(SEED);
    const history: string[] = [];
    try {
      for (let done = 0, walks = 0; done < STEPS; walks += 1) {
        const walk = new Walk(next, makeDialer);
        history.length = 0;
        for (let i = 0; i < STEPS_PER_WALK; i += 1, done += 1) {
          history.push(walk.step());
          walk.check(`probe${done}`);
          if (walks % WALKS_PER_REAL_ONE === 0) await walk.checkForReal(port);
        }
        walk.end();
        walk.check(`probe-end${done}`);
        await walk.settled();
      }
    } catch (error) {
      t.diagnostic(`the walk: ${history.join(', ')}`);
      throw error;
    }
  });
});
