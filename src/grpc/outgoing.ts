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
  private isSending = false;
  private isEnding = false;

  constructor(live: Call) {
    this.live = live;
  }

  send(context: MessageContext, message: Buffer): void {
    if (this.isSending) {
      this.waiting ??= [];
      this.waiting.push([context, message]);
      return;
    }
    this.isSending = true;
    const callback: MessageContext['callback'] = (error) => {
      this.isSending = false;
      context.callback?.(error);
      this.next();
    };
    this.live.sendMessageWithContext({ ...context, callback }, message);
  }

  end(): void {
    if (this.waiting === undefined || this.waiting.length === 0) this.live.halfClose();
    else this.isEnding = true;
  }

  private next(): void {
    if (this.isSending) return;
    const next = this.waiting?.shift();
    if (next === undefined) return;
    this.send(...next);
    if (this.isEnding && this.waiting!.length === 0) this.live.halfClose();
  }
}
