import { resolveAdhoc } from './adhoc.ts';
import type { Backend, Line } from './backend.ts';
import { isAllowed } from './peer.ts';
import { Refusal } from './refusal.ts';
import { lookUp, type WireState } from './state.ts';
import type { Visit } from './visit.ts';

/**
 * The backend of a route, or of an adhoc rule where there is none, with its addresses known and one request of the peer's
 * share taken: `shares.release()` gives it back. Rejects with a {@link Refusal}. It waits for nothing that is there.
 */
export async function admit<Route extends { backendName: string; allowedClients: string[] }, L extends Line>(
  { adhocRules, backends, adhoc }: WireState<Route, L>,
  route: Route | undefined,
  { host, port }: { host: string; port: number | undefined },
  visit: Visit,
): Promise<Backend<L>> {
  const { peer } = visit;
  let backend: Backend<L>;
  if (route === undefined) {
    const address = await resolveAdhoc(adhocRules, host, port, lookUp);
    if (address === undefined) throw new Refusal(502, 'no-route', 'UNIMPLEMENTED', 'unknown route to service');
    visit.isAdmitted = true;
    backend = adhoc(address);
  } else if (isAllowed(route.allowedClients, peer)) {
    visit.isAdmitted = true;
    visit.backendName = route.backendName;
    const named = backends.get(route.backendName);
    if (named === undefined)
      throw new Refusal(502, 'no-backend', 'UNIMPLEMENTED', 'unknown backend', route.backendName);
    backend = named;
  } else throw new Refusal(403, 'unauthorized', 'PERMISSION_DENIED', 'this client is not allowed');

  const { name, shares } = backend;
  visit.backendName = name;
  const unresolved = backend.ready();
  if (unresolved !== undefined)
    await unresolved.catch(() => {
      throw new Refusal(502, 'no-resolution-available', 'UNAVAILABLE', 'the backend has no address', name);
    });
  const isTaken = shares.take(peer.name);
  if (isTaken === true || (await isTaken)) return backend;
  const text = 'this client has too many requests under way';
  throw new Refusal(503, 'transport-unknown-error', 'RESOURCE_EXHAUSTED', text, name);
}
