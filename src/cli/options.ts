import { parseArgs } from 'node:util';
import { createDialer, type Dialer } from '../dialer.ts';
import { pemFiles } from '../identity/pem-files.ts';
import type { Mapper } from '../mapper/mapper.ts';
import { single } from '../mapper/single.ts';
import { suffix } from '../mapper/suffix.ts';
import type { DialerOptions } from '../options.ts';
import { KedgeError } from '../support/errors.ts';
import { nearest } from '../support/shape.ts';
import type { Wire } from '../target.ts';
import { loadWinchConfig } from '../winch/config.ts';

export const HELP = `Usage: kedge-dialer explain <target> [options]
       kedge-dialer check <target> [options]

explain  says where a call would go, and why; it asks nobody
check    does it: name look-up, TCP, TLS with both certificates, and one request through the kedge

A target is an origin such as http://orders.shop.svc.us1.example:8080, or with --grpc host:port. One with a path, a query
or user:password@ is refused: --path says what 'check' asks for, --auth which tokens go with it.

Where calls go, one of:
  --mapper <file>        winch's mapper file
  --kedge <url>          every name to this kedge
  --match <pattern> --suffix <suffix>
                         as the suffix mapper: '*.*.clusters.local' and '.kedge.example.com'

With what:
  --auth <file>          winch's auth file, for --mapper
  --strict               refuse hazards in winch's files
  --cert, --key <file>   client certificate and its key, PEM
  --ca <file>            the CAs of the kedges, PEM; default: the system's
  --server-name <name>   the name that the kedge's certificate is for, with --kedge

  --grpc                 the target is a gRPC service
  --path <path>          what 'check' asks for; default: / or grpc.health.v1.Health
  --json                 print JSON
  -v, --version          print the version
  -h, --help             this text

Exit status: 0 reached (explain: understood), 1 not, 2 wrong usage.`;

/** A command that makes sense. */
export type Command =
  | { readonly is: 'help' }
  | { readonly is: 'version' }
  | {
      readonly is: 'explain' | 'check';
      readonly dialer: Dialer;
      readonly target: string;
      readonly wire: Wire;
      readonly path: string | undefined;
      readonly json: boolean;
      readonly warnings: readonly string[];
    };

const COMMANDS = ['explain', 'check'] as const;
/** Anything else may have been pasted by mistake, and is not shown. */
const SHOWN = /^[\w-]{1,40}$/;

const text = { type: 'string' } as const;
const flag = { type: 'boolean', default: false } as const;

/** Throws an `Error` with one line for whatever is wrong. */
export function parse(args: readonly string[]): Command {
  const { values, positionals } = parseArgs({
    args: [...args],
    allowPositionals: true,
    options: {
      mapper: text,
      kedge: text,
      match: text,
      suffix: text,
      auth: text,
      strict: flag,
      cert: text,
      key: text,
      ca: text,
      'server-name': text,
      grpc: flag,
      path: text,
      json: flag,
      version: { type: 'boolean', short: 'v', default: false },
      help: { type: 'boolean', short: 'h', default: false },
    },
  });
  if (values.help) return { is: 'help' };
  if (values.version) return { is: 'version' };
  const [command = '', target, ...rest] = positionals;
  const is = COMMANDS.find((each) => each === command);
  if (is === undefined) throw new Error(unknownCommand(command));
  if (target === undefined || rest.length > 0) throw new Error(`${is} takes one target`);
  const { mapper, warnings } = mapperOf(values);
  const { cert, key, ca, grpc, path, json } = values;
  if ((cert === undefined) !== (key === undefined)) throw new Error('--cert and --key go together');
  if (values.auth !== undefined && values.mapper === undefined) throw new Error('--auth goes with --mapper');
  if (values['server-name'] !== undefined && values.kedge === undefined) {
    throw new Error('--server-name goes with --kedge');
  }
  const options: DialerOptions = { mapper };
  const trust = ca === undefined ? {} : { ca };
  if (cert !== undefined) options.identity = pemFiles({ cert, key: key!, ...trust });
  else if (ca !== undefined) options.identity = pemFiles({ ca });
  const wire = grpc ? 'grpc' : 'http';
  return { is, dialer: createDialer(options), target, wire, path, json, warnings };
}

function unknownCommand(given: string): string {
  if (!SHOWN.test(given)) return 'the command is explain or check';
  const meant = nearest(given, COMMANDS);
  return `unknown command ${given}; ${meant === undefined ? 'there are explain and check' : `did you mean ${meant}?`}`;
}

function mapperOf(values: Record<string, string | boolean | undefined>): { mapper: Mapper; warnings: string[] } {
  const { mapper, kedge, match, suffix: tail, auth, strict, 'server-name': serverName } = values;
  const given = [mapper, kedge, match ?? tail].filter((value) => value !== undefined);
  if (given.length !== 1) throw new Error('one of --mapper, --kedge, or --match with --suffix says where calls go');
  try {
    if (mapper !== undefined) {
      return loadWinchConfig({
        mapper: String(mapper),
        ...(auth === undefined ? {} : { auth: String(auth) }),
        strict: strict === true,
      });
    }
    if (kedge !== undefined) {
      const own = serverName === undefined ? {} : { serverName: String(serverName) };
      return { mapper: single({ kedge: String(kedge), ...own }), warnings: [] };
    }
    return { mapper: suffix({ match: String(match), suffix: String(tail) }), warnings: [] };
  } catch (error) {
    throw error instanceof KedgeError ? new Error(error.reason) : error;
  }
}
