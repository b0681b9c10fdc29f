import assert from 'node:assert/strict';
import { spawnSync } from 'node:child_process';
import { readdirSync, readFileSync, realpathSync, writeFileSync } from 'node:fs';
import { join, relative } from 'node:path';
import { describe, it } from 'node:test';
import { fileURLToPath } from 'node:url';
import * as certManager from '@kubernetes-models/cert-manager/cert-manager.io/v1';
import * as apps from 'kubernetes-models/apps/v1';
import * as autoscaling from 'kubernetes-models/autoscaling/v2';
import * as networking from 'kubernetes-models/networking.k8s.io/v1';
import * as policy from 'kubernetes-models/policy/v1';
import * as rbac from 'kubernetes-models/rbac.authorization.k8s.io/v1';
import * as core from 'kubernetes-models/v1';
import { parseAllDocuments } from 'yaml';
import { readConfig } from '../../examples/kedge/config.ts';
import { tempDir } from '../helpers/temp.ts';

/** The published schemas of Kubernetes and cert-manager. */
const SCHEMAS: Readonly<Record<string, object>> = {
  v1: core,
  'apps/v1': apps,
  'autoscaling/v2': autoscaling,
  'networking.k8s.io/v1': networking,
  'policy/v1': policy,
  'rbac.authorization.k8s.io/v1': rbac,
  'cert-manager.io/v1': certManager,
};

interface PolicyRule {
  ports?: { port: number; protocol: string }[];
  from?: object[];
}

interface Container {
  args?: string[];
  ports?: { name: string; containerPort: number }[];
}

interface Manifest {
  apiVersion: string;
  kind: string;
  metadata: { name: string; namespace?: string };
  data?: Record<string, string>;
  spec?: {
    template?: { metadata: { labels: object }; spec: { serviceAccountName: string; containers: Container[] } };
    podSelector?: object;
    policyTypes?: string[];
    ingress?: PolicyRule[];
    ports?: { port: number; targetPort: number | string; nodePort?: number }[];
  };
  /** Of roles and their bindings. */
  rules?: { apiGroups: string[]; resources: string[]; verbs: string[] }[];
  roleRef?: { kind: string; name: string };
  subjects?: { kind: string; name: string; namespace: string }[];
  /** Of a Kustomization. */
  resources?: string[];
  patches?: { target: object; patch: string }[];
}

const folder = new URL('../../examples/kubernetes/', import.meta.url);
const all = (readdirSync(folder, { recursive: true }) as string[])
  .filter((file) => file.endsWith('.yaml'))
  .sort()
  .flatMap((file) =>
    parseAllDocuments(readFileSync(new URL(file, folder), 'utf8'), { uniqueKeys: true }).map((document) => {
      assert.deepEqual(document.errors, [], file);
      return [file, document.toJS() as Manifest] as const;
    }),
  );
const isKustomize = ({ apiVersion }: Manifest) => apiVersion.startsWith('kustomize.config.k8s.io/');
const manifests = all.filter(([, manifest]) => !isKustomize(manifest));
const named = (kind: string) => manifests.find(([file, each]) => file === 'kedge.yaml' && each.kind === kind)![1];

describe('the Kubernetes manifests', () => {
  for (const [file, manifest] of manifests) {
    const { apiVersion, kind, metadata } = manifest;
    it(`${file}: ${kind} ${metadata.name} is valid`, () => {
      const Model = (SCHEMAS[apiVersion] as Record<string, new (data: object) => { validate(): void }>)[kind];
      assert.ok(Model, `${apiVersion} ${kind}`);
      new Model(manifest).validate();
      const broken = { ...manifest, metadata: 1 };
      assert.throws(() => new Model(broken).validate(), 'the schema is asked');
    });
  }

  it('can be applied to an empty cluster, file by file: every namespace is there before what is in it', () => {
    const made = new Set<string>();
    let inOne = 0;
    for (const [file, { kind, metadata }] of manifests) {
      if (kind === 'Namespace') made.add(metadata.name);
      if (metadata.namespace === undefined) continue;
      inOne += 1;
      assert.ok(made.has(metadata.namespace), `${file}: ${kind} ${metadata.name} in ${metadata.namespace}`);
    }
    assert.ok(inOne > 8);
  });

  it('hold files that the kedge takes, and flags that it has', () => {
    const { data } = named('ConfigMap');
    const [director, pool] = ['director.json', 'backendpool.json'].map((file) => ({ file, text: data![file]! }));
    assert.equal(readConfig(director!, pool!).http.backends.size, 1);
    const main = readFileSync(new URL('../../examples/kedge/main.ts', import.meta.url), 'utf8');
    const flags = readFileSync(new URL('kedge.yaml', folder), 'utf8').match(/--[a-z_]+(?==)/g)!;
    assert.ok(flags.length > 8);
    for (const flag of flags) assert.ok(main.includes(`${flag.slice(2)}:`), flag);
    assert.ok(named('Deployment').spec!.template!.spec.containers[0]!.args!.includes('--server_bind_address=::'));
  });

  it('have a Kustomize base for an empty cluster, and a component that adds what discovery needs', () => {
    const [component, base] = all.filter(([, manifest]) => isKustomize(manifest));
    assert.deepEqual([base![0], component![0]], ['kustomization.yaml', 'discovery/kustomization.yaml']);
    assert.deepEqual([base![1].kind, component![1].kind], ['Kustomization', 'Component']);
    for (const [file, { resources }] of [base!, component!])
      for (const each of resources!) {
        const path = new URL(each, new URL(file, folder)).pathname;
        const own = manifests.filter(([name]) => new URL(name, folder).pathname === path);
        assert.ok(own.length > 0, `${file}: ${each}`);
        const ofOthers = own.filter(([, { apiVersion }]) => apiVersion.startsWith('cert-manager.io'));
        assert.deepEqual(ofOthers, [], 'an empty cluster knows its own kinds alone');
      }
    const main = readFileSync(new URL('../../examples/kedge/main.ts', import.meta.url), 'utf8');
    for (const [, flag] of component![1].patches![0]!.patch.matchAll(/--([a-z_]+)=/g))
      assert.ok(main.includes(`${flag}:`), flag);
  });

  it('let the kedge of the base read endpoints in one namespace, and nothing of the cluster', () => {
    const base = all.find(([file]) => file === 'kustomization.yaml')![1].resources!;
    const rights = manifests.filter(([, { apiVersion }]) => apiVersion.startsWith('rbac.'));
    const inBase = rights.filter(([file]) => base.includes(file)).map(([, each]) => each);
    assert.deepEqual(
      inBase.map(({ kind, metadata }) => `${kind} ${metadata.namespace}/${metadata.name}`),
      ['Role shop/kedge-endpoints', 'RoleBinding shop/kedge-endpoints'],
    );
    const [role, binding] = inBase;
    const endpoints = { apiGroups: ['discovery.k8s.io'], resources: ['endpointslices'], verbs: ['list', 'watch'] };
    assert.deepEqual(role!.rules, [endpoints]);
    assert.deepEqual([binding!.roleRef!.kind, binding!.roleRef!.name], ['Role', 'kedge-endpoints']);
    const account = { kind: 'ServiceAccount', name: 'kedge', namespace: 'kedge' };
    assert.deepEqual(binding!.subjects, [account]);
    assert.equal(named('Deployment').spec!.template!.spec.serviceAccountName, account.name);
    // Discovery sees every namespace, and is a component of its own: to read, nothing else.
    const wide = rights.filter(([, { kind }]) => kind.startsWith('Cluster'));
    assert.deepEqual(
      wide.map(([file, { kind }]) => `${file} ${kind}`),
      ['discovery/cluster-role.yaml ClusterRole', 'discovery/cluster-role.yaml ClusterRoleBinding'],
    );
    const services = { apiGroups: [''], resources: ['services'], verbs: ['list', 'watch'] };
    assert.deepEqual(wide[0]![1].rules, [services, endpoints]);
  });

  it('let the monitoring namespace alone come in to the debug port, and no Service lead there', () => {
    const { template } = named('Deployment').spec!;
    const { args, ports } = template!.spec.containers[0]!;
    const portOf = (name: string) => ports!.find((each) => each.name === name)!.containerPort;
    const [tls, debug] = [portOf('tls'), portOf('debug')];
    assert.ok(args!.includes(`--server_http_tls_port=${tls}`) && args!.includes(`--server_http_port=${debug}`));
    const policies = manifests.filter(([, { kind }]) => kind === 'NetworkPolicy');
    assert.equal(policies.length, 1, 'policies add up: another one could open the port');
    const { podSelector, policyTypes, ingress } = policies[0]![1].spec!;
    assert.deepEqual(podSelector, { matchLabels: template!.metadata.labels });
    assert.equal(policies[0]![1].metadata.namespace, named('Deployment').metadata.namespace);
    assert.ok(policyTypes!.includes('Ingress'));
    const monitoring = { namespaceSelector: { matchLabels: { 'kubernetes.io/metadata.name': 'monitoring' } } };
    assert.deepEqual(ingress, [
      { ports: [{ port: tls, protocol: 'TCP' }] },
      { ports: [{ port: debug, protocol: 'TCP' }], from: [monitoring] },
    ]);
    const exposed = manifests
      .filter(([file, { kind }]) => kind === 'Service' && file === 'kedge.yaml')
      .flatMap(([, { spec }]) => spec!.ports!.map(({ port, targetPort }) => [port, targetPort]));
    assert.deepEqual(exposed, [[443, 'tls']]);
  });

  it('are what kubectl makes of base and component', {
    skip: spawnSync('kubectl', ['version', '--client']).status === 0 ? false : 'needs kubectl',
  }, async (t) => {
    const overlay = await tempDir(t);
    const here = relative(realpathSync(overlay), fileURLToPath(folder));
    const kustomization = { resources: [here], components: [join(here, 'discovery')] };
    writeFileSync(join(overlay, 'kustomization.yaml'), JSON.stringify(kustomization));
    const built = (path: string) => {
      const { status, stdout, stderr } = spawnSync('kubectl', ['kustomize', path], { encoding: 'utf8' });
      assert.equal(status, 0, stderr);
      return parseAllDocuments(stdout).map((each) => each.toJS() as Manifest);
    };
    const base = built(fileURLToPath(folder));
    const files = ['00-namespaces.yaml', 'kedge.yaml'];
    assert.equal(base.length, manifests.filter(([file]) => files.includes(file)).length);
    const more = built(overlay);
    assert.equal(more.length, base.length + 2);
    const args = more.find(({ kind }) => kind === 'Deployment')!.spec!.template!.spec.containers[0]!.args!;
    assert.deepEqual(args.slice(-2), [
      '--kedge_dynamic_routings_enabled=true',
      '--discovery_external_domain_suffix=us1.prod.clusters.local',
    ]);
  });
});
