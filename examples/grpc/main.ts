/**
 * The smallest gRPC program: one unary call through a kedge.
 *
 *   KEDGE=https://us1.kedge.example.com CERT=tls.crt KEY=tls.key CA=ca.crt \
 *     node examples/grpc/main.ts greeter.shop.svc.us1.prod.clusters.local:9090
 */
import { readFileSync } from 'node:fs';
import { createDialer, pem, single } from 'kedge-dialer';
import { grpcDialer } from 'kedge-dialer/grpc';
import { GreeterClient } from './greeter.ts';

const { KEDGE = '', SERVER_NAME, CERT = '', KEY = '', CA = '' } = process.env;

const dialer = createDialer({
  mapper: single({ kedge: KEDGE, serverName: SERVER_NAME }),
  identity: pem({ cert: readFileSync(CERT), key: readFileSync(KEY), ca: readFileSync(CA) }),
});
const Greeter = grpcDialer(dialer).wrap(GreeterClient);

const client = new Greeter(process.argv[2]!);
client.sayHello({ name: 'Ada' }, (error, reply) => {
  console.log(error?.message ?? reply?.text);
  client.close();
  dialer.close();
});
