import { inspect } from 'node:util';
import createDebug from 'debug';

/** Looks for what must never be printed in everything that is: stdout, stderr, debug logs, errors, kedges' output. */
export class Secrets {
  /** Where one was found. */
  readonly leaks: string[] = [];
  private readonly secrets = new Set<string>();
  private readonly undo: (() => void)[] = [];

  /** A token, or a PEM private key, of which a line of its base64 is enough. */
  add(secret: string): void {
    const line = /KEY-----\n([A-Za-z0-9+/]{40,})/.exec(secret)?.[1];
    this.secrets.add(line ?? secret);
  }

  scan(where: string, text: string): void {
    for (const secret of this.secrets) if (text.includes(secret)) this.leaks.push(where);
  }

  /** Errors, warnings, snapshots: whatever a program may print of them. */
  inspect(where: string, value: unknown): void {
    this.scan(where, inspect(value, { depth: 8, showHidden: true }));
    if (value instanceof Error) this.scan(where, `${value.stack}`);
  }

  watch(): void {
    for (const name of ['stdout', 'stderr'] as const) {
      const stream = process[name];
      const write = stream.write;
      stream.write = ((chunk: string | Uint8Array, ...rest: never[]) => {
        this.scan(name, chunk.toString());
        return write.call(stream, chunk, ...rest);
      }) as typeof write;
      this.undo.push(() => {
        stream.write = write;
      });
    }
    // The whole way of every call is said, and heard by nobody but us.
    const { log } = createDebug;
    createDebug.log = (...args: unknown[]) => this.scan('DEBUG=kedge:*', args.map(String).join(' '));
    createDebug.enable('kedge:*');
    this.undo.push(() => {
      createDebug.disable();
      createDebug.log = log;
    });
  }

  unwatch(): void {
    for (const undo of this.undo.splice(0)) undo();
  }
}
