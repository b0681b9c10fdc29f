import http from 'node:http';
import http2 from 'node:http2';
import type { AddressInfo } from 'node:net';
import { setTimeout as sleep } from 'node:timers/promises';
import { type Echo, startEchoServer } from '../helpers/grpc-kedge.ts';
import type { Scope } from './world.ts';

/** The header with a call's unique id. */
export const ID = 'x-id';
/** The header with how many bytes the answer has besides the echo. */
export const PAD = 'x-pad';
const WORK_MS = 5;

/** What every backend answers with, so that an answer that is somebody else's shows. */
export interface Answer {
  id: string;
  host: string;
  body: string;
  pad: string;
}

/** What was executed: the id of each call and how often. */
export class Ledger {
  readonly executions = new Map<string, number>();
  /** Requests that came with what was meant for the kedge. */
  leaked = 0;

  /** On a backend, which is no kedge. */
  guard(headers: http.IncomingHttpHeaders): void {
    if (headers['proxy-authorization'] !== undefined) this.leaked += 1;
  }

  execute(headers: http.IncomingHttpHeaders): void {
    const id = headers[ID];
    if (typeof id === 'string') this.executions.set(id, (this.executions.get(id) ?? 0) + 1);
  }
}

/** The backends behind the kedges, which share a ledger: plain HTTP, and grpc-js. */
export async function startBackend(scope: Scope, ledger: Ledger): Promise<{ http: number; grpc: number }> {
  const server = http.createServer((request, response) => {
    ledger.guard(request.headers);
    void answer(ledger, request, response);
  });
  server.keepAliveTimeout = 60_000;
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
  scope.after(() => {
    server.close();
    server.closeAllConnections();
  });
  const { port } = await startEchoServer(scope.asTest, {
    unary: (call, callback) => {
      const headers = call.metadata.getMap() as Record<string, string>;
      ledger.guard(headers);
      ledger.execute(headers);
      const reply: Echo = { text: call.request.text, authority: call.getHost() };
      setTimeout(() => callback(null, reply), WORK_MS);
    },
  });
  return { http: (server.address() as AddressInfo).port, grpc: port };
}

type Request = http.IncomingMessage | http2.Http2ServerRequest;
type Response = http.ServerResponse | http2.Http2ServerResponse;

/** Executes a request and answers it, over HTTP or, on a faulty kedge without a backend, gRPC. */
export async function answer(ledger: Ledger, request: Request, response: Response, workMs = WORK_MS): Promise<void> {
  response.on('error', () => {});
  const chunks: Buffer[] = [];
  try {
    for await (const chunk of request) chunks.push(chunk as Buffer);
  } catch {
    return; // the caller went away before it had said everything
  }
  ledger.execute(request.headers);
  await sleep(workMs);
  if (response.destroyed || (response instanceof http2.Http2ServerResponse && response.stream?.destroyed)) return;
  const body = Buffer.concat(chunks);
  if (request.headers['content-type'] === 'application/grpc') answerGrpc(response, authorityOf(request), body);
  else {
    response.setHeader('content-type', 'application/json');
    response.end(echo(request, body.toString()));
  }
}

export function echo(request: Request, body: string): string {
  const pad = 'p'.repeat(Number(request.headers[PAD] ?? 0));
  return JSON.stringify({ id: String(request.headers[ID]), host: authorityOf(request), body, pad } satisfies Answer);
}

function authorityOf(request: Request): string {
  return request instanceof http.IncomingMessage ? request.headers.host! : request.authority;
}

/** Messages are framed by a flag and their length. */
function answerGrpc(response: Response, authority: string, body: Buffer): void {
  const { text } = JSON.parse(body.subarray(5).toString()) as { text: string };
  const message = Buffer.from(JSON.stringify({ text, authority } satisfies Echo));
  const head = Buffer.alloc(5);
  head.writeUInt32BE(message.length, 1);
  response.setHeader('content-type', 'application/grpc');
  response.addTrailers({ 'grpc-status': '0' });
  (response as http2.Http2ServerResponse).end(Buffer.concat([head, message]));
}
