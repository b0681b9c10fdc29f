import { randomBytes } from 'node:crypto';
import type { EventEmitter } from 'node:events';
import type { Generation } from '../kedge/generation.ts';
import type { ResolvedOptions } from '../options.ts';
import { HttpPool } from './pool.ts';

/** The pools of all generations, opened when a first request comes. */
export class HttpPools {
  private readonly options: ResolvedOptions['http'];
  private readonly events: EventEmitter;
  private readonly requestIdPrefix = `kd-${randomBytes(8).toString('hex')}-`;
  private requests = 0;

  constructor({ http }: ResolvedOptions, events: EventEmitter) {
    this.options = http;
    this.events = events;
  }

  of(generation: Generation): HttpPool {
    generation.http ??= new HttpPool(generation, this.options, this.events);
    return generation.http as HttpPool;
  }

  /** A value for `X-Kedge-Request-ID`, unless the options say that none is sent. */
  requestId(): string | undefined {
    if (!this.options.requestId) return undefined;
    this.requests += 1;
    return this.requestIdPrefix + this.requests;
  }
}
