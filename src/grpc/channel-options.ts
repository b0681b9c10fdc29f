import { createRequire } from 'node:module';
import type { ChannelOptions } from '@grpc/grpc-js';
import type { ResolvedOptions } from '../options.ts';
import { type SessionSettings, sessionSettings } from '../rpc/session.ts';
import { KedgeError } from '../support/errors.ts';
import { check, is, ms, object, optional, or, string, whole } from '../support/shape.ts';

/** What our part of a channel takes from its options; the rest is grpc-js's business. */
export interface OwnOptions {
  readonly settings: SessionSettings;
  readonly userAgent: string;
  readonly maxMessageBytes: number;
}

/** Options that would change what is dialled or which name is verified; the route decides both. */
const REFUSED = [
  'grpc.default_authority',
  'grpc.ssl_target_name_override',
  'grpc.http_connect_target',
  'grpc.http_connect_creds',
] as const;

const DEFAULT_MAX_MESSAGE_BYTES = 4 * 1024 * 1024;
/** Every connection has this much at least (RFC 9113 §6.9.2). */
const MIN_WINDOW_BYTES = 65_535;

const isLimit = (value: unknown): value is number => typeof value === 'number' && (value === -1 || value >= 0);

/** A wrong one would be thrown by Node at nobody, and so at the process, once there is a connection; or count for nothing. */
const FIELDS = {
  'grpc-node.flow_control_window': optional(whole(1, undefined, 'bytes')),
  'grpc.keepalive_time_ms': optional(is('a number of ms, or -1 for never', isLimit)),
  'grpc.keepalive_timeout_ms': optional(ms),
  'grpc.keepalive_permit_without_calls': or(whole(0, 1), 0),
  'grpc.max_receive_message_length': or(is('a number of bytes, or -1 for any', isLimit), DEFAULT_MAX_MESSAGE_BYTES),
  'grpc.primary_user_agent': optional(string),
  'grpc.secondary_user_agent': optional(string),
};
const NAMES = Object.keys(FIELDS);
const OPTIONS = object(FIELDS);

/** @throws {@link KedgeError} `ERR_KEDGE_OPTIONS` */
export function ownOptions(options: ChannelOptions, defaults: ResolvedOptions['grpc'], target: string): OwnOptions {
  const refused = REFUSED.find((name) => Object.hasOwn(options, name));
  if (refused !== undefined) {
    const reason = `channel option \`${refused}\`: the route decides what is dialled and verified`;
    throw new KedgeError('ERR_KEDGE_OPTIONS', reason, { target });
  }
  const read = readOwn(options, target);
  const keepaliveTimeMs = read['grpc.keepalive_time_ms'] ?? defaults.keepaliveTimeMs;
  return {
    settings: sessionSettings({
      windowBytes: Math.max(read['grpc-node.flow_control_window'] ?? defaults.windowBytes, MIN_WINDOW_BYTES),
      keepaliveTimeMs: keepaliveTimeMs > 0 ? keepaliveTimeMs : Number.POSITIVE_INFINITY,
      keepaliveTimeoutMs: read['grpc.keepalive_timeout_ms'] ?? defaults.keepaliveTimeoutMs,
      keepaliveWithoutCalls: read['grpc.keepalive_permit_without_calls'] === 1,
    }),
    userAgent: [read['grpc.primary_user_agent'], GRPC_JS, read['grpc.secondary_user_agent']].filter(Boolean).join(' '),
    maxMessageBytes: read['grpc.max_receive_message_length'],
  };
}

function readOwn(options: ChannelOptions, target: string): ReturnType<typeof OPTIONS> {
  try {
    return check('channel options', OPTIONS, Object.fromEntries(NAMES.map((name) => [name, options[name]])));
  } catch (error) {
    throw (error as KedgeError).for(target);
  }
}

/** The user agent of grpc-js, which backends see without a kedge, too. */
const GRPC_JS = `grpc-node-js${grpcVersion()}`;

function grpcVersion(): string {
  try {
    const { version } = createRequire(import.meta.url)('@grpc/grpc-js/package.json') as { version: string };
    return `/${version}`;
  } catch {
    // In a bundle there is no package to ask.
    return '';
  }
}
