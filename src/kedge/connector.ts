import { AsyncLocalStorage } from 'node:async_hooks';
import net from 'node:net';
import tls from 'node:tls';
import type { AnySnapshot } from '../identity/identity.ts';
import { debug } from '../support/debug.ts';
import { codeOf, isKedgeError, KedgeError, type KedgeErrorCode } from '../support/errors.ts';
import { running } from '../support/timer.ts';
import type { KedgeAddress } from './address.ts';
import type { Addresses } from './addresses.ts';
import { readBeforeEnd } from './last-words.ts';
import { checkPeer, type PeerPolicy } from './peer.ts';
import { type ProxyAddress, tunnel } from './proxy.ts';

/** How long a dial may take. */
export interface DialTimeouts {
  /** Name look-up and TCP, in ms. */
  readonly timeoutMs: number;
  /** The TLS handshake, in ms. */
  readonly handshakeTimeoutMs: number;
  /** Stands between us and every kedge. */
  readonly proxy: ProxyAddress | undefined;
}

/** Hears how dials end. */
export interface DialObserver {
  /** TCP is there, and TLS. */
  dialled(socket: net.Socket | tls.TLSSocket): void;
  /** The kedge speaks the protocol that it was dialled for. */
  succeeded(): void;
  failed(): void;
}

/** Called once, never in the tick of the dial. */
export type DialCallback = (error: KedgeError | null, socket: net.Socket | tls.TLSSocket | null) => void;

/**
 * Dials one kedge under one identity, for both wires: there is one place that decides which certificate is shown, which
 * name must be proven, and what a failed dial is called.
 */
export class Connector {
  /** Every open socket, with those still dialling and those that were upgraded: pools forget about some of them. */
  readonly sockets = new Set<net.Socket>();
  /** Dials under way. */
  dialling = 0;
  /** Those of {@link sockets} that are theirs. */
  private readonly unready = new Set<net.Socket>();
  /** Where those go that were handed out: a socket that has ended does not know. */
  private readonly peers = new WeakMap<net.Socket, string>();
  private readonly address: KedgeAddress;
  private readonly identity: AnySnapshot | undefined;
  private readonly addresses: Addresses;
  private readonly timeouts: DialTimeouts;
  private readonly observer: DialObserver;
  private readonly tlsOptions: tls.ConnectionOptions;
  /**
   * The last session that the kedge offered, for a cheaper next handshake. It lives and dies with this connector: a
   * session outlives a rotated certificate, and resuming it would show the old one.
   */
  private session: Buffer | undefined;
  private lastRefusal: KedgeError | undefined;
  private refusalEnds = 0;
  /** Why dials were given up by {@link destroy}. */
  private ended: KedgeError | undefined;
  /** The dialer's: sockets live longer than the call that wanted them, and would keep its async context. */
  private readonly inOwnContext = AsyncLocalStorage.snapshot();

  /** The pools' origin, and the kedge as `host:port` for people. */
  get origin(): string {
    return this.address.origin;
  }

  get name(): string {
    return this.address.name;
  }

  /** Where TCP goes: to the kedge, or to the proxy on the way. */
  private get endpoint(): { readonly hostname: string; readonly port: number } {
    return this.timeouts.proxy ?? this.address;
  }

  get showsCertificate(): boolean {
    return this.address.secure && this.identity?.notAfter !== undefined;
  }

  get isSecure(): boolean {
    return this.address.secure;
  }

  constructor(
    address: KedgeAddress,
    identity: AnySnapshot | undefined,
    peer: PeerPolicy,
    addresses: Addresses,
    timeouts: DialTimeouts,
    observer: DialObserver,
  ) {
    this.address = address;
    this.identity = identity;
    this.addresses = addresses;
    this.timeouts = timeouts;
    this.observer = observer;
    this.tlsOptions = address.secure
      ? {
          // One context for all connections: making it costs more than a handshake with it.
          secureContext: secureContext(identity, peer),
          servername: address.sni,
          // What node:tls verifies where there is no SNI.
          host: address.verifyName,
          checkServerIdentity: checkPeer(peer),
          // Explicit, so that NODE_TLS_REJECT_UNAUTHORIZED=0 does not reach us.
          rejectUnauthorized: peer.dangerouslySkipVerification !== true,
        }
      : {};
  }

  /** DNS, TCP and (for an `https:` kedge) TLS. */
  connect(alpn: readonly string[], callback: DialCallback): void {
    const refused = this.ended ?? this.expired();
    if (refused === undefined) this.inOwnContext(() => this.dial(alpn, this.counted(callback)));
    else setImmediate(callback, refused, null);
  }

  private dial(alpn: readonly string[], callback: DialCallback): void {
    debug.dial('%s: connecting', this.address.name);
    const socket = net.connect({
      host: this.endpoint.hostname,
      port: this.endpoint.port,
      lookup: this.addresses.lookup,
      noDelay: true,
      keepAlive: true,
      keepAliveInitialDelay: 60_000,
    });
    this.track(socket);
    const done = once(socket, this.timeouts.timeoutMs, (error, reason) => {
      if (reason === 'ready') {
        this.finish(socket, alpn, callback);
        return;
      }
      const failed =
        reason === 'timeout'
          ? this.fail('ERR_KEDGE_CONNECT_TIMEOUT', `no TCP connection within ${this.timeouts.timeoutMs} ms`)
          : this.connectError(error);
      callback(failed, null);
    });
    socket.once('connect', done.ready);
  }

  /** What a TCP connection that failed is called; the breaker hears of it. */
  private connectError(error: Error | undefined): KedgeError {
    const { syscall } = (error ?? {}) as NodeJS.ErrnoException;
    if (syscall === 'getaddrinfo')
      return this.fail('ERR_KEDGE_DNS', `cannot resolve ${this.endpoint.hostname}${because(error)}`, error);
    return this.fail('ERR_KEDGE_CONNECT', `TCP connection failed${because(error)}`, error);
  }

  /** What is left to do on a TCP connection: the tunnel through a proxy, and TLS. */
  establish(tcp: net.Socket, alpn: readonly string[], callback: DialCallback): void {
    this.inOwnContext(() => this.finish(tcp, alpn, this.counted(callback)));
  }

  private finish(tcp: net.Socket, alpn: readonly string[], callback: DialCallback): void {
    const go = () => {
      this.unready.delete(tcp);
      if (this.address.secure) this.secure(tcp, alpn, callback);
      else {
        this.observer.dialled(tcp);
        this.note(tcp, tcp.remoteAddress);
        callback(null, tcp);
      }
    };
    const { proxy, timeoutMs } = this.timeouts;
    if (proxy === undefined) {
      go();
      return;
    }
    tunnel(tcp, proxy, this.address.name, timeoutMs, (error) => {
      if (error === undefined) {
        go();
        return;
      }
      tcp.destroy();
      callback(this.fail('ERR_KEDGE_CONNECT', `proxy ${proxy.name}: ${error.message}`, error), null);
    });
  }

  private secure(tcp: net.Socket, alpn: readonly string[], callback: DialCallback): void {
    const refused = this.ended ?? this.expired();
    if (refused !== undefined) {
      tcp.destroy();
      setImmediate(callback, refused, null);
      return;
    }
    const { remoteAddress } = tcp;
    const socket = tls.connect({ ...this.tlsOptions, socket: tcp, session: this.session, ALPNProtocols: [...alpn] });
    this.sockets.delete(tcp);
    this.track(socket);
    this.note(socket, remoteAddress);
    socket.on('session', (session) => {
      this.session = session;
    });
    const done = once(socket, this.timeouts.handshakeTimeoutMs, (error, reason) => {
      if (reason === 'ready') {
        this.unready.delete(socket);
        this.observer.dialled(socket);
        const resumed = socket.isSessionReused();
        debug.dial(
          '%s: %s, %s%s',
          this.address.name,
          socket.getProtocol(),
          socket.alpnProtocol,
          resumed ? ', resumed' : '',
        );
        readBeforeEnd(socket);
        socket.once('error', (error) => this.noteRefusal(error));
        callback(null, socket);
        return;
      }
      const failed =
        reason === 'timeout'
          ? this.fail('ERR_KEDGE_TLS_TIMEOUT', `no TLS handshake within ${this.timeouts.handshakeTimeoutMs} ms`)
          : this.tlsError(error);
      if (!NO_PROTOCOL.test(codeOf(error))) this.avoid(socket);
      // A half-done handshake keeps the TCP connection of its own.
      tcp.destroy();
      callback(failed, null);
    });
    socket.once('secureConnect', done.ready);
  }

  /** The kedge speaks on a connection of {@link connect}: only with this the dial has succeeded. */
  proved(socket: net.Socket): void {
    const address = this.peers.get(socket);
    if (address !== undefined) this.addresses.worked(address);
    this.observer.succeeded();
  }

  /** One ended before the kedge had said a word on it. */
  disproved(socket: net.Socket): void {
    // Of a refusal the observer has heard.
    if (this.ended !== undefined || this.refusal !== undefined) return;
    this.avoid(socket);
    this.observer.failed();
  }

  /** What came of this connection lets the next dial go to another address of the kedge first. */
  avoid(socket: net.Socket): void {
    const address = this.peers.get(socket);
    if (this.ended === undefined && address !== undefined) this.addresses.failed(address);
  }

  private note(socket: net.Socket, address: string | undefined): void {
    // Beyond a proxy it is not the kedge's.
    if (this.timeouts.proxy === undefined && address !== undefined) this.peers.set(socket, address);
  }

  /** Ends every connection now, dialling ones too: those say nothing of the kedge. */
  destroy(error?: Error): void {
    const context = { kedge: this.address.name, cause: error };
    // What ends a connection must not be taken for a failed dial, whatever it is.
    const isOwn = isKedgeError(error) && error.stage === 'kedge';
    this.ended ??= isOwn ? error : new KedgeError('ERR_KEDGE_CONNECTION', 'the dial was given up', context);
    for (const socket of this.sockets) socket.destroy(error);
  }

  /** Gives up the dials under way, which nobody waits for any more, and refuses others with `error`. */
  stopDialling(error: KedgeError): void {
    this.ended ??= error;
    for (const socket of this.unready) socket.destroy();
  }

  /**
   * Why a connection may have been lost that was handed out lately. With TLS 1.3 the kedge's verdict on our certificate
   * arrives after the handshake is done for us (RFC 8446 §4.4.2.4), so it meets calls, and not all of them see the alert.
   */
  get refusal(): KedgeError | undefined {
    return performance.now() < this.refusalEnds ? this.lastRefusal : undefined;
  }

  private expired(): KedgeError | undefined {
    const identity = this.identity;
    if (identity?.notAfter === undefined || identity.notAfter.getTime() > Date.now()) return undefined;
    const reason = `the client certificate ${identity.subject} (serial ${identity.serial}) expired at ${identity.notAfter.toISOString()}`;
    return dialError(new KedgeError('ERR_KEDGE_IDENTITY_EXPIRED', reason, { kedge: this.address.name }));
  }

  /** Counts a dial until it has ended. */
  private counted(callback: DialCallback): DialCallback {
    let isOver = false;
    this.dialling += 1;
    return (error, socket) => {
      if (!isOver) this.dialling -= 1;
      isOver = true;
      callback(error, socket);
    };
  }

  private track(socket: net.Socket): void {
    this.sockets.add(socket);
    this.unready.add(socket);
    // Pools drop their listeners when they are done with a socket; a late error must not end the process.
    socket.on('error', () => {});
    socket.once('close', () => {
      this.sockets.delete(socket);
      this.unready.delete(socket);
    });
  }

  private noteRefusal(error: Error): void {
    if (this.ended !== undefined || !REFUSED_CLIENT_CERTIFICATE.test(codeOf(error))) return;
    this.lastRefusal = this.tlsError(error);
    this.refusalEnds = performance.now() + REFUSAL_MEMORY_MS;
  }

  private tlsError(error: Error | undefined): KedgeError {
    const code = codeOf(error);
    if (REFUSED_CLIENT_CERTIFICATE.test(code)) {
      const own =
        this.identity?.subject === undefined
          ? 'no client certificate'
          : `our client certificate ${this.identity.subject}`;
      return this.fail('ERR_KEDGE_CLIENT_CERTIFICATE', `the kedge refused ${own}`, error);
    }
    if (UNTRUSTED_CERTIFICATE.test(code) || (error instanceof Error && code === '')) {
      const hint = UNKNOWN_CA.test(code) ? this.caHint() : '';
      const reason = `the kedge's certificate was not accepted${because(error)}${hint}`;
      return this.fail('ERR_KEDGE_CERTIFICATE', reason, error);
    }
    return this.fail('ERR_KEDGE_TLS', `TLS handshake failed${because(error)}`, error);
  }

  private caHint(): string {
    const trusted =
      this.identity?.ca === undefined
        ? "it is not from a CA of the system, and the identity, the dialer's or the route's, has no `ca`"
        : "it is not from a CA in `ca` of the identity, the dialer's or the route's";
    return `; ${trusted} (\`kedge-dialer check\` says who issued it)`;
  }

  private fail(code: KedgeErrorCode, reason: string, cause?: Error): KedgeError {
    if (this.ended !== undefined) return this.ended;
    const error = dialError(new KedgeError(code, reason, { kedge: this.address.name, cause }));
    debug.dial('%s', error.message);
    // A kedge without the protocol that this one call needs serves all others.
    if (!NO_PROTOCOL.test(codeOf(cause))) this.observer.failed();
    return error;
  }
}

const dialErrors = new WeakSet<object>();

/** Marks an error as that of a dial, which proves that nothing was sent: its code and stage alone do not. */
export function dialError(error: KedgeError): KedgeError {
  dialErrors.add(error);
  return error;
}

export function isDialError(error: unknown): boolean {
  return typeof error === 'object' && error !== null && dialErrors.has(error);
}

/** How long a refused client certificate explains lost connections, in ms. */
const REFUSAL_MEMORY_MS = 5000;

/** Alerts by which a TLS peer rejects the certificate it was shown (RFC 8446 §6.2). */
const REFUSED_CLIENT_CERTIFICATE =
  /_ALERT_(?:BAD_CERTIFICATE|UNSUPPORTED_CERTIFICATE|CERTIFICATE_(?:REVOKED|EXPIRED|UNKNOWN|REQUIRED)|UNKNOWN_CA|ACCESS_DENIED)$/;

/** The alert of a TLS peer that speaks none of the protocols offered (RFC 7301 §3.2). */
const NO_PROTOCOL = /_ALERT_NO_APPLICATION_PROTOCOL$/;

/** node:tls codes that say that the peer's certificate failed verification (Node.js documentation, "X509 certificate error codes"). */
const UNTRUSTED_CERTIFICATE =
  /^(?:ERR_TLS_CERT_|UNABLE_TO_|CERT_|CRL_|DEPTH_ZERO_|SELF_SIGNED_|ERROR_IN_CERT_|INVALID_(?:CA|PURPOSE)|PATH_LENGTH_|HOSTNAME_MISMATCH)/;

/** Those of them that say that we do not know who signed it. */
const UNKNOWN_CA =
  /^(?:UNABLE_TO_(?:VERIFY_LEAF_SIGNATURE|GET_ISSUER_CERT(?:_LOCALLY)?)|(?:DEPTH_ZERO_)?SELF_SIGNED_CERT(?:_IN_CHAIN)?|CERT_UNTRUSTED)$/;

function secureContext(identity: AnySnapshot | undefined, peer: PeerPolicy): tls.SecureContext {
  try {
    return tls.createSecureContext({
      cert: identity?.cert,
      key: identity?.key,
      pfx: identity?.pfx,
      passphrase: identity?.passphrase,
      ca: identity?.ca,
      minVersion: peer.minVersion ?? 'TLSv1.2',
    });
  } catch (cause) {
    throw new KedgeError('ERR_KEDGE_IDENTITY', 'certificate and key cannot be used for TLS', { stage: 'tls', cause });
  }
}

/** Settles a dialling socket exactly once: ready, failed, closed, or out of time. */
function once(
  socket: net.Socket,
  timeoutMs: number,
  settle: (error: Error | undefined, reason: 'ready' | 'failed' | 'timeout') => void,
): { ready: () => void } {
  const finish = (error: Error | undefined, reason: 'ready' | 'failed' | 'timeout') => {
    stopTimer();
    socket.off('error', onError);
    socket.off('close', onClose);
    if (reason !== 'ready') socket.destroy();
    settle(error, reason);
  };
  const onError = (error: Error) => finish(error, 'failed');
  const onClose = () => finish(undefined, 'failed');
  // A connection that was made while this process was busy is not late.
  const stopTimer = running(timeoutMs, () => finish(undefined, 'timeout'));
  socket.once('error', onError);
  socket.once('close', onClose);
  return { ready: () => finish(undefined, 'ready') };
}

function because(error: Error | undefined): string {
  if (error === undefined) return ': the connection was closed';
  // An AggregateError (one failure for each address tried) has no message of its own.
  const message =
    error instanceof AggregateError ? error.errors.map((each) => String(each?.message)).join('; ') : error.message;
  return `: ${message.trim().replace(/:$/, '')}`;
}
