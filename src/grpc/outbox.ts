import type { experimental } from '@grpc/grpc-js';

type Call = experimental.CallStream;
type MessageContext = Parameters<Call['sendMessageWithContext']>[0];

/**
 * What the caller does with a call: passed to grpc-js's own call as soon as there is one, held before, and kept as long as the
 * call might have to be made again on another kedge.
 */
export class Outbox {
  private live: Call | undefined;
  private messages: [MessageContext, Buffer][] = [];
  private bytes = 0;
  private maxBytes = 0;
  private halfClosed = false;
  private reading = false;

  /** Whether all that was sent is still here, so that the call can be made again. */
  get isKept(): boolean {
    return this.maxBytes > 0;
  }

  /** Keeps up to `maxBytes` of messages, where there is another kedge to send them to. */
  keepUpTo(maxBytes: number): void {
    this.maxBytes = maxBytes;
  }

  send(context: MessageContext, message: Buffer): void {
    const once = this.isKept ? calledOnce(context) : context;
    if (this.live === undefined || this.isKept) {
      this.messages.push([once, message]);
      this.bytes += message.length;
      // Before the call is live there is nowhere else for a message to be.
      if (this.live !== undefined && this.bytes > this.maxBytes) this.commit();
    }
    this.live?.sendMessageWithContext(once, message);
  }

  startRead(): void {
    this.reading = true;
    this.live?.startRead();
  }

  halfClose(): void {
    this.halfClosed = true;
    this.live?.halfClose();
  }

  /** Does on `call` all that was done so far, and from here on. */
  connect(call: Call): void {
    this.live = call;
    if (this.reading) call.startRead();
    for (const [context, message] of this.messages) call.sendMessageWithContext(context, message);
    if (!this.isKept) this.messages = [];
    if (this.halfClosed) call.halfClose();
  }

  /** The call is to be made again. */
  disconnect(): void {
    this.live = undefined;
  }

  /** From here on the call stays where it is, or is over. */
  commit(): void {
    this.maxBytes = 0;
    this.messages = [];
  }
}

/** The caller hears once that a message is written, however often it is sent. */
function calledOnce(context: MessageContext): MessageContext {
  let { callback } = context;
  if (callback === undefined) return context;
  return {
    ...context,
    callback: (error) => {
      const first = callback;
      callback = undefined;
      first?.(error);
    },
  };
}
