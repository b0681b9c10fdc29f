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
import { LOAD_OPTIONS, type LoadPlan, loadPlan } from './load-options.ts';

export const HELP = `Usage: kedge-dialer explain <target> [options]
       kedge-dialer check <target> [options]
       kedge-dialer load <target> [options]

explain  says where a call would go, and why; it asks nobody
check    does it: name look-up, TCP, TLS with both certificates, and one request through the kedge
load     does it many times, at their times whether or not earlier ones came back, and says how long they took

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
  --proxy <url>          the HTTP proxy on the way to every kedge

  --grpc                 the target is a gRPC service
  --path <path>          what is asked for; default: / or grpc.health.v1.Health
  --json                 print JSON
  -v, --version          print the version
  -h, --help             this text

For load:
  --rate <n>             calls a second; default: 10
  --duration <time>      such as 500ms, 30s or 5m; default: 10s. SIGINT ends it earlier
  --timeout <time>       a call that takes longer has failed; default: 10s
  --expect <conditions>  such as p99<50ms,tls.p90<20ms,errors<0.1%,rate>95: a status of 1 where one does not hold
                         (p50 to p99.9 and max of dns, tcp, proxy, tls, first and total; failures also in numbers: errors<=3)
  --kedge <url>,<url>    these kedges in turn
  --method <method>      default: GET, or POST with a body
  --data <hex>, --data-file <file>
                         the body, or the message of gRPC as it is on the wire; default: none, or an empty message
  --grpc <package.Service/Method>
                         the target is a gRPC service, and this is called

Exit status: 0 reached (explain: understood, load: as expected), 1 not, 2 wrong usage.`;

/** A command that makes sense. */
export type Command =
  | { readonly is: 'help' }
  | { readonly is: 'version' }
  | (Common & { readonly is: 'explain' | 'check'; readonly path: string | undefined })
  | (Common & { readonly is: 'load'; readonly plan: LoadPlan });

interface Common {
  /** More than one: for `load`, in turn. */
  readonly dialers: readonly Dialer[];
  readonly target: string;
  readonly wire: Wire;
  readonly json: boolean;
  readonly warnings: readonly string[];
}

const COMMANDS = ['explain', 'check', 'load'] as const;
/** Anything else may have been pasted by mistake, and is not shown. */
const SHOWN = /^[\w-]{1,40}$/;

const text = { type: 'string' } as const;
const flag = { type: 'boolean', default: false } as const;

const OPTIONS = {
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
  proxy: text,
  grpc: flag,
  path: text,
  json: flag,
  version: { type: 'boolean', short: 'v', default: false },
  help: { type: 'boolean', short: 'h', default: false },
} as const;

/** Throws an `Error` with one line for whatever is wrong. */
export function parse(args: readonly string[]): Command {
  if (args[0] === 'load') return parseLoad(args);
  const { values, positionals } = parseArgs({ args: [...args], allowPositionals: true, options: OPTIONS });
  if (values.help) return { is: 'help' };
  if (values.version) return { is: 'version' };
  const [command = '', target, ...rest] = positionals;
  const is = COMMANDS.find((each) => each === command);
  if (is === undefined) throw new Error(unknownCommand(command));
  if (is === 'load') throw new Error('load comes before its options');
  if (target === undefined || rest.length > 0) throw new Error(`${is} takes one target`);
  const { dialer, warnings } = dialerOf(values);
  const { path, json } = values;
  return { is, dialers: [dialer], target, wire: values.grpc ? 'grpc' : 'http', path, json, warnings };
}

function parseLoad(args: readonly string[]): Command {
  const options = { ...OPTIONS, ...LOAD_OPTIONS };
  const { values, positionals } = parseArgs({ args: [...args], allowPositionals: true, options });
  if (values.help) return { is: 'help' };
  const [is, target, ...rest] = positionals;
  if (is !== 'load' || target === undefined || rest.length > 0) throw new Error('load takes one target');
  let plan: LoadPlan;
  try {
    plan = loadPlan(values);
  } catch (error) {
    throw error instanceof KedgeError ? new Error(error.reason) : error;
  }
  const kedges = values.kedge?.split(',') ?? [undefined];
  const all = kedges.map((kedge) => dialerOf({ ...values, kedge }));
  const wire = values.grpc === undefined ? 'http' : 'grpc';
  const warnings = [...new Set(all.flatMap((each) => each.warnings))];
  return { is, dialers: all.map(({ dialer }) => dialer), target, wire, plan, json: values.json, warnings };
}

type Values = Record<string, string | string[] | boolean | undefined>;

function dialerOf(values: Values): { dialer: Dialer; warnings: string[] } {
  const { mapper, warnings } = mapperOf(values);
  const { cert, key, ca, auth, 'server-name': serverName, kedge } = values;
  if ((cert === undefined) !== (key === undefined)) throw new Error('--cert and --key go together');
  if (auth !== undefined && values['mapper'] === undefined) throw new Error('--auth goes with --mapper');
  if (serverName !== undefined && kedge === undefined) throw new Error('--server-name goes with --kedge');
  const options: DialerOptions = {
    mapper,
    ...(values['proxy'] !== undefined && { connect: { proxy: String(values['proxy']) } }),
  };
  const trust = ca === undefined ? {} : { ca: String(ca) };
  if (cert !== undefined) options.identity = pemFiles({ cert: String(cert), key: String(key), ...trust });
  else if (ca !== undefined) options.identity = pemFiles({ ca: String(ca) });
  try {
    return { dialer: createDialer(options), warnings };
  } catch (error) {
    throw error instanceof KedgeError ? new Error(error.reason) : error;
  }
}

function unknownCommand(given: string): string {
  if (!SHOWN.test(given)) return 'the command is explain, check or load';
  const meant = nearest(given, COMMANDS);
  return `unknown command ${given}; ${meant === undefined ? 'there are explain, check and load' : `did you mean ${meant}?`}`;
}

function mapperOf(values: Values): { mapper: Mapper; warnings: string[] } {
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
