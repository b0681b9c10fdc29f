const HEADER_BYTES = 5;

/** Cuts the bytes of a stream into length-prefixed messages (gRPC over HTTP/2, "Length-Prefixed-Message"), prefix included. */
export class MessageDecoder {
  private readonly maxBytes: number;
  private chunks: Buffer[] = [];
  private bytes = 0;
  /** Of the message under way with its prefix; unknown until the prefix is there. */
  private wanted = HEADER_BYTES;
  private hasHeader = false;

  /** `maxBytes`: of a message without its prefix; -1 for any. */
  constructor(maxBytes: number) {
    this.maxBytes = maxBytes;
  }

  /** @throws when a message is larger than allowed */
  write(data: Buffer): Buffer[] {
    const messages: Buffer[] = [];
    let rest = data;
    while (rest.length > 0) {
      const part = rest.subarray(0, this.wanted - this.bytes);
      rest = rest.subarray(part.length);
      this.chunks.push(part);
      this.bytes += part.length;
      if (this.bytes === HEADER_BYTES && !this.hasHeader) this.readHeader();
      if (this.hasHeader && this.bytes === this.wanted) messages.push(this.take());
    }
    return messages;
  }

  private readHeader(): void {
    const header = this.join();
    const length = header.readUInt32BE(1);
    if (this.maxBytes !== -1 && length > this.maxBytes) {
      throw new Error(`Received message larger than max (${length} vs ${this.maxBytes})`);
    }
    this.chunks = [header];
    this.wanted = HEADER_BYTES + length;
    this.hasHeader = true;
  }

  private take(): Buffer {
    const message = this.join();
    this.chunks = [];
    this.bytes = 0;
    this.wanted = HEADER_BYTES;
    this.hasHeader = false;
    return message;
  }

  private join(): Buffer {
    return this.chunks.length === 1 ? this.chunks[0]! : Buffer.concat(this.chunks, this.bytes);
  }
}
