import dns from 'node:dns/promises';
import { once } from 'node:events';
import { isIP, type Socket, connect as tcpConnect } from 'node:net';
import tls, { type Certificate, type TLSSocket } from 'node:tls';
import { inspect } from 'node:util';
import type { Dialer } from '../dialer.ts';
import { type Core, coreOf } from '../engine/core.ts';
import type { Hop } from '../kedge/kedge.ts';
import { kedgeErrorOf } from '../reported.ts';
import { isKedgeError, KedgeError, type KedgeErrorCode } from '../support/errors.ts';
import { loadOptional } from '../support/optional-package.ts';
import type { Wire } from '../target.ts';

/** One stage of the way to a kedge. */
export interface CheckStep {
  /** `host:port`. */
  kedge: string;
  stage: 'dns' | 'tcp' | 'tls' | 'request';
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
  for (const hop of plan?.hops ?? []) await reach(core, hop, wire, steps);
  const kedge = plan === undefined ? 'direct' : 'the route';
  const request = await step(kedge, 'request', () =>
    wire === 'grpc' ? callHealth(dialer, target, path) : get(dialer, target, path ?? '/'),
  );
  steps.push(request);
  const report = { ok: request.ok, steps };
  Object.defineProperty(report, inspect.custom, { value: () => print(canonical.authority, report) });
  return report;
}

/** Name look-up, TCP and TLS of a connection that nobody uses. */
export async function reach(core: Core, hop: Hop, wire: Wire, steps: CheckStep[]): Promise<void> {
  const { name, hostname, port, secure } = hop.address;
  let addresses: string[] = [hostname];
  if (isIP(hostname) === 0) {
    const looked = await step(name, 'dns', async () => {
      addresses = (await dns.lookup(hostname, { all: true })).map(({ address }) => address);
      return addresses.join(', ');
    });
    steps.push(looked);
    if (!looked.ok) return;
  }
  let socket: Socket | undefined;
  const dialled = await step(name, 'tcp', async () => {
    socket = await connect(addresses[0]!, port);
    return `${socket.remoteAddress}:${socket.remotePort}`;
  });
  steps.push(dialled);
  if (!dialled.ok || !secure) {
    socket?.destroy();
    return;
  }
  const secured = await step(name, 'tls', (taken) => handshake(core, hop, socket!, wire, taken));
  socket!.destroy();
  if (secured.detail.startsWith('ERR_KEDGE_CERTIFICATE')) secured.detail += await shown(hop, addresses[0]!);
  steps.push(secured);
}

/** The certificate that was not accepted. We show none to whoever has it, and say nothing. */
async function shown({ address: { sni, port } }: Hop, host: string): Promise<string> {
  const tcp = await connect(host, port).catch(() => undefined);
  if (tcp === undefined) return '';
  const socket = tls.connect({ socket: tcp, servername: sni, rejectUnauthorized: false });
  try {
    await once(socket, 'secureConnect', { signal: AbortSignal.timeout(TIMEOUT_MS) });
    const { subject, issuer, fingerprint256 } = socket.getPeerCertificate();
    const nameOf = ({ CN, O }: Certificate) => JSON.stringify(String(CN ?? O).replace(/[^\x20-\x7e]/g, '?'));
    return `; it shows ${nameOf(subject)}, issued by ${nameOf(issuer)}, SHA-256 ${fingerprint256}`;
  } catch {
    return '';
  } finally {
    socket.destroy();
    tcp.destroy();
  }
}

async function handshake(core: Core, hop: Hop, socket: Socket, wire: Wire, taken: () => void): Promise<string> {
  const { connector, identity } = core.kedges.get(hop).generation;
  const secured = await new Promise<TLSSocket>((resolve, reject) => {
    const alpn = wire === 'grpc' ? ['h2'] : ['h2', 'http/1.1'];
    connector.establish(socket, alpn, (error, done) => (error === null ? resolve(done as TLSSocket) : reject(error)));
  });
  taken();
  const { subject, valid_to: until } = secured.getPeerCertificate();
  const words = [
    `${secured.getProtocol()}, ${secured.alpnProtocol || 'no ALPN'}`,
    // The certificate of a resumed session is not sent again.
    secured.isSessionReused()
      ? 'a session resumed'
      : `kedge ${subject?.CN ?? '(no name)'} until ${new Date(until).toISOString()}`,
    identity?.notAfter === undefined
      ? 'no client certificate'
      : `client ${identity.subject} until ${identity.notAfter.toISOString()}`,
  ];
  const isClosed = identity?.notAfter !== undefined && (await closes(secured));
  secured.destroy();
  if (isClosed) {
    const reason =
      'the kedge closed the connection right after our certificate, as kedges do that refuse it and send no alert';
    throw connector.refusal ?? new KedgeError('ERR_KEDGE_TLS', reason, { kedge: hop.address.name });
  }
  return words.join('; ');
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
  const { origin } = new URL(target.includes('://') ? target : `http://${target}`);
  const options = { origin, path, method: 'GET', headersTimeout: TIMEOUT_MS, bodyTimeout: TIMEOUT_MS } as const;
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
  const grpc = await loadOptional(
    '@grpc/grpc-js',
    () => import('@grpc/grpc-js'),
    (reason) => new KedgeError('ERR_KEDGE_OPTIONS', `--grpc ${reason}`),
  );
  const { grpcDialer } = await import('../grpc/index.ts');
  const pass = (bytes: Buffer) => bytes;
  const client = new (grpcDialer(dialer).wrap(grpc.Client))(target);
  return new Promise((resolve, reject) => {
    const deadline = Date.now() + TIMEOUT_MS;
    client.makeUnaryRequest(path, pass, pass, Buffer.alloc(0), new grpc.Metadata(), { deadline }, (error) => {
      client.close();
      const reported = error === null ? undefined : (kedgeErrorOf(error) ?? error.cause);
      if (error === null) resolve('status OK');
      else if (isKedgeError(reported)) reject(reported);
      else if (error.code === grpc.status.UNIMPLEMENTED) resolve('the backend answers, without this service');
      else reject(error);
    });
  });
}

function connect(host: string, port: number): Promise<Socket> {
  return new Promise((resolve, reject) => {
    const socket = tcpConnect({ host, port, timeout: TIMEOUT_MS });
    socket.once('connect', () => resolve(socket.setTimeout(0)));
    socket.once('timeout', () => socket.destroy(new Error(`no answer within ${TIMEOUT_MS} ms`)));
    socket.once('error', reject);
  });
}

/** It takes as long as `take`, or until that says that it has been taken. */
async function step(
  kedge: string,
  stage: CheckStep['stage'],
  take: (taken: () => void) => Promise<string>,
): Promise<CheckStep> {
  const began = performance.now();
  let ended: number | undefined;
  const taken = () => {
    ended = performance.now();
  };
  const done = (ok: boolean, detail: string) => ({
    kedge,
    stage,
    ok,
    ms: Math.round(((ended ?? performance.now()) - began) * 1000) / 1000,
    detail,
  });
  try {
    return done(true, await take(taken));
  } catch (error) {
    return done(false, failure(stage, error));
  }
}

const CODES: Readonly<Record<CheckStep['stage'], KedgeErrorCode>> = {
  dns: 'ERR_KEDGE_DNS',
  tcp: 'ERR_KEDGE_CONNECT',
  tls: 'ERR_KEDGE_TLS',
  request: 'ERR_KEDGE_CONNECTION',
};

function failure(stage: CheckStep['stage'], error: unknown): string {
  const known = isKedgeError(error) ? error : new KedgeError(CODES[stage], (error as Error).message);
  return `${known.code}: ${known.message}`;
}

function print(target: string, { ok, steps }: CheckReport): string {
  const lines = steps.map(({ kedge, stage, ok: done, ms, detail }) => {
    return `  ${done ? 'ok  ' : 'FAIL'} ${stage.padEnd(8)}${String(Math.round(ms)).padStart(5)} ms  ${kedge}: ${detail}`;
  });
  return [...lines, `${target} ${ok ? 'can' : 'cannot'} be reached`].join('\n');
}
