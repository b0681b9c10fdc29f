import type { CallCredentials, Deadline, experimental } from '@grpc/grpc-js';
import type { Core } from '../engine/core.ts';
import type { Resolved } from '../engine/plan.ts';
import type { PoolOf } from '../engine/race.ts';

/** What a channel's calls have in common. */
export interface CallContext {
  readonly core: Core;
  readonly poolOf: PoolOf;
  readonly userAgent: string;
  readonly maxMessageBytes: number;
  /** @throws {@link KedgeError} why a call cannot go there */
  route(host: string | null | undefined): Resolved;
  /** grpc-js's own call. */
  createLive(init: CallInit, authority: string): experimental.CallStream;
  /** Has waiting calls picked again after a while. */
  lookAgain(): void;
}

/** The arguments of `createCall()`, and what the channel adds. */
export interface CallInit {
  readonly method: string;
  readonly deadline: Deadline;
  readonly host: string | null | undefined;
  readonly parentCall: unknown;
  readonly propagateFlags: number | null | undefined;
  /** Where it goes without a host of its own. */
  readonly authority: string;
  /** From the caller's channel credentials. */
  readonly credentials: CallCredentials | undefined;
}
