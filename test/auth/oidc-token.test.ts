import assert from 'node:assert/strict';
import { readFile, stat, writeFile } from 'node:fs/promises';
import http from 'node:http';
import type { AddressInfo } from 'node:net';
import { join } from 'node:path';
import { describe, it, type TestContext } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { decodeJwt } from 'jose';
import { Provider } from 'oidc-provider';
import { Bearer } from '../../src/auth/bearer.ts';
import { type OidcTokenOptions, oidcToken, type TokenSource } from '../../src/index.ts';
import { tempDir } from '../helpers/temp.ts';

const REDIRECT = 'http://127.0.0.1:9/callback';
const RESOURCE = 'https://kedge.example.com';

interface TestProvider {
  readonly issuer: string;
  /** Requests to the token endpoint. */
  tokenRequests: number;
  /** How long its answers take when it has done its work. */
  slowMs: number;
  /** Answers in place of the provider. */
  intercept: ((response: http.ServerResponse) => void) | undefined;
  close(): Promise<void>;
}

/** A certified OpenID provider in this process. */
async function startProvider(t: TestContext, refreshLifeSeconds = 3600): Promise<TestProvider> {
  let handle: http.RequestListener = () => {};
  const server = http.createServer((request, response) => {
    if (request.url === '/token') provider.tokenRequests += 1;
    if (provider.slowMs > 0) {
      const end = response.end.bind(response) as (...args: unknown[]) => http.ServerResponse;
      response.end = ((...args: unknown[]) => {
        setTimeout(end, provider.slowMs, ...args);
        return response;
      }) as never;
    }
    if (provider.intercept !== undefined) provider.intercept(response);
    else handle(request, response);
  });
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
  const issuer = `http://127.0.0.1:${(server.address() as AddressInfo).port}`;
  const secret = { client_secret: 'client-secret', token_endpoint_auth_method: 'client_secret_post' as const };
  const oidc = new Provider(issuer, {
    clients: [
      {
        client_id: 'robot',
        ...secret,
        grant_types: ['client_credentials'],
        redirect_uris: [],
        response_types: [],
      },
      {
        client_id: 'laptop',
        ...secret,
        grant_types: ['authorization_code', 'refresh_token'],
        redirect_uris: [REDIRECT],
        application_type: 'native',
      },
    ],
    features: {
      clientCredentials: { enabled: true },
      devInteractions: { enabled: true },
      resourceIndicators: {
        enabled: true,
        defaultResource: () => RESOURCE,
        getResourceServerInfo: () => ({ scope: 'call', accessTokenFormat: 'jwt', jwt: { sign: { alg: 'RS256' } } }),
      },
    },
    scopes: ['openid', 'offline_access', 'call'],
    rotateRefreshToken: true,
    cookies: { keys: ['cookie-key'] },
    ttl: { ClientCredentials: 600, AccessToken: 600, IdToken: 600, RefreshToken: refreshLifeSeconds },
  });
  handle = oidc.callback();
  const close = async () => {
    server.closeAllConnections();
    if (server.listening) await new Promise((resolve) => server.close(resolve));
  };
  t.after(close);
  const provider: TestProvider = { issuer, tokenRequests: 0, slowMs: 0, intercept: undefined, close };
  return provider;
}

/** Logs in as a browser would: follows redirects, keeps cookies, fills in the forms. */
async function browse(start: URL): Promise<URL> {
  const cookies = new Map<string, string>();
  let url = start;
  let form: URLSearchParams | undefined;
  for (let i = 0; i < 20; i += 1) {
    const response = await fetch(url, {
      method: form === undefined ? 'GET' : 'POST',
      ...(form === undefined ? {} : { body: form }),
      headers: { cookie: [...cookies].map(([name, value]) => `${name}=${value}`).join('; ') },
      redirect: 'manual',
    });
    for (const cookie of response.headers.getSetCookie()) {
      const [, name, value] = /^([^=]+)=([^;]*)/.exec(cookie)!;
      cookies.set(name!, value!);
    }
    const location = response.headers.get('location');
    const html = await response.text();
    if (location !== null) {
      url = new URL(location, url);
      form = undefined;
      if (url.href.startsWith(REDIRECT)) return url;
      continue;
    }
    const [, action] =
      /<form[^>]* action="([^"]+)"/.exec(html) ?? assert.fail(`${response.status} ${html.slice(0, 500)}`);
    url = new URL(action!, url);
    const [, prompt] = /name="prompt" value="([^"]+)"/.exec(html)!;
    form = new URLSearchParams({ prompt: prompt!, login: 'ada', password: 'x' });
  }
  throw new Error('too many steps');
}

const unavailable = async (source: TokenSource, message: RegExp) => {
  const wait = new Bearer(source).wait(new AbortController().signal);
  await assert.rejects(wait, (error: Error & { code: string }) => {
    assert.equal(error.code, 'ERR_KEDGE_TOKEN_UNAVAILABLE');
    assert.match(error.message, message);
    assert.doesNotMatch(error.message, /client-secret/);
    return true;
  });
};

describe('oidcToken', () => {
  const robot = (issuer: string): OidcTokenOptions => ({
    issuer,
    clientId: 'robot',
    clientSecret: 'client-secret',
    scopes: ['call'],
  });

  it('gets a token of its own with client credentials, once', async (t) => {
    const provider = await startProvider(t);
    const source = oidcToken(robot(provider.issuer));
    const tokens = await Promise.all(Array.from({ length: 1000 }, () => source.token()));
    assert.equal(new Set(tokens).size, 1);
    assert.equal(provider.tokenRequests, 1);
    const { aud, iss, scope } = decodeJwt(tokens[0]!);
    assert.deepEqual([aud, iss, scope], [RESOURCE, provider.issuer, 'call']);
    source.invalidate!();
    assert.notEqual(await source.token(), tokens[0]);
    await unavailable(oidcToken({ ...robot(provider.issuer), use: 'id_token' }), /gave no id token/);
  });

  it('says why there is none: wrong secret, provider down, slow, or answering HTML', async (t) => {
    const provider = await startProvider(t);
    await unavailable(oidcToken({ ...robot(provider.issuer), clientSecret: 'wrong' }), /answered invalid_client/);
    provider.intercept = (response) => response.setHeader('content-type', 'text/html').end('<h1>Sorry</h1>');
    await unavailable(oidcToken(robot(provider.issuer)), /the provider gave no token \(/);
    const waiting: http.ServerResponse[] = [];
    provider.intercept = (response) => waiting.push(response);
    await unavailable(oidcToken({ ...robot(provider.issuer), deadlineMs: 200 }), /no token within 200 ms/);
    assert.equal(waiting.length, 1);
    await provider.close();
    await unavailable(oidcToken(robot(provider.issuer)), /the provider gave no token \(/);
  });

  it('heals when the provider is back', async (t) => {
    const provider = await startProvider(t);
    const source = oidcToken(robot(provider.issuer));
    provider.intercept = (response) => response.writeHead(503).end();
    await unavailable(source, /no token/);
    provider.intercept = undefined;
    await new Promise((resolve) => setTimeout(resolve, 300));
    assert.ok(await source.token());
  });

  it('lets somebody log in, keeps the rotated refresh token, and logs in again when it is refused', async (t) => {
    const provider = await startProvider(t);
    const cacheFile = join(await tempDir(t), 'deep', 'refresh.json');
    let logins = 0;
    const options: OidcTokenOptions = {
      issuer: provider.issuer,
      clientId: 'laptop',
      clientSecret: 'client-secret',
      grant: 'refresh_token',
      scopes: ['openid', 'offline_access'],
      cacheFile,
      redirectUri: REDIRECT,
      login: (url) => {
        logins += 1;
        return browse(url);
      },
    };
    const source = oidcToken(options);
    const first = await source.token();
    assert.equal(decodeJwt(first).sub, 'ada');
    assert.equal((await stat(cacheFile)).mode & 0o777, 0o600);
    const kept = await readFile(cacheFile, 'utf8');
    source.invalidate!();
    assert.equal(decodeJwt(await source.token()).sub, 'ada');
    assert.notEqual(await readFile(cacheFile, 'utf8'), kept, 'the provider rotates it');
    assert.equal(decodeJwt(await oidcToken({ ...options, login: undefined as never }).token()).sub, 'ada');
    assert.equal(logins, 1, 'the next process takes it from the file');
    // A refresh token that was used before is refused, and takes its whole family along.
    await writeFile(cacheFile, kept);
    assert.equal(decodeJwt(await oidcToken(options).token()).sub, 'ada');
    assert.equal(logins, 2);
    await writeFile(cacheFile, 'no JSON');
    const { login, ...without } = options;
    await unavailable(oidcToken(without), /no refresh token, and no `login`/);
    await unavailable(oidcToken({ ...without, refreshToken: 'revoked' }), /refused the refresh token: invalid_grant/);
  });

  const laptop = (provider: TestProvider) => {
    const seen = { logins: 0 };
    const options: OidcTokenOptions = {
      issuer: provider.issuer,
      clientId: 'laptop',
      clientSecret: 'client-secret',
      grant: 'refresh_token',
      scopes: ['openid', 'offline_access'],
      redirectUri: REDIRECT,
      login: (url) => {
        seen.logins += 1;
        return browse(url);
      },
    };
    return { options, seen };
  };

  it('uses no refresh token twice: neither while it is being used nor when its answer came too late', async (t) => {
    const provider = await startProvider(t);
    const { options, seen } = laptop(provider);
    const source = oidcToken(options);
    await source.token();
    provider.slowMs = 150;
    // Refused while it is refreshed, several times: each grant waits for the one before it.
    const tokens: Promise<string>[] = [];
    for (let i = 0; i < 4; i += 1) {
      source.invalidate!();
      tokens.push(source.token());
      await sleep(30);
    }
    for (const token of await Promise.all(tokens)) assert.equal(decodeJwt(token).sub, 'ada');
    assert.equal(seen.logins, 1, 'the provider revoked nothing');
    // The provider has rotated it, and answers later than anybody waits.
    const abort = new AbortController();
    for (let i = 0; i < 3; i += 1) {
      source.invalidate!();
      const waiting = source.token(abort.signal);
      await sleep(20);
      if (i === 2) abort.abort(new Error('gone'));
      waiting.catch(() => {});
    }
    assert.equal(decodeJwt(await source.token()).sub, 'ada');
    assert.equal(seen.logins, 1);
  });

  it('waits for an answer that missed its deadline before it asks again', async (t) => {
    const provider = await startProvider(t);
    const { options, seen } = laptop(provider);
    const cacheFile = join(await tempDir(t), 'refresh.json');
    await oidcToken({ ...options, cacheFile }).token();
    const source = oidcToken({ ...options, cacheFile, deadlineMs: 400 });
    await source.token();
    provider.slowMs = 600;
    source.invalidate!();
    await assert.rejects(source.token(), /no token within 400 ms/);
    provider.slowMs = 0;
    source.invalidate!();
    assert.equal(decodeJwt(await source.token()).sub, 'ada');
    assert.equal(seen.logins, 1);
  });

  it('sends nobody to log in again who took longer than a call waits, without a refresh token either', async (t) => {
    const provider = await startProvider(t);
    const { options, seen } = laptop(provider);
    const login: OidcTokenOptions['login'] = async (url, signal) => {
      await sleep(900);
      return options.login!(url, signal);
    };
    const source = oidcToken({ ...options, scopes: ['openid'], login, deadlineMs: 700 });
    await assert.rejects(source.token(), /no token within 700 ms/);
    await sleep(1500);
    assert.equal(decodeJwt(await source.token()).sub, 'ada');
    assert.equal(seen.logins, 1);
    // It is given once: what was refused is not given again.
    source.invalidate!();
    await assert.rejects(source.token(), /no token within 700 ms/);
  });

  it('takes what another process left in the file for newer than what it has itself', async (t) => {
    const provider = await startProvider(t);
    const { options, seen } = laptop(provider);
    const cacheFile = join(await tempDir(t), 'refresh.json');
    const [one, two] = [oidcToken({ ...options, cacheFile }), oidcToken({ ...options, cacheFile })];
    await one.token();
    const { refresh_token: first } = JSON.parse(await readFile(cacheFile, 'utf8')) as { refresh_token: string };
    for (const source of [two, one, two, one]) {
      source.invalidate!();
      assert.equal(decodeJwt(await source.token()).sub, 'ada');
    }
    // A process that is started with the one it was once configured with.
    assert.equal(decodeJwt(await oidcToken({ ...options, refreshToken: first, cacheFile }).token()).sub, 'ada');
    assert.equal(seen.logins, 1);
    // A file that cannot be written costs nothing while the process lives.
    const nowhere = oidcToken({ ...options, cacheFile: join(cacheFile, 'file-in-a-file') });
    await nowhere.token();
    nowhere.invalidate!();
    assert.equal(decodeJwt(await nowhere.token()).sub, 'ada');
    assert.equal(seen.logins, 2);
  });

  it('refuses options that cannot work', () => {
    const good = { issuer: 'https://id.example.com', clientId: 'x' };
    for (const wrong of [
      { issuer: 'http://id.example.com' },
      { issuer: 'id' },
      { clientId: '' },
      { grant: 'password' },
      { use: 'token' },
      { login: browse },
    ]) {
      assert.throws(() => oidcToken({ ...good, ...wrong } as OidcTokenOptions), { code: 'ERR_KEDGE_OPTIONS' });
    }
  });
});
