import { type Dispatcher, Pool } from 'undici';
import type { Dialer } from '../../src/index.ts';
import { spread } from './measure.ts';

/** Nanoseconds that a mapped dispatch takes before its pool is reached, beyond a bare call of the pool. */
export function overhead(dialer: Dialer): string {
  const original = Pool.prototype.dispatch;
  const handler = {
    onRequestStart() {},
    onResponseError() {},
    onResponseStart() {},
    onResponseData() {},
    onResponseEnd() {},
  };
  const headers = { accept: 'application/json', 'user-agent': 'bench', 'x-trace': '0123456789' };
  const options = { origin: 'http://orders.shop.svc.us1:8080', path: '/', method: 'GET' as const, headers };
  type Sink = {
    onRequestStart(controller: object, context: null): void;
    onResponseEnd(controller: object, trailers: object): void;
  };
  const controller = { rawHeaders: null, abort() {}, pause() {}, resume() {} };
  // The pool that ends each request at once: what is left is ours.
  Pool.prototype.dispatch = function dispatch(_options: unknown, sink: unknown) {
    (sink as Sink).onRequestStart(controller, null);
    (sink as Sink).onResponseEnd(controller, {});
    return true;
  } as never;
  try {
    const bare: Dispatcher['dispatch'] = (each, sink) => Pool.prototype.dispatch.call(null as never, each, sink);
    const time = (dispatch: Dispatcher['dispatch']) => {
      const count = 300_000;
      const begin = process.hrtime.bigint();
      for (let i = 0; i < count; i += 1) dispatch(options, handler);
      return Number(process.hrtime.bigint() - begin) / count;
    };
    const ours = dialer.dispatcher.dispatch.bind(dialer.dispatcher) as Dispatcher['dispatch'];
    for (const each of [ours, bare]) time(each);
    const { median, min, max } = spread(Array.from({ length: 9 }, () => time(ours) - time(bare)));
    return `${median.toFixed(0)} ns (${min.toFixed(0)}-${max.toFixed(0)})`;
  } finally {
    Pool.prototype.dispatch = original;
  }
}
