import type { experimental } from '@grpc/grpc-js';

type Call = experimental.CallStream;
type MessageContext = Parameters<Call['sendMessageWithContext']>[0];

interface Message {
  /** The caller's own callback; it hears once that its message is written, however often that is sent. */
  callback: MessageContext['callback'];
  readonly flags: MessageContext['flags'];
  readonly bytes: Buffer;
}

/**
 * What the caller does with a call: held until grpc-js's own call is there, and kept as long as the call might have to be
 * made again on another kedge.
 *
 * grpc-js takes one message at a time, the next when the one before is written: until its call has a stream there is room
 * for one, and another takes its place without a word (`pendingMessage` of its ResolvingCall).
 */
export class Outbox {
  private live: Call | undefined;
  /** In the order in which they were sent; the first `handed` of them are the live call's, and kept. */
  private messages: Message[] = [];
  private handed = 0;
  /** The live call has a message that is not written yet. */
  private writing = false;
  private bytes = 0;
  private maxBytes = 0;
  private halfClosed = false;
  /** The live call knows that it is half closed. */
  private toldHalfClosed = false;
  private reading = false;

  /** Whether all that was sent is still here, so that the call can be made again. */
  get isKept(): boolean {
    return this.maxBytes > 0;
  }

  /** Keeps up to `maxBytes` of messages, where there is another kedge to send them to. */
  keepUpTo(maxBytes: number): void {
    this.maxBytes = maxBytes;
  }

  send({ callback, flags }: MessageContext, bytes: Buffer): void {
    this.messages.push({ callback, flags, bytes });
    this.bytes += bytes.length;
    this.pump();
  }

  startRead(): void {
    this.reading = true;
    this.live?.startRead();
  }

  halfClose(): void {
    this.halfClosed = true;
    this.pump();
  }

  /** Does on `call` all that was done so far, and from here on. */
  connect(call: Call): void {
    this.live = call;
    if (this.reading) call.startRead();
    this.pump();
  }

  /** The call is to be made again. */
  disconnect(): void {
    this.live = undefined;
    this.handed = 0;
    this.writing = false;
    this.toldHalfClosed = false;
  }

  /** From here on the call stays where it is: what it has been handed is not needed any more. */
  commit(): void {
    this.maxBytes = 0;
    this.messages.splice(0, this.handed);
    this.handed = 0;
  }

  /** The call is over. */
  close(): void {
    this.live = undefined;
    this.messages = [];
    this.maxBytes = 0;
  }

  private pump(): void {
    const { live } = this;
    if (live === undefined) return;
    const next = this.messages[this.handed];
    if (next !== undefined && !this.writing) this.hand(live, next);
    // grpc-js sends it after the message that it has: the end of a unary call waits for nothing.
    if (!this.halfClosed || this.toldHalfClosed || this.handed < this.messages.length) return;
    this.toldHalfClosed = true;
    live.halfClose();
  }

  private hand(live: Call, message: Message): void {
    this.writing = true;
    this.handed += 1;
    if (!this.isKept || this.bytes > this.maxBytes) this.commit();
    const written = (error?: Error | null) => {
      const { callback } = message;
      message.callback = undefined;
      if (this.live === live) {
        this.writing = false;
        this.pump();
      }
      callback?.(error);
    };
    live.sendMessageWithContext({ flags: message.flags, callback: written }, message.bytes);
  }
}
