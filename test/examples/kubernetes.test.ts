import assert from 'node:assert/strict';
import { readdirSync, readFileSync } from 'node:fs';
import { describe, it } from 'node:test';
import * as certManager from '@kubernetes-models/cert-manager/cert-manager.io/v1';
import * as apps from 'kubernetes-models/apps/v1';
import * as autoscaling from 'kubernetes-models/autoscaling/v2';
import * as networking from 'kubernetes-models/networking.k8s.io/v1';
import * as policy from 'kubernetes-models/policy/v1';
import * as rbac from 'kubernetes-models/rbac.authorization.k8s.io/v1';
import * as core from 'kubernetes-models/v1';
import { parseAllDocuments } from 'yaml';
import { readConfig } from '../../examples/kedge/config.ts';

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

interface Manifest {
  apiVersion: string;
  kind: string;
  metadata: { name: string; namespace?: string };
  data?: Record<string, string>;
}

const folder = new URL('../../examples/kubernetes/', import.meta.url);
const manifests = readdirSync(folder)
  .sort()
  .flatMap((file) =>
    parseAllDocuments(readFileSync(new URL(file, folder), 'utf8'), { uniqueKeys: true }).map((document) => {
      assert.deepEqual(document.errors, [], file);
      return [file, document.toJS() as Manifest] as const;
    }),
  );

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
    const { data } = manifests.find(([, { kind }]) => kind === 'ConfigMap')![1];
    const [director, pool] = ['director.json', 'backendpool.json'].map((file) => ({ file, text: data![file]! }));
    assert.equal(readConfig(director!, pool!).http.backends.size, 1);
    const main = readFileSync(new URL('../../examples/kedge/main.ts', import.meta.url), 'utf8');
    const flags = readFileSync(new URL('kedge.yaml', folder), 'utf8').match(/--[a-z_]+(?==)/g)!;
    assert.ok(flags.length > 8);
    for (const flag of flags) assert.ok(main.includes(`${flag.slice(2)}:`), flag);
  });
});
