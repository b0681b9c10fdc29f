/** ASN.1 DER certificates one after the other, as the Workload API has them, as PEM. */
export function certificatesPem(der: Buffer): string {
  let text = '';
  for (let at = 0; at < der.length; ) {
    const end = at + lengthOf(der, at);
    text += pem('CERTIFICATE', der.subarray(at, end));
    at = end;
  }
  return text;
}

/** A PKCS#8 key. */
export function keyPem(der: Buffer): string {
  return pem('PRIVATE KEY', der);
}

function pem(label: string, der: Buffer): string {
  const lines = der.toString('base64').replace(/.{64}/g, '$&\n').trimEnd();
  return `-----BEGIN ${label}-----\n${lines}\n-----END ${label}-----\n`;
}

/** Of the SEQUENCE at `at`, with its header (X.690 §8.1.3). */
function lengthOf(der: Buffer, at: number): number {
  const [tag, first] = [der[at], der[at + 1]];
  if (tag !== 0x30 || first === undefined) throw new TypeError('not a DER certificate');
  if (first < 0x80) return checked(der, at, 2 + first);
  const octets = first & 0x7f;
  if (octets === 0 || octets > 4 || at + 2 + octets > der.length) throw new TypeError('not a DER certificate');
  return checked(der, at, 2 + octets + der.readUIntBE(at + 2, octets));
}

function checked(der: Buffer, at: number, length: number): number {
  if (at + length > der.length) throw new TypeError('a DER certificate is cut off');
  return length;
}
