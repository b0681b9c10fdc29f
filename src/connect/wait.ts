import type { OutgoingHttpHeaders } from 'node:http2';
import { Code, ConnectError } from '@connectrpc/connect';
import type { Core, WaitingCall } from '../core.ts';
import { after } from '../support/timer.ts';

/** Milliseconds of the units of `grpc-timeout` (gRPC over HTTP2, "Requests"). */
const UNITS: Readonly<Record<string, number>> = { H: 3_600_000, M: 60_000, S: 1000, m: 1, u: 0.001, n: 0.000_001 };

/**
 * What ends a call that has no stream yet: its caller, its own timeout, or the end of the dialer. Transports give up such a
 * call by themselves; here it learns not to be sent any more.
 */
export class Wait implements WaitingCall {
  private readonly core: Core;
  private readonly controller = new AbortController();
  private readonly caller: AbortSignal | undefined;
  private readonly stopTimer: (() => void) | undefined;

  constructor(core: Core, headers: OutgoingHttpHeaders, caller: AbortSignal | undefined) {
    this.core = core;
    this.caller = caller;
    core.waiting.add(this);
    if (caller?.aborted) this.abort();
    else caller?.addEventListener('abort', this.abort);
    const timeoutMs = timeoutOf(headers);
    if (timeoutMs !== undefined) {
      const late = () => this.fail(new ConnectError('the operation timed out', Code.DeadlineExceeded));
      this.stopTimer = after(timeoutMs, late);
    }
  }

  get signal(): AbortSignal {
    return this.controller.signal;
  }

  readonly fail = (error: Error): void => this.controller.abort(error);

  /** The call has a stream, or has failed. */
  end(): void {
    this.core.waiting.delete(this);
    this.caller?.removeEventListener('abort', this.abort);
    this.stopTimer?.();
  }

  private readonly abort = () =>
    this.fail(new ConnectError('the call was aborted', Code.Canceled, undefined, undefined, this.caller?.reason));
}

function timeoutOf(headers: OutgoingHttpHeaders): number | undefined {
  const connect = Number(headers['connect-timeout-ms']);
  if (connect > 0) return connect;
  const [, digits, unit] = /^(\d{1,8})([HMSmun])$/.exec(String(headers['grpc-timeout'])) ?? [];
  return digits === undefined ? undefined : Number(digits) * UNITS[unit!]!;
}
