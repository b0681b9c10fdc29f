import type { Dispatcher } from './undici.ts';

export interface KedgeDispatcher extends Dispatcher {}
