import { inspect } from 'node:util';
import type { Core } from './engine/core.ts';
import type { AnyIdentity } from './identity/identity.ts';
import type { Hop, KedgeStats } from './kedge/kedge.ts';
import { describe } from './mapper/describe.ts';
import { isKedgeError } from './support/errors.ts';
import { isIP, type Wire } from './target.ts';

/** The certificate that would be shown; never its key. */
export interface ExplainedIdentity {
  subject: string;
  /** Hexadecimal. */
  serial: string;
  notBefore: Date;
  notAfter: Date;
}

/** One kedge of the route, in the order in which calls try them. */
export interface ExplainedKedge {
  /** `host:port`. */
  kedge: string;
  /** The name that its certificate must be for; undefined for a plain `http:` kedge. */
  serverName: string | undefined;
  /** Undefined where none is shown. */
  identity: ExplainedIdentity | undefined;
  /** `unused` before the first call. */
  state: KedgeStats['breaker'] | 'unused';
}

/** What {@link Dialer.explain} says: what would happen to a call, and why. Prints as text, and as JSON. */
export interface Explanation {
  /** The canonical `host[:port]`. */
  target: string;
  wire: Wire;
  /** `kedge`: through the first kedge that can be had; `direct`: by the fallback, without our credentials; `reject`: `ERR_KEDGE_UNMAPPED`. */
  outcome: 'kedge' | 'direct' | 'reject';
  /** The mapper and rule that matched, or why none did. */
  mapper: string;
  kedges: ExplainedKedge[];
  /** Names of the token sources. */
  proxyAuth: string | undefined;
  backendAuth: string | undefined;
  warnings: string[];
}

const HOUR_MS = 60 * 60 * 1000;

/**
 * Asks nobody: no name server, kedge or token source.
 *
 * @throws `KedgeError` as a call would
 */
export function explain(core: Core, input: string | URL, wire: Wire): Explanation {
  const { target, plan } = core.look(wire, input);
  const { options } = core;
  const warnings: string[] = [];
  const kedges = (plan?.hops ?? []).map((hop) => explainKedge(core, hop, warnings));
  const explanation: Explanation = {
    target: target.authority,
    wire,
    outcome: plan !== undefined ? 'kedge' : options.unmapped,
    mapper: isIP(target) ? 'IP addresses are never mapped' : describe(options.mapper, target),
    kedges,
    proxyAuth: plan?.credentials.names.proxyAuth,
    backendAuth: plan?.credentials.names.backendAuth,
    warnings: [...new Set(warnings)],
  };
  for (const name of [inspect.custom, 'toString'])
    Object.defineProperty(explanation, name, { value: () => print(explanation) });
  return explanation;
}

function explainKedge(core: Core, { key, address, identity, peer }: Hop, warnings: string[]): ExplainedKedge {
  if (!address.secure) warnings.push(`kedge ${address.name} is plain http: no certificate, no tokens`);
  if (address.secure && peer.dangerouslySkipVerification) warnings.push('kedge certificates are not verified');
  return {
    kedge: address.name,
    serverName: address.secure ? address.verifyName : undefined,
    identity: identity === undefined ? undefined : explainIdentity(identity, warnings),
    state: core.kedges.find(key)?.breaker.name ?? 'unused',
  };
}

function explainIdentity(identity: AnyIdentity, warnings: string[]): ExplainedIdentity | undefined {
  try {
    const current = identity.current();
    if (current.notAfter === undefined) return undefined;
    const { subject, serial, notBefore, notAfter } = current;
    const left = notAfter.getTime() - Date.now();
    if (left <= 0) warnings.push(`the client certificate expired at ${notAfter.toISOString()}`);
    else if (left < HOUR_MS) warnings.push(`the client certificate expires at ${notAfter.toISOString()}`);
    if (notBefore.getTime() > Date.now())
      warnings.push(`the client certificate is not valid before ${notBefore.toISOString()}`);
    return { subject, serial, notBefore, notAfter };
  } catch (error) {
    warnings.push(isKedgeError(error) ? error.message : 'the identity has no certificate');
    return undefined;
  }
}

const OUTCOMES: Readonly<Record<Explanation['outcome'], string>> = {
  kedge: 'through a kedge',
  direct: 'direct, without any of our credentials',
  reject: 'refused: ERR_KEDGE_UNMAPPED',
};

function print({ target, wire, outcome, mapper, kedges, proxyAuth, backendAuth, warnings }: Explanation): string {
  const lines = [`${wire} ${target}: ${OUTCOMES[outcome]}`, `  mapper       ${mapper}`];
  for (const [i, { kedge, serverName, identity, state }] of kedges.entries()) {
    lines.push(
      `  kedge ${i + 1}      ${kedge}, ${serverName === undefined ? 'plain' : `TLS to ${serverName}`}, ${state}`,
    );
    if (identity === undefined) continue;
    lines.push(
      `  identity     ${identity.subject}, serial ${identity.serial}, until ${identity.notAfter.toISOString()}`,
    );
  }
  if (proxyAuth !== undefined) lines.push(`  proxy auth   ${proxyAuth}`);
  if (backendAuth !== undefined) lines.push(`  backend auth ${backendAuth}`);
  for (const warning of warnings) lines.push(`  warning      ${warning}`);
  return lines.join('\n');
}
