import { type ClientHttp2Session, type ClientHttp2Stream, constants } from 'node:http2';

/**
 * Follows the streams of a session, which the function that it returns is told of. Those above the last stream of a GOAWAY
 * were not processed, whatever its code (RFC 9113 §6.8): they end as REFUSED_STREAM, where Node would give them that code.
 */
export function refuseUnprocessed(session: ClientHttp2Session): (stream: ClientHttp2Stream) => void {
  const open = new Set<ClientHttp2Stream>();
  // Emitted before Node destroys the session.
  session.on('goaway', (_code, lastStreamId) => {
    for (const stream of open) {
      if ((stream.id ?? 0) > lastStreamId) stream.close(constants.NGHTTP2_REFUSED_STREAM);
    }
  });
  return (stream) => {
    open.add(stream);
    stream.once('close', () => open.delete(stream));
  };
}
