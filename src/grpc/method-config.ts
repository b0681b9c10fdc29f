import { type ChannelOptions, status } from '@grpc/grpc-js';

/** What the caller's service config says of one method. */
export interface MethodConfig {
  /** How often a call may be executed, wherever: 1 without a retry policy. */
  readonly maxAttempts: number;
  /** Whether it may be executed again after UNAVAILABLE. */
  readonly retriesUnavailable: boolean;
  /** From the start of a call on; Infinity without one. */
  readonly timeoutMs: number;
}

/** Asked with `/package.Service/Method`. */
export type MethodConfigs = (method: string) => MethodConfig;

/** As grpc-js reads it, which has checked it. */
interface ServiceConfig {
  readonly methodConfig?: readonly Entry[];
}
interface Entry {
  readonly name: readonly { readonly service?: string; readonly method?: string }[];
  readonly timeout?: string | { readonly seconds: number; readonly nanos: number };
  readonly retryPolicy?: {
    readonly maxAttempts: number;
    readonly retryableStatusCodes: readonly (string | number)[];
  };
}

const NONE: MethodConfig = { maxAttempts: 1, retriesUnavailable: false, timeoutMs: Number.POSITIVE_INFINITY };
/** grpc-js's own limit, and the option that replaces it. */
const MAX_ATTEMPTS = 5;
const MAX_ATTEMPTS_OPTION = 'grpc-node.retry_max_attempts_limit';
const MAX_CACHED = 100;

/**
 * The caller's service config (gRFC A6). grpc-js acts on it within a connection, and from when a call has one; what it
 * allows and bounds holds over all the kedges of a route, and while a call waits, too.
 */
export function methodConfigs(options: ChannelOptions): MethodConfigs {
  const text = options['grpc.service_config'];
  const entries = text === undefined ? [] : ((JSON.parse(text) as ServiceConfig).methodConfig ?? []);
  if (entries.length === 0) return () => NONE;
  const cached = new Map<string, MethodConfig>();
  return (method) => {
    let config = cached.get(method);
    if (config === undefined) {
      config = read(find(entries, method), options);
      if (cached.size < MAX_CACHED) cached.set(method, config);
    }
    return config;
  };
}

/** The one that speaks of the method, or else of its service, or else of all: they are never combined. */
function find(entries: readonly Entry[], path: string): Entry | undefined {
  const [ofService, ofMethod] = path.split('/').filter((part) => part !== '');
  const named = (service: string | undefined, method: string | undefined) =>
    entries.find(({ name }) => name.some((each) => each.service === service && each.method === method));
  // Unset and empty are the same in a service config.
  const all = () => entries.find(({ name }) => name.some((each) => !each.service && !each.method));
  return named(ofService, ofMethod) ?? named(ofService, undefined) ?? named(ofService, '') ?? all();
}

function read(entry: Entry | undefined, options: ChannelOptions): MethodConfig {
  if (entry === undefined) return NONE;
  const { retryPolicy, timeout } = entry;
  const timeoutMs = timeout === undefined ? NONE.timeoutMs : millisecondsOf(timeout);
  if (retryPolicy === undefined || options['grpc.enable_retries'] === 0) return { ...NONE, timeoutMs };
  const { maxAttempts, retryableStatusCodes } = retryPolicy;
  const limit = (options[MAX_ATTEMPTS_OPTION] as number | undefined) ?? MAX_ATTEMPTS;
  const retriesUnavailable = retryableStatusCodes.some(
    (code) => code === status.UNAVAILABLE || String(code).toUpperCase() === 'UNAVAILABLE',
  );
  return { maxAttempts: Math.min(maxAttempts, limit), retriesUnavailable, timeoutMs };
}

function millisecondsOf(timeout: NonNullable<Entry['timeout']>): number {
  if (typeof timeout === 'string') return Number.parseFloat(timeout) * 1000;
  return timeout.seconds * 1000 + timeout.nanos / 1e6;
}
