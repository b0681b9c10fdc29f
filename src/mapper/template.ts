import { KedgeError, quote } from '../support/errors.ts';
import { isIP, parseTarget } from '../target.ts';

/** A kedge URL with `${group}` in its host or as its port. */
export interface Template {
  readonly groups: ReadonlySet<string>;
  /** Whether a group decides (part of) the host. */
  readonly hasHostGroup: boolean;
  /** Labels at the end of the host that no group touches. */
  readonly literalLabels: number;
  /**
   * The URL with the groups' values.
   *
   * @throws {@link KedgeError} `ERR_KEDGE_ROUTE` when host or port come out as anything but a name and a port
   */
  expand(value: (group: string) => string): string;
}

const SHAPE = /^(https?):\/\/((?:[^/:?#@\\[\]${}]|\$\{\w+\})+)(?::(\$\{\w+\}|[0-9]+))?\/?$/;
const GROUP = /\$\{(\w+)\}/g;
const PORT = /^[1-9][0-9]{0,4}$/;

/** @throws {@link KedgeError} `ERR_KEDGE_ROUTE` */
export function template(url: string): Template {
  const shape = SHAPE.exec(url);
  if (shape === null) {
    throw new KedgeError(
      'ERR_KEDGE_ROUTE',
      `regexp: \`url\` ${quote(url)} is not like https://\${group}.kedge.example.com:443`,
    );
  }
  const [, scheme, host, port = ''] = shape as unknown as [string, string, string, string | undefined];
  const hasHostGroup = host.includes('${');
  const labels = host.split('.');
  const lastGroup = labels.findLastIndex((label) => label.includes('${'));
  return {
    groups: new Set([...`${host}:${port}`.matchAll(GROUP)].map(([, group]) => group!)),
    hasHostGroup,
    literalLabels: labels.length - 1 - lastGroup,
    expand: (value) => {
      const fill = (text: string) => text.replace(GROUP, (_, group: string) => value(group));
      const [ownHost, ownPort] = [fill(host), fill(port)];
      if (hasHostGroup) checkHost(ownHost);
      if (ownPort !== '' && (!PORT.test(ownPort) || Number(ownPort) > 65_535))
        throw refuse(`the captured port ${quote(ownPort)} is not a number from 1 to 65535`);
      return `${scheme}://${ownHost}${ownPort === '' ? '' : `:${ownPort}`}`;
    },
  };
}

function checkHost(host: string): void {
  try {
    const target = parseTarget(host);
    // What a capture adds must be read as it is written, and an IP address must have been meant.
    if (target.hostname === host.toLowerCase() && !isIP(target)) return;
  } catch (cause) {
    throw refuse(`the kedge's name came out as ${quote(host)}`, cause);
  }
  throw refuse(`the kedge's name came out as ${quote(host)}`);
}

function refuse(reason: string, cause?: unknown): KedgeError {
  return new KedgeError('ERR_KEDGE_ROUTE', `regexp: ${reason}`, { stage: 'map', cause });
}
