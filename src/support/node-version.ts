/** As `engines` of package.json says. */
const NEEDED = [22, 19] as const;

/** Why this Node.js cannot run the package, if it cannot. */
export function unfitNode(): string | undefined {
  const [major = 0, minor = 0] = process.versions.node.split('.').map(Number);
  if (major > NEEDED[0] || (major === NEEDED[0] && minor >= NEEDED[1])) return undefined;
  return `kedge-dialer: needs Node.js ${NEEDED.join('.')} or later; this is ${process.versions.node}`;
}
