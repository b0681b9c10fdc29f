import '../support/refuse-old-node.ts';

export type { WinchLogin } from './auth.ts';
export { loadWinchConfig, type WinchConfig, type WinchConfigOptions } from './config.ts';
