/** The fields of `X509SVID` (workload.proto) that make an identity, DER. */
export interface Svid {
  readonly spiffeId: string;
  readonly chain: Buffer;
  readonly key: Buffer;
  readonly bundle: Buffer;
}

/** Field numbers of workload.proto. */
const SVIDS = 1;
const [SPIFFE_ID, CHAIN, KEY, BUNDLE] = [1, 2, 3, 4];
/** Wire types of Protocol Buffers. */
const [VARINT, FIXED64, BYTES, FIXED32] = [0, 1, 2, 5];

/** The SVIDs of an `X509SVIDResponse`; fields that we do not use are skipped. Throws a `TypeError` for anything else. */
export function svidsOf(response: Buffer): Svid[] {
  return (fields(response).get(SVIDS) ?? []).map((message) => {
    const own = fields(message);
    const last = (field: number) => own.get(field)?.at(-1) ?? Buffer.alloc(0);
    return {
      spiffeId: last(SPIFFE_ID!).toString('utf8'),
      chain: last(CHAIN!),
      key: last(KEY!),
      bundle: last(BUNDLE!),
    };
  });
}

/** The length-delimited fields of a message. */
function fields(message: Buffer): Map<number, Buffer[]> {
  const found = new Map<number, Buffer[]>();
  let at = 0;
  const varint = (): number => {
    let value = 0;
    for (let shift = 0; shift < 64; shift += 7) {
      const byte = message[at];
      if (byte === undefined) break;
      at += 1;
      value += (byte & 0x7f) * 2 ** shift;
      if (byte < 0x80) return value;
    }
    throw new TypeError('a protobuf varint is cut off');
  };
  while (at < message.length) {
    const tag = varint();
    const [field, type] = [Math.floor(tag / 8), tag % 8];
    if (type === VARINT) varint();
    else if (type === FIXED64) at += 8;
    else if (type === FIXED32) at += 4;
    else if (type === BYTES) {
      const length = varint();
      if (at + length > message.length) throw new TypeError('a protobuf field is cut off');
      const values = found.get(field) ?? [];
      values.push(message.subarray(at, at + length));
      found.set(field, values);
      at += length;
    } else throw new TypeError(`protobuf wire type ${type}`);
  }
  return found;
}
