import { METHODS } from 'node:http';
import { firstOf } from './headers.ts';
import { metrics } from './metrics.ts';
import { GRPC_CODES } from './refusal.ts';
import type { Visit } from './visit.ts';

/** As of logrus, from what is always written to what seldom is. */
const LEVELS = ['panic', 'fatal', 'error', 'warning', 'info', 'debug', 'trace'];
const rankOf = (level: string) => LEVELS.indexOf(level.toLowerCase().replace(/^warn$/, 'warning'));
const [ERROR, INFO, DEBUG] = [rankOf('error'), rankOf('info'), rankOf('debug')];
const MAX_TEXT = 256;
const CANCELLED = 1;
const KNOWN = new Set(METHODS);
/** Clients choose them. */
const known = (method: string) => (KNOWN.has(method) ? method : 'other');

/**
 * One JSON line for each request, as the original writes its own: for debugging only, or where a caller that was let in asks
 * for it by `X-Kedge-Info-Logs`. What it asked for is without its query, which may hold secrets, and no header is there
 * but those that are for this.
 */
export class AccessLog {
  private readonly rank: number;
  private readonly write: (text: string) => void;
  private lines = '';

  constructor(level: string, write: (text: string) => void = (text) => process.stderr.write(text)) {
    this.rank = rankOf(level);
    this.write = write;
  }

  began({ wire, method, url }: Visit): void {
    if (wire === 'grpc') metrics.grpcStarted.inc('bidi_stream', ...methodOf(url));
    else metrics.httpStarted.inc(known(method));
  }

  /** `status`: of HTTP, or of gRPC; undefined: it ended before there was one. */
  ended(visit: Visit, status: number | undefined): void {
    const { wire, method, url, backendName, refusal, head, isAdmitted } = visit;
    const text = String(status ?? 'none');
    metrics.requests.inc(wire, text);
    if (wire !== 'grpc') metrics.httpCompleted.inc(known(method), text);
    else if (isAdmitted)
      metrics.grpcHandled.inc('bidi_stream', ...methodOf(url), GRPC_CODES[status ?? CANCELLED] ?? 'Unknown');
    if (refusal !== undefined) metrics.proxyErrors.inc(backendName ?? '', refusal.type);
    const rank = head.infoLogs === undefined || !isAdmitted ? DEBUG : refusal === undefined ? INFO : ERROR;
    if (rank <= this.rank) this.add(lineOf(visit, status, rank));
  }

  /** Writes what waits for the end of this turn. */
  flush(): void {
    if (this.lines !== '') this.write(this.lines);
    this.lines = '';
  }

  private add(line: string): void {
    // One write for all of one turn.
    if (this.lines === '') setImmediate(() => this.flush());
    this.lines += `${line}\n`;
  }
}

function lineOf(visit: Visit, status: number | undefined, rank: number): string {
  const { wire, method, url, authority, peer, head, began, backendName, address, refusal } = visit;
  const cut = (text: string | undefined) => text?.slice(0, MAX_TEXT);
  return JSON.stringify({
    time: new Date().toISOString(),
    level: LEVELS[rank],
    msg: refusal === undefined ? 'request proxied' : 'request not proxied',
    wire,
    method: cut(method),
    target: cut(authority),
    path: cut(url.split('?', 1)[0]),
    status,
    ms: Math.round((performance.now() - began) * 10) / 10,
    client: peer.spiffeId ?? peer.name,
    request_id: cut(firstOf(head.headers, 'x-kedge-request-id')),
    traceparent: cut(firstOf(head.headers, 'traceparent')),
    info_logs: cut(head.infoLogs),
    backend: backendName,
    address,
    error: refusal?.message,
    error_type: refusal?.type,
  });
}

/** The service and the method in the path of a gRPC call. */
function methodOf(path: string): [service: string, method: string] {
  const at = path.lastIndexOf('/');
  return [path.slice(1, at), path.slice(at + 1)];
}
