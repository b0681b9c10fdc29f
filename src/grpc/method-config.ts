import { type ChannelOptions, status } from '@grpc/grpc-js';

interface ServiceConfig {
  methodConfig?: {
    name?: { service?: string; method?: string }[];
    retryPolicy?: { maxAttempts?: number; retryableStatusCodes?: (string | number)[] };
  }[];
}

/** Whether the caller lets a method be called again after UNAVAILABLE; asked with `/package.Service/Method`. */
export type RetriesUnavailable = (method: string) => boolean;

/**
 * Of the retry policies in the caller's service config (gRFC A6). grpc-js acts on them within a connection; what they allow is
 * what a call may do on the route's next kedge, too.
 */
export function retriesUnavailable(options: ChannelOptions): RetriesUnavailable {
  const config = parse(options['grpc.service_config']);
  const methods = new Set<string>();
  for (const { name = [], retryPolicy } of config?.methodConfig ?? []) {
    const codes = retryPolicy?.retryableStatusCodes ?? [];
    if (!codes.some((code) => code === status.UNAVAILABLE || String(code).toUpperCase() === 'UNAVAILABLE')) continue;
    // An empty service is every method, an empty method every one of the service.
    for (const { service = '', method = '' } of name) methods.add(service === '' ? '' : `/${service}/${method}`);
  }
  if (methods.size === 0 || options['grpc.enable_retries'] === 0) return () => false;
  return (method) =>
    methods.has('') || methods.has(method) || methods.has(method.slice(0, method.lastIndexOf('/') + 1));
}

function parse(text: unknown): ServiceConfig | undefined {
  try {
    return JSON.parse(String(text)) as ServiceConfig;
  } catch {
    // grpc-js ignores what it cannot read, too.
    return undefined;
  }
}
