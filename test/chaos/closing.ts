/** A process with calls under way that closes its dialer and has to end by itself: `CHAOS=<JSON> node closing.ts`. */
import { createDialer, pem, single, staticToken } from '../../src/index.ts';
import { KEDGE_NAME } from '../helpers/kedge.ts';
import { grpcClient, httpClient } from './clients.ts';
import { start } from './load.ts';

const { cert, key, ca, token, urls } = JSON.parse(process.env['CHAOS']!);
const dialers = (['h1', 'h2', 'auto'] as const).map((protocol) =>
  createDialer({
    identity: pem({ cert, key, ca }),
    mapper: single({ kedge: urls, serverName: KEDGE_NAME, proxyAuth: staticToken(token) }),
    http: { protocol },
  }),
);
const clients = [
  httpClient('h1', dialers[0]!.dispatcher),
  httpClient('h2', dialers[1]!.dispatcher),
  grpcClient(dialers[2]!),
];
console.log('{}');
const calls = clients.flatMap((client) =>
  Array.from({ length: 50 }, () => start(client, client.wire === 'grpc' ? 'UNARY' : 'POST', 'orders.us1:8080')),
);
await Promise.all(dialers.map((dialer) => dialer.close()));
await Promise.all(calls.map(({ done }) => done));
console.log(`${calls.filter(({ call }) => call.ok).length} of ${calls.length} calls finished`);
process.exitCode = calls.every(({ call }) => call.ok) ? 0 : 1;
