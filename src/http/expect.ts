import type { ClientHttp2Stream } from 'node:http2';

/** How long a kedge has to say 100, in ms; curl waits as long. */
const PATIENCE_MS = 1000;

/**
 * A client does not wait for ever for `100 (Continue)` (RFC 9110 §10.1.1), which many gateways never say on HTTP/2; undici
 * does (`expectContinue`, nodejs/undici lib/dispatcher/client-h2.js). So it is told that it may go on.
 */
export function continueUnasked(stream: ClientHttp2Stream): void {
  if (stream.sentHeaders?.expect === undefined) return;
  const timer = setTimeout(() => stream.emit('continue'), PATIENCE_MS).unref();
  stream.once('close', () => clearTimeout(timer));
}
