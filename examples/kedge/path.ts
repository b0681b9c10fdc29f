/**
 * What two parsers may read differently: a slash or backslash that is escaped, an empty segment, one of dots (with parameters
 * too, which some cut off first), and characters that no path has.
 */
const AMBIGUOUS = /\\|\/\/|;|(?:^|\/)\.{1,2}(?:\/|$)|[\p{Cc}#]/u;

/** The path of a request target as Go's `URL.Path`: decoded, without the query. Undefined when it could be read in two ways. */
export function decodedPath(target: string): string | undefined {
  const query = target.indexOf('?');
  const path = query === -1 ? target : target.slice(0, query);
  if (/%2f/i.test(path)) return undefined;
  let decoded: string;
  try {
    decoded = path.includes('%') ? decodeURIComponent(path) : path;
  } catch {
    return undefined;
  }
  return AMBIGUOUS.test(decoded) ? undefined : decoded;
}
