import { BlockList, isIP } from 'node:net';
import type { AdhocRule } from './config.ts';
import { type GRPC_STATUS, Refusal } from './refusal.ts';

/** All addresses of a name; rejects when there is none. */
export type Resolve = (name: string) => Promise<readonly string[]>;

/** This machine, its link, and what clouds answer secrets at: never meant by a rule that does not say so. */
const DENIED: readonly [string, number][] = [
  ['0.0.0.0', 8],
  ['100.100.100.200', 32],
  ['127.0.0.0', 8],
  ['168.63.129.16', 32],
  ['169.254.0.0', 16],
  ['192.0.0.192', 32],
  ['224.0.0.0', 4],
  ['240.0.0.0', 4],
  ['::', 128],
  ['::1', 128],
  ['fe80::', 10],
  ['ff00::', 8],
  ['fd00:ec2::254', 128],
  ['fd20:ce::254', 128],
];
const denied = listOf(DENIED.map(([address, bits]) => `${address}/${bits}`));

/**
 * The address behind a host name that no route knows, as the first matching rule wants it: undefined when none matches.
 * The address is checked after the look-up and is the one to dial, so that no second answer can replace it.
 */
export async function resolveAdhoc(
  rules: readonly AdhocRule[],
  host: string,
  port: number | undefined,
  resolve: Resolve,
): Promise<{ host: string; port: number } | undefined> {
  const rule = rules.find(({ dnsNameMatcher: matcher }) =>
    matcher.startsWith('*') ? host.endsWith(matcher.slice(1).toLowerCase()) : host === matcher.toLowerCase(),
  );
  if (rule === undefined || isIP(host) !== 0) return undefined;
  const chosen = port ?? rule.port.default;
  const { allowed, allowedRanges } = rule.port;
  const isAllowed = allowed.includes(chosen) || allowedRanges.some(({ from, to }) => from <= chosen && chosen <= to);
  if (!isAllowed) throw refused(400, 'INVALID_ARGUMENT', `adhoc: port ${chosen} is not allowed`);
  const name = replaced(rule, host);
  let addresses: readonly string[];
  try {
    addresses = await resolve(name);
  } catch {
    throw refused(502, 'NOT_FOUND', `adhoc: cannot resolve ${name}`);
  }
  const own = rule.allowCidrs.length === 0 ? undefined : listOf(rule.allowCidrs);
  const address = addresses.map(unmapped).find((each) => (own === undefined ? !has(denied, each) : has(own, each)));
  if (address === undefined) throw refused(403, 'PERMISSION_DENIED', `adhoc: the address of ${name} is not allowed`);
  return { host: address, port: chosen };
}

function replaced({ dnsNameReplace }: AdhocRule, host: string): string {
  if (dnsNameReplace === undefined) return host;
  const { pattern, substitution } = dnsNameReplace;
  if (pattern === '' || !host.includes(pattern))
    throw refused(502, 'NOT_FOUND', `adhoc: ${host} does not hold ${pattern}`);
  return host.replaceAll(pattern, substitution);
}

function refused(http: number, grpc: keyof typeof GRPC_STATUS, message: string): Refusal {
  return new Refusal(http, 'unknown-route-error', grpc, message);
}

/** `a.b.c.d/n` or `v6/n`; what cannot be read throws. */
export function listOf(cidrs: readonly string[]): BlockList {
  const list = new BlockList();
  for (const cidr of cidrs) {
    const [address = '', bits = ''] = cidr.split('/');
    const family = isIP(address) === 6 ? 'ipv6' : 'ipv4';
    if (isIP(address) === 0 || !/^[0-9]{1,3}$/.test(bits)) throw new Error(`"${cidr}" is not like 10.0.0.0/8`);
    list.addSubnet(address, Number(bits), family);
  }
  return list;
}

function has(list: BlockList, address: string): boolean {
  return list.check(address, isIP(address) === 6 ? 'ipv6' : 'ipv4');
}

/** An IPv4 address that is written as IPv6 (RFC 4291 §2.5.5.2), or that NAT64 leads to (RFC 6052), is that IPv4 address. */
function unmapped(address: string): string {
  if (isIP(address) !== 6) return address;
  const found = /^(?:::ffff:|64:ff9b::)(?:([0-9.]+)|(?:([0-9a-f]+):)?([0-9a-f]+))$/i.exec(address);
  if (found === null || address === '64:ff9b::') return address;
  if (found[1] !== undefined) return found[1];
  const [high, low] = [Number.parseInt(found[2] ?? '0', 16), Number.parseInt(found[3]!, 16)];
  return [high >> 8, high & 255, low >> 8, low & 255].join('.');
}
