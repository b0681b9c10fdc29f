import type { Head } from './headers.ts';
import type { Peer } from './peer.ts';
import type { Refusal } from './refusal.ts';

/** A request or call as it came in, and what became known of it since. */
export class Visit {
  readonly wire: 'http/1.1' | 'h2' | 'grpc';
  readonly method: string;
  /** The request target: a path, or an absolute URL from a client that takes us for a forward proxy. */
  readonly url: string;
  /** `Host` or `:authority`. */
  readonly authority: string;
  readonly peer: Peer;
  readonly head: Head;
  readonly rawHeaders: readonly string[];
  /** By `performance.now()`. */
  readonly began = performance.now();
  /** The gate and the route let it in. */
  isAdmitted = false;
  backendName: string | undefined;
  /** The address behind that name, where it was sent. */
  address: string | undefined;
  refusal: Refusal | undefined;

  constructor(
    wire: Visit['wire'],
    method: string,
    url: string,
    authority: string,
    peer: Peer,
    head: Head,
    rawHeaders: readonly string[],
  ) {
    this.wire = wire;
    this.method = method;
    this.url = url;
    this.authority = authority;
    this.peer = peer;
    this.head = head;
    this.rawHeaders = rawHeaders;
  }
}
