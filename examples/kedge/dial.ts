import { readFileSync } from 'node:fs';
import net from 'node:net';
import tls from 'node:tls';
import type { BackendConfig } from './config.ts';
import { metrics } from './metrics.ts';
import type { Address } from './resolver.ts';

/** How long TCP and TLS may take together, in ms. */
export const DIAL_MS = 5_000;

/** The address could not be dialled, so nothing was sent to it. */
export class DialError extends Error {}

/** Opens connections to the addresses of one backend, in the clear or with its TLS. */
export type Dial = (address: Address, alpn: readonly string[]) => Promise<net.Socket>;

/** `caFiles`: by the name of a TLS configuration; throws when a file cannot be read. */
export function dialOf(
  wire: string,
  { name, security, host, srv, k8s }: BackendConfig,
  caFiles: ReadonlyMap<string, string>,
): Dial {
  const counted = `${wire}_backend_${name}`;
  if (security === undefined) return (address) => connected(counted, net.connect({ ...address }), 'connect');
  // The name in the certificate is that of the configuration, whatever address it resolves to.
  const servername = host?.dnsName ?? srv?.dnsName ?? `${k8s!.service}.${k8s!.namespace}.svc`;
  const caFile = caFiles.get(security.configName) ?? '';
  const options: tls.ConnectionOptions = {
    servername: net.isIP(servername) === 0 ? servername : '',
    checkServerIdentity: (_host, certificate) => tls.checkServerIdentity(servername, certificate),
    rejectUnauthorized: !security.insecureSkipVerify,
    secureContext: tls.createSecureContext(caFile === '' ? {} : { ca: readFileSync(caFile) }),
  };
  return (address, alpn) =>
    connected(counted, tls.connect({ ...options, ...address, ALPNProtocols: [...alpn] }), 'secureConnect');
}

function connected(name: string, socket: net.Socket, event: string): Promise<net.Socket> {
  metrics.dials.inc(name);
  return new Promise((resolve, reject) => {
    const late = setTimeout(
      () => socket.destroy(Object.assign(new Error(`not connected within ${DIAL_MS} ms`), { code: 'ETIMEDOUT' })),
      DIAL_MS,
    );
    const failed = (cause?: Error) => {
      clearTimeout(late);
      socket
        .off('error', failed)
        .off('close', failed)
        .on('error', () => {});
      metrics.dialFailed.inc(name, reasonOf(cause));
      reject(new DialError('the address cannot be dialled', { cause }));
    };
    socket.once('error', failed);
    socket.once('close', failed);
    socket.once(event, () => {
      clearTimeout(late);
      socket.off('error', failed).off('close', failed);
      metrics.dialled.inc(name);
      socket.once('close', () => metrics.dialClosed.inc(name));
      resolve(socket.setNoDelay(true));
    });
  });
}

/** As go-conntrack has them. */
function reasonOf(cause: NodeJS.ErrnoException | undefined): string {
  if (cause?.code === 'ECONNREFUSED') return 'refused';
  return cause?.code === 'ETIMEDOUT' ? 'timeout' : 'unknown';
}
