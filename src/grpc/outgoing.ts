import type { experimental } from '@grpc/grpc-js';

type Call = experimental.CallStream;
type MessageContext = Parameters<Call['sendMessageWithContext']>[0];

/**
 * Hands the messages of a call to grpc-js one after the other, for callers that do not wait for their writes. grpc-js has room
 * for one until the call has its configuration, and lets the end of the stream overtake a second
 * (https://github.com/grpc/grpc-node/blob/master/packages/grpc-js/src/resolving-call.ts, `pendingMessage`).
 */
export class Outgoing {
  private readonly live: Call;
  private waiting: [MessageContext, Buffer][] | undefined;
  private sending: MessageContext | undefined;
  private isEnding = false;

  constructor(live: Call) {
    this.live = live;
  }

  send(context: MessageContext, message: Buffer): void {
    if (this.sending !== undefined) {
      this.waiting ??= [];
      this.waiting.push([context, message]);
      return;
    }
    this.sending = context;
    const callback: MessageContext['callback'] = (error) => {
      if (this.sending !== context) return;
      this.sending = undefined;
      context.callback?.(error);
      this.next();
    };
    this.live.sendMessageWithContext({ ...context, callback }, message);
  }

  end(): void {
    if (this.waiting === undefined || this.waiting.length === 0) this.live.halfClose();
    else this.isEnding = true;
  }

  /** The call is over: writers hear so from its status, and must not wait for more. grpc-js forgets those without a stream. */
  drop(): void {
    const unsent = [this.sending, ...(this.waiting ?? []).map(([context]) => context)];
    this.sending = undefined;
    this.waiting = undefined;
    for (const context of unsent) if (context?.callback !== undefined) process.nextTick(context.callback);
  }

  private next(): void {
    if (this.sending !== undefined) return;
    const next = this.waiting?.shift();
    if (next === undefined) return;
    this.send(...next);
    if (this.isEnding && this.waiting!.length === 0) this.live.halfClose();
  }
}
