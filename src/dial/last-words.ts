import type { TLSSocket } from 'node:tls';

/**
 * A connection that ends by a failed write ends with what the kedge said last, where that is a TLS alert: with TLS 1.3 its
 * verdict on our certificate comes after the handshake (RFC 8446 §4.4.2.4), and may lie unread while a write already meets the
 * closed connection. Node destroys the socket at that, and all that would be known is `ECONNRESET`.
 */
export function readBeforeEnd(socket: TLSSocket): void {
  const destroy = socket._destroy;
  let alert: Error | undefined;
  // Node tells of alerts by this event (lib/internal/tls/wrap.js), also after destroy().
  (socket as NodeJS.EventEmitter).once('_tlsError', (error: Error) => {
    alert = error;
  });
  socket._destroy = (error, callback) => {
    const end = () => destroy.call(socket, alert ?? error, callback);
    if ((error as NodeJS.ErrnoException | null)?.syscall !== 'write' || alert !== undefined) {
      end();
      return;
    }
    // What else is read meanwhile meets a stream that is destroyed, for which Node throws at the process: it takes the number of
    // bytes for an error (`onStreamRead()` in lib/internal/stream_base_commons.js).
    const { _handle: handle } = socket as TLSSocket & { readonly _handle?: { onread: () => void } | null };
    if (handle) handle.onread = () => {};
    // The first turn may be that of the write.
    setImmediate(() => setImmediate(end));
  };
}
