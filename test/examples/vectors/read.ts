import { readFileSync } from 'node:fs';

/** A file of this folder, with the words in braces filled in. */
export function vectors<T>(name: string, words: Readonly<Record<string, string>> = {}): T {
  const text = readFileSync(new URL(`${name}.json`, import.meta.url), 'utf8');
  return JSON.parse(fill(text, words)) as T;
}

export function fill(text: string, words: Readonly<Record<string, string>>): string {
  return text.replace(/(?<!\$)\{(\w+)\}/g, (whole, word: string) => words[word] ?? whole);
}
