/**
 * Code for a process of its own: `snapshot()` of the language's built-in objects, and what has `changed()` since, by path.
 */
export const INTRINSICS = `
  const snapshot = () => {
    const found = new Map();
    const seen = new Set();
    const walk = (object, path, depth) => {
      if (depth > 3 || seen.has(object)) return;
      seen.add(object);
      for (const key of Reflect.ownKeys(object)) {
        const descriptor = Object.getOwnPropertyDescriptor(object, key);
        found.set(path + '.' + String(key), { object, key, descriptor });
        const { value } = descriptor;
        if (value !== null && (typeof value === 'object' || typeof value === 'function')) walk(value, path + '.' + String(key), depth + 1);
      }
    };
    // Lazy ones of Node, such as fetch, would be loaded by looking at them: the language's own are what counts.
    for (const name of ['Object', 'Function', 'Reflect', 'Promise', 'Symbol', 'Array', 'Map', 'Set', 'Proxy', 'Error', 'JSON']) walk(globalThis[name], name, 0);
    return found;
  };
  const changed = (before) => {
    const names = [...before].filter(([, { object, key, descriptor }]) => {
      const now = Object.getOwnPropertyDescriptor(object, key);
      return now === undefined || Reflect.ownKeys(descriptor).some((field) => !Object.is(descriptor[field], now[field]));
    });
    return names.map(([name]) => name).concat([...snapshot().keys()].filter((name) => !before.has(name)));
  };
`;
