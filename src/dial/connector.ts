import { AsyncLocalStorage } from 'node:async_hooks';
import net from 'node:net';
import tls from 'node:tls';
import type { AnySnapshot } from '../identity/identity.ts';
import { debug } from '../support/debug.ts';
import { isKedgeError, KedgeError, type KedgeErrorCode } from '../support/errors.ts';
import { attempt } from './attempt.ts';
import { because, dialError } from './dial-error.ts';
import type { Addresses } from './dns-cache.ts';
import type { KedgeAddress } from './kedge-address.ts';
import { readBeforeEnd } from './last-words.ts';
import type { PeerPolicy } from './peer.ts';
import { lacksProtocol, refusesClientCertificate, tlsFailure, tlsOptions } from './tls.ts';
import { type ProxyAddress, tunnel } from './tunnel.ts';

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

/** A part of a dial that is done. */
export interface DialStage {
  readonly stage: 'dns' | 'tcp' | 'proxy' | 'tls';
  readonly ms: number;
  /** What was found: addresses, the protocol. */
  readonly detail: string;
}

type Report = (stage: DialStage['stage'], detail: string) => void;

/** Called once, never in the tick of the dial. */
export type DialCallback = (error: KedgeError | null, socket: net.Socket | tls.TLSSocket | null) => void;

/** How long a refused client certificate explains lost connections, in ms. */
const REFUSAL_MEMORY_MS = 5000;

/**
 * Dials one kedge under one identity, for both wires: there is one place that decides which certificate is shown, which
 * name must be proven, and what a failed dial is called.
 *
 * @remarks Large, for the order of name, TCP, tunnel and TLS is told in one place; each step's own work is in a file
 * beside it.
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
  private get tcpAddress(): { readonly hostname: string; readonly port: number } {
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
    this.tlsOptions = address.secure ? tlsOptions(address, identity, peer) : {};
  }

  /** DNS, TCP, the tunnel through a proxy and (for an `https:` kedge) TLS; `onStage` hears of each that is done. */
  connect(alpn: readonly string[], callback: DialCallback, onStage?: (stage: DialStage) => void): void {
    const refused = this.ended ?? this.expired();
    if (refused !== undefined) {
      setImmediate(callback, refused, null);
      return;
    }
    let last = performance.now();
    const report: Report = (stage, detail) => {
      const now = performance.now();
      debug.dial('%s: %s %s', this.address.name, stage, detail);
      onStage?.({ stage, ms: now - last, detail });
      last = now;
    };
    this.inOwnContext(() => this.dial(alpn, this.counted(callback), report));
  }

  private dial(alpn: readonly string[], callback: DialCallback, report: Report): void {
    debug.dial('%s: connecting', this.address.name);
    const found: string[] = [];
    const socket = net.connect({
      host: this.tcpAddress.hostname,
      port: this.tcpAddress.port,
      lookup: this.addresses.lookup,
      noDelay: true,
      keepAlive: true,
      keepAliveInitialDelay: 60_000,
    });
    this.track(socket);
    // Once for each address; not where the kedge is given by one.
    socket.on('lookup', (error, address) => {
      if (error === null) found.push(address);
    });
    const done = attempt(socket, this.timeouts.timeoutMs, (error, reason) => {
      if (found.length > 0) report('dns', found.join(', '));
      if (reason === 'ready') {
        report('tcp', `${socket.remoteAddress}:${socket.remotePort}`);
        this.tunnel(socket, alpn, callback, report);
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
      return this.fail('ERR_KEDGE_DNS', `cannot resolve ${this.tcpAddress.hostname}${because(error)}`, error);
    return this.fail('ERR_KEDGE_CONNECT', `TCP connection failed${because(error)}`, error);
  }

  private tunnel(tcp: net.Socket, alpn: readonly string[], callback: DialCallback, report: Report): void {
    const { proxy, timeoutMs } = this.timeouts;
    if (proxy === undefined) {
      this.secure(tcp, alpn, callback, report);
      return;
    }
    tunnel(tcp, proxy, this.address.name, timeoutMs, (error) => {
      if (error === undefined) {
        report('proxy', proxy.name);
        this.secure(tcp, alpn, callback, report);
        return;
      }
      tcp.destroy();
      callback(this.fail('ERR_KEDGE_CONNECT', `proxy ${proxy.name}: ${error.message}`, error), null);
    });
  }

  private secure(tcp: net.Socket, alpn: readonly string[], callback: DialCallback, report: Report): void {
    this.unready.delete(tcp);
    if (!this.address.secure) {
      this.observer.dialled(tcp);
      this.note(tcp, tcp.remoteAddress);
      callback(null, tcp);
      return;
    }
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
    const done = attempt(socket, this.timeouts.handshakeTimeoutMs, (error, reason) => {
      if (reason === 'ready') {
        this.unready.delete(socket);
        this.observer.dialled(socket);
        const resumed = socket.isSessionReused() ? ', resumed' : '';
        report('tls', `${socket.getProtocol()}, ${socket.alpnProtocol || 'no ALPN'}${resumed}`);
        readBeforeEnd(socket);
        socket.once('error', (error) => this.noteRefusal(error));
        callback(null, socket);
        return;
      }
      const failed =
        reason === 'timeout'
          ? this.fail('ERR_KEDGE_TLS_TIMEOUT', `no TLS handshake within ${this.timeouts.handshakeTimeoutMs} ms`)
          : this.tlsError(error);
      if (!lacksProtocol(error)) this.avoid(socket);
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
    if (this.ended !== undefined || !refusesClientCertificate(error)) return;
    this.lastRefusal = this.tlsError(error);
    this.refusalEnds = performance.now() + REFUSAL_MEMORY_MS;
  }

  private tlsError(error: Error | undefined): KedgeError {
    const { code, reason } = tlsFailure(error, this.identity);
    return this.fail(code, reason, error);
  }

  private fail(code: KedgeErrorCode, reason: string, cause?: Error): KedgeError {
    if (this.ended !== undefined) return this.ended;
    const error = dialError(new KedgeError(code, reason, { kedge: this.address.name, cause }));
    debug.dial('%s', error.message);
    // A kedge without the protocol that this one call needs serves all others.
    if (!lacksProtocol(cause)) this.observer.failed();
    return error;
  }
}
