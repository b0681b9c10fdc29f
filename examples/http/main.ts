/**
 * The smallest HTTP program: one GET through a kedge.
 *
 *   KEDGE=https://us1.kedge.example.com CERT=tls.crt KEY=tls.key CA=ca.crt \
 *     node examples/http/main.ts http://orders.shop.svc.us1.prod.clusters.local:8080/v1/orders
 */
import { readFileSync } from 'node:fs';
import { createDialer, pem, single } from 'kedge-dialer';

const { KEDGE = '', SERVER_NAME, CERT = '', KEY = '', CA = '' } = process.env;

const dialer = createDialer({
  mapper: single({ kedge: KEDGE, serverName: SERVER_NAME }),
  identity: pem({ cert: readFileSync(CERT), key: readFileSync(KEY), ca: readFileSync(CA) }),
});

const response = await fetch(process.argv[2]!, { dispatcher: dialer.dispatcher });
console.log(response.status, await response.text());
await dialer.close();
