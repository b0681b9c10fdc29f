import { once } from 'node:events';
import type { Socket } from 'node:net';
import tls, { type Certificate, TLSSocket } from 'node:tls';
import { inspect } from 'node:util';
import type { Connector, DialStage } from '../dial/connector.ts';
import type { Dialer } from '../dialer.ts';
import { type Core, coreOf } from '../engine/core.ts';
import type { AnySnapshot } from '../identity/identity.ts';
import type { Endpoint } from '../kedge/kedge.ts';
import { kedgeErrorOf } from '../kedge-error-report.ts';
import { isKedgeError, KedgeError } from '../support/errors.ts';
import type { Wire } from '../target.ts';
import { originOf, rawClient } from './raw-calls.ts';

/** One stage of the way to a kedge. */
export interface CheckStep {
  /** `host:port`. */
  kedge: string;
  stage: DialStage['stage'] | 'request';
  ok: boolean;
  ms: number;
  /** What was found, or what went wrong. */
  detail: string;
}

/** What `check` prints. */
export interface CheckReport {
  /** Whether the request got through, by whichever kedge. */
  ok: boolean;
  steps: CheckStep[];
}

const TIMEOUT_MS = 5000;
/** How long a kedge may take to close a connection whose certificate it refuses. */
const VERDICT_MS = 300;
const MAX_BODY_BYTES = 16 * 1024 * 1024;

/** Goes every step to each kedge of the target's route, then makes one request as any caller would. */
export async function check(
  dialer: Dialer,
  target: string,
  wire: Wire,
  path: string | undefined,
): Promise<CheckReport> {
  const core = coreOf(dialer);
  const { plan, target: canonical } = core.resolve(wire, target);
  const steps: CheckStep[] = [];
  for (const endpoint of plan?.endpoints ?? []) await reach(core, endpoint, wire, steps);
  const kedge = plan === undefined ? 'direct' : 'the route';
  const began = performance.now();
  const request = (ok: boolean, detail: string): CheckStep => {
    return { kedge, stage: 'request', ok, ms: performance.now() - began, detail };
  };
  const last = await (wire === 'grpc' ? callHealth(dialer, target, path) : get(dialer, target, path ?? '/')).then(
    (detail) => request(true, detail),
    (error) => request(false, failure(error)),
  );
  steps.push(last);
  const report = { ok: last.ok, steps };
  Object.defineProperty(report, inspect.custom, { value: () => print(canonical.authority, report) });
  return report;
}

/** The dial of a connection that nobody uses, as its connector tells of it. */
export async function reach(core: Core, endpoint: Endpoint, wire: Wire, steps: CheckStep[]): Promise<void> {
  const kedge = endpoint.address.name;
  let began = performance.now();
  try {
    const { connector, identity } = core.kedges.get(endpoint).generation;
    const alpn = wire === 'grpc' ? ['h2'] : ['h2', 'http/1.1'];
    const socket = await new Promise<Socket>((resolve, reject) => {
      const dialled = (error: KedgeError | null, socket: Socket | null) =>
        error === null ? resolve(socket!) : reject(error);
      connector.connect(alpn, dialled, (stage) => {
        steps.push({ kedge, ok: true, ...stage });
        began = performance.now();
      });
    });
    try {
      if (socket instanceof TLSSocket) steps.at(-1)!.detail += await verdict(endpoint, connector, identity, socket);
    } finally {
      socket.destroy();
    }
  } catch (error) {
    if (!isKedgeError(error)) throw error;
    const last = steps.at(-1);
    const isTls = error.stage === 'tls';
    // The verdict on our certificate undoes what seemed done.
    if (isTls && last?.kedge === kedge && last.stage === 'tls') steps.pop();
    const isConnected = steps.some((step) => step.kedge === kedge && step.stage === 'tcp');
    const stage = error.stage === 'dns' ? 'dns' : error.stage !== 'connect' ? 'tls' : isConnected ? 'proxy' : 'tcp';
    const hint = error.code === 'ERR_KEDGE_CERTIFICATE' ? await shown(core, endpoint) : '';
    steps.push({ kedge, stage, ok: false, ms: performance.now() - began, detail: failure(error) + hint });
  }
}

/** The certificate that was not accepted. We show none to whoever has it, and say nothing. */
async function shown(core: Core, { address: { hostname, sni, port } }: Endpoint): Promise<string> {
  // Beyond a proxy it would take a tunnel of its own.
  if (core.options.connect.proxy !== undefined) return '';
  const socket = tls.connect({ host: hostname, port, servername: sni, rejectUnauthorized: false });
  try {
    await once(socket, 'secureConnect', { signal: AbortSignal.timeout(TIMEOUT_MS) });
    const { subject, issuer, fingerprint256 } = socket.getPeerCertificate();
    const nameOf = ({ CN, O }: Certificate) => JSON.stringify(String(CN ?? O).replace(/[^\x20-\x7e]/g, '?'));
    return `; it shows ${nameOf(subject)}, issued by ${nameOf(issuer)}, SHA-256 ${fingerprint256}`;
  } catch {
    return '';
  } finally {
    socket.on('error', () => {}).destroy();
  }
}

/** Who is there, and whether our certificate was taken. */
async function verdict(
  { address }: Endpoint,
  connector: Connector,
  identity: AnySnapshot | undefined,
  socket: TLSSocket,
): Promise<string> {
  const { subject, valid_to: until } = socket.getPeerCertificate();
  // The certificate of a resumed session is not sent again.
  const kedge = socket.isSessionReused()
    ? ''
    : `; kedge ${subject?.CN ?? '(no name)'} until ${new Date(until).toISOString()}`;
  if (identity?.notAfter === undefined) return `${kedge}; no client certificate`;
  if (!(await closes(socket))) return `${kedge}; client ${identity.subject} until ${identity.notAfter.toISOString()}`;
  const reason =
    'the kedge closed the connection right after our certificate, as kedges do that refuse it and send no alert';
  throw connector.refusal ?? new KedgeError('ERR_KEDGE_TLS', reason, { kedge: address.name });
}

/** With TLS 1.3 what the kedge thinks of our certificate comes after the handshake (RFC 8446 §4.4.2.4). */
function closes(socket: TLSSocket): Promise<boolean> {
  return new Promise((resolve) => {
    const timer = setTimeout(resolve, VERDICT_MS, false);
    socket.once('close', () => {
      clearTimeout(timer);
      resolve(true);
    });
    socket.resume();
  });
}

async function get(dialer: Dialer, target: string, path: string): Promise<string> {
  const options = {
    origin: originOf(target),
    path,
    method: 'GET',
    headersTimeout: TIMEOUT_MS,
    bodyTimeout: TIMEOUT_MS,
  } as const;
  const response = await dialer.dispatcher.request(options as never);
  const reported = kedgeErrorOf(response as never);
  // An answer that never ends is an answer.
  const limit = AbortSignal.timeout(TIMEOUT_MS);
  await response.body.dump({ limit: MAX_BODY_BYTES, signal: limit }).catch((error) => {
    if (!limit.aborted) throw error;
  });
  if (reported !== undefined) throw reported;
  return `status ${response.statusCode}${limit.aborted ? `, still answering after ${TIMEOUT_MS} ms` : ''}`;
}

/** The health service of gRPC; a server without one still answers (https://grpc.io/docs/guides/health-checking/). */
async function callHealth(dialer: Dialer, target: string, path = '/grpc.health.v1.Health/Check'): Promise<string> {
  const { grpc, client, call } = await rawClient(dialer, target);
  return new Promise((resolve, reject) => {
    call(path, Buffer.alloc(0), TIMEOUT_MS, (error) => {
      client.close();
      const reported = error === null ? undefined : (kedgeErrorOf(error) ?? error.cause);
      if (error === null) resolve('status OK');
      else if (isKedgeError(reported)) reject(reported);
      else if (error.code === grpc.status.UNIMPLEMENTED) resolve('the backend answers, without this service');
      else reject(error);
    });
  });
}

function failure(error: unknown): string {
  const { code, message } = isKedgeError(error)
    ? error
    : new KedgeError('ERR_KEDGE_CONNECTION', (error as Error).message);
  return `${code}: ${message}`;
}

function print(target: string, { ok, steps }: CheckReport): string {
  const lines = steps.map(({ kedge, stage, ok: done, ms, detail }) => {
    return `  ${done ? 'ok  ' : 'FAIL'} ${stage.padEnd(8)}${String(Math.round(ms)).padStart(5)} ms  ${kedge}: ${detail}`;
  });
  return [...lines, `${target} ${ok ? 'can' : 'cannot'} be reached`].join('\n');
}
