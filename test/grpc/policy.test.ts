/**
 * What the gRPC wire relies on in grpc-js beyond its documented API: a new version that does otherwise fails here, and not
 * where calls are.
 */
import assert from 'node:assert/strict';
import { describe, it, type TestContext } from 'node:test';
import {
  CallCredentials,
  Channel,
  type ChannelOptions,
  connectivityState,
  credentials,
  type experimental as Experimental,
  experimental,
  Metadata,
  status,
} from '@grpc/grpc-js';

const { COMPLETE, DROP, QUEUE, TRANSIENT_FAILURE } = experimental.PickResultType;
const { READY, IDLE } = connectivityState;
const NOTHING = { subchannel: null, status: null, onCallStarted: null, onCallEnded: null };
const KEY = Symbol('of the call');

type Picks = (metadata: Metadata) => object;
interface Listener {
  onReceiveMetadata(metadata: Metadata): void;
  onReceiveMessage(message: Buffer): void;
  onReceiveStatus(status: object): void;
}

let pick: Picks = () => ({ ...NOTHING, pickResultType: QUEUE });
let again: () => void = () => {};

class Policy {
  private readonly helper: Experimental.ChannelControlHelper;
  constructor(helper: Experimental.ChannelControlHelper) {
    this.helper = helper;
  }
  updateAddressList(): boolean {
    again = () =>
      this.helper.updateState(READY, { pick: ({ metadata }) => pick(metadata) } as Experimental.Picker, null);
    again();
    return true;
  }
  exitIdle(): void {}
  resetBackoff(): void {}
  destroy(): void {}
  getTypeName(): string {
    return 'pinned';
  }
}

class Config {
  getLoadBalancerName(): string {
    return 'pinned';
  }
  toJsonObject(): object {
    return { pinned: {} };
  }
  static createFromJson(): Config {
    return new Config();
  }
}

class Resolver {
  private readonly listener: Experimental.ResolverListener;
  constructor(_target: unknown, listener: Experimental.ResolverListener) {
    this.listener = listener;
  }
  updateResolution(): void {
    process.nextTick(() => this.listener(experimental.statusOrFromValue([]), {}, null, ''));
  }
  destroy(): void {}
  static getDefaultAuthority(target: Experimental.GrpcUri): string {
    return target.path;
  }
}

experimental.registerResolver('pinned', Resolver as never);
experimental.registerLoadBalancerType('pinned', Policy as never, Config as never);

/** A subchannel that has its call do something. */
function subchannel(onCall: (listener: Listener, metadata: Metadata, sent: string[]) => void, state = () => READY) {
  let calls = 0;
  const messages: string[][] = [];
  const self = {
    getConnectivityState: state,
    getCallCredentials: () => CallCredentials.createEmpty(),
    getAddress: () => 'nowhere',
    getRealSubchannel: () => self,
    createCall: (metadata: Metadata, _host: string, _path: string, listener: Listener) => {
      calls += 1;
      const sent: string[] = [];
      messages.push(sent);
      setImmediate(() => setImmediate(onCall, listener, metadata, sent));
      return {
        startRead: () => {},
        sendMessageWithContext: (context: { callback?: () => void }, message: Buffer) => {
          // Framed by grpc-js's filters.
          sent.push(String(message.subarray(5)));
          process.nextTick(() => context.callback?.());
        },
        halfClose: () => void sent.push('end'),
        cancelWithStatus: () => {},
        getPeer: () => 'nowhere',
        getCallNumber: () => 0,
        getDeadlineInfo: () => [],
        getAuthContext: () => ({}),
      };
    },
  };
  return { self, calls: () => calls, messages };
}

function open(t: TestContext, options: ChannelOptions = {}) {
  const config = JSON.stringify({ methodConfig: [], loadBalancingConfig: [{ pinned: {} }] });
  const channel = new Channel('pinned:a.test', credentials.createInsecure(), {
    'grpc.service_config': config,
    ...options,
  });
  t.after(() => channel.close());
  return (metadata = new Metadata(), deadline = Date.now() + 3000) => {
    const call = channel.createCall('/a.S/M', deadline, 'b.test', null, undefined);
    return new Promise<{ code: number; details: string; metadata: Metadata }>((resolve) => {
      call.start(metadata, { onReceiveMetadata: () => {}, onReceiveMessage: () => {}, onReceiveStatus: resolve });
      call.sendMessageWithContext({}, Buffer.from('hello'));
      call.halfClose();
    });
  };
}

const ends = (code: number, more = {}) => {
  const metadata = new Metadata();
  return { status: { code, details: 'said', metadata, ...more }, metadata };
};

describe('grpc-js, as the policy for kedges takes it', () => {
  it('hands the options of the metadata to each pick and each attempt, by reference', async (t) => {
    const call = open(t);
    const marked = {};
    const metadata = new Metadata();
    metadata.setOptions({ [KEY]: marked } as never);
    assert.equal((metadata.clone().getOptions() as { [KEY]: unknown })[KEY], marked);
    const seen: unknown[] = [];
    const { self } = subchannel((listener, sent) => {
      seen.push((sent.getOptions() as { [KEY]: unknown })[KEY]);
      listener.onReceiveStatus(ends(status.UNAVAILABLE, { rstCode: 7 }).status);
    });
    pick = (picked) => {
      seen.push((picked.getOptions() as { [KEY]: unknown })[KEY]);
      return { ...NOTHING, pickResultType: COMPLETE, subchannel: self };
    };
    await call(metadata);
    assert.deepEqual(seen.length, 4);
    for (const each of seen) assert.equal(each, marked);
  });

  it('makes the call on the real subchannel, and again once for rstCode 7, with all messages', async (t) => {
    const call = open(t);
    const refusing = subchannel((listener) =>
      listener.onReceiveStatus(ends(status.UNAVAILABLE, { rstCode: 7 }).status),
    );
    pick = () => ({ ...NOTHING, pickResultType: COMPLETE, subchannel: refusing.self });
    assert.equal((await call()).code, status.UNAVAILABLE);
    assert.equal(refusing.calls(), 2);
    assert.deepEqual(refusing.messages, [
      ['hello', 'end'],
      ['hello', 'end'],
    ]);
    const failing = subchannel((listener) => listener.onReceiveStatus(ends(status.UNAVAILABLE, { rstCode: 8 }).status));
    pick = () => ({ ...NOTHING, pickResultType: COMPLETE, subchannel: failing.self });
    await call();
    assert.equal(failing.calls(), 1);
  });

  it('picks again when a call could not be made, and when the subchannel is no longer ready', async (t) => {
    const call = open(t);
    const good = subchannel((listener) => listener.onReceiveStatus(ends(status.OK).status));
    const gone = subchannel(
      () => {},
      () => IDLE,
    );
    const throwing = { ...good.self, getRealSubchannel: () => assert.fail('the session is closing') };
    const picks = [throwing, gone.self, good.self];
    pick = () => ({ ...NOTHING, pickResultType: COMPLETE, subchannel: picks.shift() });
    assert.equal((await call()).code, status.OK);
    assert.equal(good.calls(), 1);
    assert.equal(gone.calls(), 0);
  });

  it('passes a status on with the metadata that it was given, from a call and from a pick', async (t) => {
    const call = open(t);
    const end = ends(status.DATA_LOSS);
    const { self } = subchannel((listener) => listener.onReceiveStatus(end.status));
    pick = () => ({ ...NOTHING, pickResultType: COMPLETE, subchannel: self });
    assert.equal((await call()).metadata, end.metadata);
    const none = ends(status.UNAVAILABLE);
    for (const pickResultType of [TRANSIENT_FAILURE, DROP]) {
      pick = () => ({ ...NOTHING, pickResultType, status: none.status });
      const received = await call();
      assert.deepEqual([received.code, received.details], [status.UNAVAILABLE, 'said']);
      assert.equal(received.metadata, none.metadata);
    }
  });

  it('keeps calls for the next state where a pick says so, or says failure and they wait for readiness', async (t) => {
    const call = open(t);
    const good = subchannel((listener) => listener.onReceiveStatus(ends(status.OK).status));
    for (const pickResultType of [QUEUE, TRANSIENT_FAILURE]) {
      let picks = 0;
      pick = () => {
        picks += 1;
        return picks === 1
          ? { ...NOTHING, pickResultType, status: ends(status.UNAVAILABLE).status }
          : { ...NOTHING, pickResultType: COMPLETE, subchannel: good.self };
      };
      const received = call(new Metadata({ waitForReady: true }));
      while (picks === 0) await new Promise(setImmediate);
      await new Promise((resolve) => setTimeout(resolve, 20));
      assert.equal(picks, 1);
      again();
      assert.equal((await received).code, status.OK);
    }
  });

  it('makes no attempt for a call whose pick was dropped, whatever its retry policy', async (t) => {
    const retryPolicy = {
      maxAttempts: 3,
      initialBackoff: '0.001s',
      maxBackoff: '0.001s',
      backoffMultiplier: 1,
      retryableStatusCodes: ['UNAVAILABLE'],
    };
    const methodConfig = [{ name: [{}], retryPolicy }];
    const call = open(t, {
      'grpc.service_config': JSON.stringify({ methodConfig, loadBalancingConfig: [{ pinned: {} }] }),
    });
    for (const [pickResultType, expected] of [
      [DROP, 1],
      [TRANSIENT_FAILURE, 3],
    ] as const) {
      let picks = 0;
      pick = () => {
        picks += 1;
        return { ...NOTHING, pickResultType, status: ends(status.UNAVAILABLE).status };
      };
      assert.equal((await call()).code, status.UNAVAILABLE);
      assert.equal(picks, expected);
    }
  });
});
