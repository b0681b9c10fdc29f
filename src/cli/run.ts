import { readFileSync } from 'node:fs';
import { inspect } from 'node:util';
import { isKedgeError } from '../support/errors.ts';
import { check } from './check.ts';
import { type Command, HELP, parse } from './options.ts';

/** Two folders up from the source, and from what is built of it. */
const PACKAGE = new URL('../../package.json', import.meta.url);

/**
 * The exit status: 0 where the target can be reached (explain: where it is understood; load: where what was expected holds), 1
 * otherwise, 2 for a wrong command.
 */
export async function run(args: readonly string[]): Promise<number> {
  let command: Command;
  try {
    command = parse(args);
  } catch (error) {
    console.error(`kedge-dialer: ${(error as Error).message}`);
    console.error("Try 'kedge-dialer --help'.");
    return 2;
  }
  if (command.is === 'help') {
    console.log(HELP);
    return 0;
  }
  if (command.is === 'version') {
    const { version } = JSON.parse(readFileSync(PACKAGE, 'utf8')) as { version: string };
    console.log(version);
    return 0;
  }
  const { dialers, target, wire, json, warnings } = command;
  const dialer = dialers[0]!;
  for (const warning of warnings) console.error(`warning: ${warning}`);
  try {
    if (command.is === 'load') {
      const { load } = await import('./load.ts');
      const stop = new AbortController();
      process.once('SIGINT', () => stop.abort());
      const report = await load(dialers, target, wire, command.plan, stop.signal);
      console.log(json ? JSON.stringify(report, null, 2) : inspect(report));
      return report.ok ? 0 : 1;
    }
    const explanation = dialer.explain(target, { wire });
    if (command.is === 'explain') {
      console.log(json ? JSON.stringify(explanation, null, 2) : inspect(explanation));
      return 0;
    }
    const report = await check(dialer, target, wire, command.path);
    console.log(
      json ? JSON.stringify({ explanation, ...report }, null, 2) : `${inspect(explanation)}\n${inspect(report)}`,
    );
    return report.ok ? 0 : 1;
  } catch (error) {
    if (!isKedgeError(error)) throw error;
    const { code, message, stage } = error;
    if (json) console.log(JSON.stringify({ ok: false, error: { code, stage, message } }, null, 2));
    else console.error(`${code}: ${message}`);
    return 1;
  } finally {
    await Promise.all(dialers.map((each) => each.destroy()));
  }
}
