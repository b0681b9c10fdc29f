/** The least that a gateway of node:http, node:http2 and undici can do, with the flags of the kedge: what Node itself costs. */
import { readFileSync } from 'node:fs';
import http, { type OutgoingHttpHeaders } from 'node:http';
import http2 from 'node:http2';
import type { AddressInfo } from 'node:net';
import tls from 'node:tls';
import { type Dispatcher, Pool } from 'undici';

const file = (flag: string) =>
  readFileSync(process.argv.find((each) => each.startsWith(`--${flag}=`))!.slice(flag.length + 3), 'utf8');
const [{ host }] = JSON.parse(file('kedge_config_backendpool_config_path')).http.backends;
const pool = new Pool(`http://${host.dns_name}:${host.port}`, { connections: 1_024 });

function forward(
  path: string,
  raw: readonly string[],
  authority: string,
  respond: (status: number, headers: OutgoingHttpHeaders) => NodeJS.WritableStream,
): void {
  const headers: string[] = [];
  for (let i = 0; i < raw.length; i += 2) {
    const name = raw[i]!.toLowerCase();
    if (!name.startsWith(':') && name !== 'connection' && name !== 'host') headers.push(name, raw[i + 1]!);
  }
  headers.push('via', '1.1 kedge', 'x-forwarded-proto', 'https', 'x-forwarded-for', '127.0.0.1');
  headers.push('x-kedge-client-subject', 'CN=pod', 'x-forwarded-host', authority, 'host', authority);
  let answer: NodeJS.WritableStream;
  const handler: Dispatcher.DispatchHandler = {
    onRequestStart: () => {},
    onResponseStart: (_controller, status, { connection: _c, 'keep-alive': _k, ...received }) => {
      answer = respond(status, { ...received, 'x-kedge-backend-name': 'orders' } as OutgoingHttpHeaders);
    },
    onResponseData: (_controller, chunk) => void answer.write(chunk),
    onResponseEnd: () => void answer.end(),
    onResponseError: (_controller, error) => {
      throw error;
    },
  };
  pool.dispatch({ path, method: 'GET', headers }, handler);
}

const h1 = http.createServer((request, response) =>
  forward(request.url!, request.rawHeaders, request.headers.host!, (status, headers) =>
    response.writeHead(status, headers),
  ),
);
const h2 = http2.createServer({ settings: { maxConcurrentStreams: 100 } });
h2.on('session', (session) =>
  session.on('stream', (stream, headers, _flags, raw) =>
    forward(headers[':path']!, raw!, headers[':authority']!, (status, answer) => {
      stream.respond({ ...answer, ':status': status });
      return stream;
    }),
  ),
);
const server = tls.createServer(
  {
    cert: file('server_tls_cert_file'),
    key: file('server_tls_key_file'),
    ca: file('server_tls_client_ca_files'),
    requestCert: true,
    ALPNProtocols: ['h2', 'http/1.1'],
  },
  (socket) => {
    socket.setNoDelay(true);
    socket.on('error', () => {});
    (socket.alpnProtocol === 'h2' ? h2 : h1).emit('connection', socket);
  },
);
server.listen(0, '127.0.0.1', () => console.log(JSON.stringify({ port: (server.address() as AddressInfo).port })));
