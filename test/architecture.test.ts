/** The house, as rules: what may only be done in one place, and how large a room may get. */
import assert from 'node:assert/strict';
import { globSync } from 'node:fs';
import path from 'node:path';
import { describe, it } from 'node:test';
import ts from 'typescript';

const ROOT = path.resolve(import.meta.dirname, '..');
const MAX_LINES = 350;
const MAX_FIELDS = 12;
const MAX_METHODS = 20;

/**
 * What decides over a call belongs to the engine: by file and class or type, the members that only src/engine may use.
 * `Bearer` waits for tokens, `Kedges` chooses endpoints, `failover` counts attempts.
 */
const ONLY_THE_ENGINE: readonly (readonly [file: string, type: string, members: readonly string[]])[] = [
  ['src/auth/bearer.ts', 'Bearer', ['peek', 'wait', 'invalidate']],
  ['src/kedge/kedges.ts', 'Kedges', ['choose', 'likely']],
  ['src/engine/endpoints.ts', 'Endpoints', ['next', 'add']],
  ['src/engine/attempts.ts', 'RetryBudget', ['spend']],
  ['src/options.ts', 'FAILOVER', ['attempts', 'retryBudget']],
];
/** Checks a token ahead of any call. */
const EXEMPT = ['src/auth/static-token.ts', 'src/options.ts'];

const files = globSync('src/**/*.ts', { cwd: ROOT }).sort();
const program = ts.createProgram(
  files.map((file) => path.join(ROOT, file)),
  { ...ts.parseJsonConfigFileContent(readConfig(), ts.sys, ROOT).options, noEmit: true },
);
const checker = program.getTypeChecker();
const sources = files.map((file) => [file, program.getSourceFile(path.join(ROOT, file))!] as const);

function readConfig(): object {
  return ts.readConfigFile(path.join(ROOT, 'tsconfig.json'), ts.sys.readFile).config;
}

function walk(node: ts.Node, visit: (node: ts.Node) => void): void {
  visit(node);
  node.forEachChild((child) => walk(child, visit));
}

/** The declarations of the members that only the engine may use, each found or the rule is out of date. */
function reserved(): Map<ts.Node, string> {
  const found = new Map<ts.Node, string>();
  for (const [file, type, members] of ONLY_THE_ENGINE) {
    const source = sources.find(([name]) => name === file)![1];
    for (const member of members) {
      let declaration: ts.Node | undefined;
      walk(source, (node) => {
        const isNamed = ts.isClassDeclaration(node) || ts.isVariableDeclaration(node);
        if (!isNamed || node.name?.getText() !== type) return;
        walk(node, (each) => {
          const isMember = ts.isClassElement(each) || ts.isPropertyAssignment(each);
          if (isMember && each.name?.getText() === member) declaration ??= each;
        });
      });
      assert.ok(declaration !== undefined, `${type}.${member} is in ${file}`);
      found.set(declaration, `${type}.${member}`);
    }
  }
  return found;
}

describe('the house', () => {
  it('has every wait for a token, choice of an endpoint, count of attempts and retry in src/engine', () => {
    const rules = reserved();
    const used = new Set<string>();
    const broken: string[] = [];
    for (const [file, source] of sources) {
      walk(source, (node) => {
        if (!ts.isPropertyAccessExpression(node) && !ts.isBindingElement(node)) return;
        const name = ts.isPropertyAccessExpression(node) ? node.name : (node.propertyName ?? node.name);
        const symbol = ts.isPropertyAccessExpression(node)
          ? checker.getSymbolAtLocation(name)
          : checker.getTypeAtLocation(node.parent).getProperty(name.getText());
        for (const declaration of symbol?.declarations ?? []) {
          const rule = rules.get(declaration);
          if (rule === undefined) continue;
          if (file.startsWith('src/engine/')) used.add(rule);
          else if (!EXEMPT.includes(file) && declaration.getSourceFile() !== source) broken.push(`${file}: ${rule}`);
        }
      });
    }
    assert.deepEqual(broken, []);
    assert.deepEqual(
      [...rules.values()].filter((rule) => !used.has(rule)),
      [],
      'the engine itself is seen to use them',
    );
  });

  it(`has no file over ${MAX_LINES} lines`, () => {
    const large = sources.filter(([, { text }]) => text.split('\n').length - 1 > MAX_LINES).map(([file]) => file);
    assert.deepEqual(large, []);
  });

  it(`has no class with more than ${MAX_FIELDS} fields or ${MAX_METHODS} methods without a reason in its docstring`, () => {
    const large: string[] = [];
    for (const [file, source] of sources) {
      walk(source, (node) => {
        if (!ts.isClassDeclaration(node)) return;
        const fields = node.members.filter((member) => ts.isPropertyDeclaration(member)).length;
        const methods = node.members.filter((member) => ts.isMethodDeclaration(member) || ts.isAccessor(member)).length;
        const hasReason = ts.getJSDocTags(node).some(({ tagName }) => tagName.text === 'remarks');
        if ((fields > MAX_FIELDS || methods > MAX_METHODS) && !hasReason) {
          large.push(`${file} ${node.name?.text}: ${fields} fields, ${methods} methods`);
        }
      });
    }
    assert.deepEqual(large, []);
  });
});
