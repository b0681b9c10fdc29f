import type { Socket } from 'node:net';
import { hide } from '../support/redact.ts';
import { invalid, type Place } from '../support/shape.ts';

/** An HTTP proxy on the way to the kedges. */
export interface ProxyAddress {
  /** A DNS name, or an IP address without brackets. */
  readonly hostname: string;
  readonly port: number;
  /** `host:port`, for people. */
  readonly name: string;
  /** For `Proxy-Authorization`, from the URL's user and password. */
  readonly authorization: string | undefined;
}

const MAX_ANSWER_BYTES = 16 * 1024;

/** @throws {@link KedgeError} `ERR_KEDGE_OPTIONS` */
export function proxyAddress(value: unknown, place: Place): ProxyAddress {
  const url = typeof value === 'string' ? URL.parse(value) : value;
  if (!(url instanceof URL) || url.protocol !== 'http:' || url.hostname === '')
    throw invalid(place, 'is a URL such as http://proxy.example.com:3128');
  const { hostname, username, password } = url;
  const port = url.port === '' ? 80 : Number(url.port);
  const user = `${decoded(username, place)}:${decoded(password, place)}`;
  const address = {
    hostname: hostname.replace(/^\[|\]$/g, ''),
    port,
    name: `${hostname}:${port}`,
    authorization: user === ':' ? undefined : `Basic ${Buffer.from(user).toString('base64')}`,
  };
  hide(address, `Proxy(${address.name})`);
  return Object.freeze(address);
}

function decoded(text: string, place: Place): string {
  try {
    return decodeURIComponent(text);
  } catch {
    throw invalid(place, 'has a `%` in its user or password that is not an escape: write it as %25');
  }
}

/**
 * Asks the proxy for a tunnel (RFC 9110 §9.3.6). Calls back once; what the other end said right after the proxy's answer stays
 * in the socket.
 */
export function tunnel(
  socket: Socket,
  proxy: ProxyAddress,
  authority: string,
  timeoutMs: number,
  callback: (error?: Error) => void,
): void {
  let answer = Buffer.alloc(0);
  const done = (error?: Error) => {
    clearTimeout(timer);
    socket.off('data', read);
    socket.off('close', closed);
    socket.off('error', done);
    callback(error);
  };
  const closed = () => done(new Error('the proxy closed the connection'));
  const read = (chunk: Buffer) => {
    answer = Buffer.concat([answer, chunk]);
    for (;;) {
      const end = answer.indexOf('\r\n\r\n');
      if (end === -1 || end > MAX_ANSWER_BYTES) {
        if (answer.length > MAX_ANSWER_BYTES) done(new Error('the proxy does not speak HTTP'));
        return;
      }
      const status = /^HTTP\/1\.[01] (\d{3})/.exec(answer.toString('latin1', 0, end))?.[1];
      answer = answer.subarray(end + 4);
      // An interim answer is followed by another one; any 2xx opens the tunnel, whatever its headers say of a body.
      if (status?.startsWith('1') && status !== '101') continue;
      socket.pause();
      if (answer.length > 0) socket.unshift(answer);
      done(status?.startsWith('2') ? undefined : new Error(`the proxy answered ${status ?? 'no HTTP'}`));
      return;
    }
  };
  const timer = setTimeout(() => done(new Error(`no answer of the proxy within ${timeoutMs} ms`)), timeoutMs);
  socket.on('data', read);
  socket.once('close', closed);
  socket.once('error', done);
  const auth = proxy.authorization === undefined ? '' : `proxy-authorization: ${proxy.authorization}\r\n`;
  socket.write(`CONNECT ${authority} HTTP/1.1\r\nhost: ${authority}\r\n${auth}\r\n`);
}
