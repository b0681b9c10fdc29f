import { Counter, collectDefaultMetrics, Gauge, Registry } from 'prom-client';

/** What this process counts, under our names and under those of the original. */
export const registry = new Registry();
collectDefaultMetrics({ register: registry });

/** Clients choose methods and gRPC services: what is above this many combinations is counted in one. */
const MAX_CELLS = 2_000;

/** A counter that costs an addition: its library is told when somebody looks. */
class Tally {
  private readonly cells = new Map<string, { readonly labels: Record<string, string>; count: number }>();
  private readonly names: readonly string[];

  constructor(name: string, help: string, names: readonly string[]) {
    this.names = names;
    const { cells } = this;
    const collect = function (this: Counter) {
      this.reset();
      for (const { labels, count } of cells.values()) this.inc(labels, count);
    };
    new Counter({ name, help, labelNames: [...names], registers: [registry], collect });
  }

  inc(...values: string[]): void {
    const key = values.length === 1 ? values[0]! : values.join('\n');
    const cell = this.cells.get(key);
    if (cell !== undefined) cell.count += 1;
    else if (this.cells.size < MAX_CELLS)
      this.cells.set(key, { labels: Object.fromEntries(this.names.map((name, i) => [name, values[i]!])), count: 1 });
    else if (values[0] !== OTHER) this.inc(...values.map(() => OTHER));
  }
}

const OTHER = 'other';

const grpc = ['grpc_type', 'grpc_service', 'grpc_method'];
const gauge = (name: string, help: string, labelNames: string[] = []) =>
  new Gauge({ name, help, labelNames, registers: [registry] });

export const metrics = {
  requests: new Tally('kedge_requests_total', 'Requests and calls by what became of them', ['wire', 'status']),
  connections: gauge('kedge_connections', 'Open client connections'),
  reloads: new Tally('kedge_configuration_reloads_total', 'Changed configurations', ['taken']),

  // The original's.
  proxyErrors: new Tally('kedge_proxy_errors_total', 'Requests that the kedge could not pass on', [
    'backend_name',
    'type',
  ]),
  httpBackends: new Tally('kedge_http_backend_configuration_changes_total', 'Changed backends', [
    'backend_name',
    'action',
  ]),
  grpcBackends: new Tally('kedge_grpc_backend_configuration_changes_total', 'Changed backends', [
    'backend_name',
    'action',
  ]),
  failedDials: new Tally('kedge_http_lbtransport_failed_dials', 'Addresses left out', ['resolve_addr', 'target']),
  hostLookUps: new Tally('kedge_host_resolver_resolutions_attempts_total', 'Look-ups of host backends', []),
  srvLookUps: new Tally('kedge_srv_resolver_resolutions_attempts_total', 'Look-ups of srv backends', []),
  endpoints: gauge('kedge_k8sresolver_up_addresses', 'Endpoints of a k8s backend', ['target']),
  watchErrors: new Tally('kedge_k8sresolver_watcher_next_errors_total', 'Watches that broke off', ['target']),
  watchChanges: new Tally('kedge_k8sresolver_watcher_next_got_changes_total', 'Changes of endpoints', ['target']),
  httpStarted: new Tally('http_handler_started_requests_total', 'HTTP requests that began', ['method']),
  httpCompleted: new Tally('http_handler_completed_requests_total', 'HTTP requests that ended', ['method', 'status']),
  grpcStarted: new Tally('grpc_server_started_total', 'gRPC calls that began', grpc),
  grpcHandled: new Tally('grpc_server_handled_total', 'gRPC calls that ended', [...grpc, 'grpc_code']),
  accepted: new Tally('net_conntrack_listener_conn_accepted_total', 'Client connections', ['listener_name']),
  closed: new Tally('net_conntrack_listener_conn_closed_total', 'Client connections that ended', ['listener_name']),
  dials: new Tally('net_conntrack_dialer_conn_attempted_total', 'Dials of backends', ['dialer_name']),
  dialled: new Tally('net_conntrack_dialer_conn_established_total', 'Connections to backends', ['dialer_name']),
  dialFailed: new Tally('net_conntrack_dialer_conn_failed_total', 'Failed dials', ['dialer_name', 'reason']),
  dialClosed: new Tally('net_conntrack_dialer_conn_closed_total', 'Connections that ended', ['dialer_name']),
};
