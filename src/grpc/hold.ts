import { type Deadline, propagate } from '@grpc/grpc-js';

/** The server call that a client call was made in. */
export type ParentCall = {
  on(event: 'cancelled', listener: () => void): unknown;
  removeListener(event: 'cancelled', listener: () => void): unknown;
  getDeadline(): Deadline;
};

/** What bounds a call, as in the arguments of `createCall()`. */
export interface CallBounds {
  readonly deadline: Deadline;
  readonly parentCall: ParentCall | null;
  readonly propagateFlags: number | null | undefined;
}

const MAX_TIMER_MS = 2 ** 31 - 1;

/** Deadline and parent of a call that is held; grpc-js sees to both as soon as the call is its own. */
export class Hold {
  private readonly parentCall: ParentCall | undefined;
  private readonly onCancelled: () => void;
  private readonly timer: NodeJS.Timeout | undefined;

  constructor(bounds: CallBounds, onDeadline: () => void, onCancelled: () => void) {
    const { parentCall, propagateFlags } = bounds;
    const flags = propagateFlags ?? propagate.DEFAULTS;
    let deadline = Number(bounds.deadline);
    this.onCancelled = onCancelled;
    if (parentCall !== null) {
      if ((flags & propagate.DEADLINE) !== 0) deadline = Math.min(deadline, Number(parentCall.getDeadline()));
      if ((flags & propagate.CANCELLATION) !== 0) {
        this.parentCall = parentCall;
        parentCall.on('cancelled', onCancelled);
      }
    }
    const left = deadline - Date.now();
    if (left <= MAX_TIMER_MS) this.timer = setTimeout(onDeadline, Math.max(left, 0));
  }

  release(): void {
    clearTimeout(this.timer);
    this.parentCall?.removeListener('cancelled', this.onCancelled);
  }
}
