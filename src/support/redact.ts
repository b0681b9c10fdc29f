import { inspect } from 'node:util';

/** Makes `console.log()`, `util.inspect()` and `JSON.stringify()` show `text` where they would show a secret inside. */
export function hide(holder: object, text: string): void {
  Object.defineProperties(holder, {
    [inspect.custom]: { value: () => text },
    toJSON: { value: () => text },
  });
}
