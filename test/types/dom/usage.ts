// With the DOM library `RequestInit` has no `dispatcher`: these users have `dialer.fetch` and `dialer.install()`.
import { createDialer, single } from 'kedge-dialer';

export async function dom(): Promise<string> {
  await using dialer = createDialer({ mapper: single('https://kedge.example.com') });
  const restore: () => void = dialer.install();
  const response: Response = await dialer.fetch(new Request('http://orders.shop.us1/'), {
    method: 'POST',
    body: new URLSearchParams({ a: 'b' }),
    signal: AbortSignal.timeout(1000),
  });
  restore();
  document.body.textContent = await response.text();
  return (await (await fetch('http://orders.shop.us1/')).json()) as string;
}
