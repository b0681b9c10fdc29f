import { resolveAdhoc } from './adhoc.ts';
import type { Backend, Line } from './backend.ts';
import { isAllowed } from './peer.ts';
import { Refusal } from './refusal.ts';
import { lookUp, type WireState } from './state.ts';
import type { Visit } from './visit.ts';

/** Goes on at once where there is nothing to wait for: most requests need no promise. */
export function after<T, R>(value: T | Promise<T>, next: (value: T) => R | Promise<R>): R | Promise<R> {
  return value instanceof Promise ? value.then(next) : next(value);
}

/**
 * The backend of a route, or of an adhoc rule where there is none, with its addresses known and one request of the peer's
 * share taken: `shares.release()` gives it back. Throws or rejects with a {@link Refusal}.
 */
export function admit<Route extends { backendName: string; allowedClients: string[] }, L extends Line>(
  { adhocRules, backends, adhoc }: WireState<Route, L>,
  route: Route | undefined,
  { host, port }: { host: string; port: number | undefined },
  visit: Visit,
): Backend<L> | Promise<Backend<L>> {
  if (route === undefined)
    return resolveAdhoc(adhocRules, host, port, lookUp).then((address) => {
      if (address === undefined) throw new Refusal(502, 'no-route', 'UNIMPLEMENTED', 'unknown route to service');
      visit.isAdmitted = true;
      return withShare(adhoc(address), visit);
    });
  const { backendName, allowedClients } = route;
  if (!isAllowed(allowedClients, visit.peer))
    throw new Refusal(403, 'unauthorized', 'PERMISSION_DENIED', 'this client is not allowed');
  visit.isAdmitted = true;
  visit.backendName = backendName;
  const backend = backends.get(backendName);
  if (backend === undefined) throw new Refusal(502, 'no-backend', 'UNIMPLEMENTED', 'unknown backend', backendName);
  return withShare(backend, visit);
}

function withShare<L extends Line>(backend: Backend<L>, visit: Visit): Backend<L> | Promise<Backend<L>> {
  const { name, shares } = backend;
  visit.backendName = name;
  const take = () =>
    after(shares.take(visit.peer.name), (isTaken) => {
      if (isTaken) return backend;
      const text = 'this client has too many requests under way';
      throw new Refusal(503, 'transport-unknown-error', 'RESOURCE_EXHAUSTED', text, name);
    });
  const unresolved = backend.ready();
  return unresolved === undefined
    ? take()
    : unresolved.then(take, () => {
        throw new Refusal(502, 'no-resolution-available', 'UNAVAILABLE', 'the backend has no address', name);
      });
}
