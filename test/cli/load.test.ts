import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { describe, it, type TestContext } from 'node:test';
import { fileURLToPath } from 'node:url';
import { loadPlan } from '../../src/cli/load-options.ts';
import { Histogram, type LoadReport, noTimes, reportOf } from '../../src/cli/load-report.ts';
import { startGrpcKedge } from '../helpers/grpc-kedge.ts';
import { KEDGE_NAME, startKedge, type TestKedge } from '../helpers/kedge.ts';
import { runNode } from '../helpers/process.ts';
import { random } from '../helpers/random.ts';
import { tempDir } from '../helpers/temp.ts';

const MAIN = fileURLToPath(new URL('../../src/cli/main.ts', import.meta.url));

async function flagsFor(t: TestContext, ...kedges: TestKedge[]): Promise<string[]> {
  const dir = await tempDir(t);
  const { client, ca } = kedges[0]!;
  for (const [name, content] of Object.entries({ cert: client.cert, key: client.key, ca: ca.cert }))
    await writeFile(join(dir, name), content);
  const tls = ['cert', 'key', 'ca'].map((name) => `--${name}=${join(dir, name)}`);
  return [`--kedge=${kedges.map(({ url }) => url).join(',')}`, `--server-name=${KEDGE_NAME}`, ...tls];
}

async function load(...args: string[]): Promise<{ status: number | null; out: string; report: Printed }> {
  const { status, out } = await runNode([MAIN, 'load', ...args, '--json']);
  assert.ok(out.startsWith('{'), out);
  return { status, out, report: JSON.parse(out) };
}

/** As JSON, percentiles are numbers. */
interface Printed extends Omit<LoadReport, 'kedges'> {
  kedges: Record<string, Record<string, Record<string, number>>>;
}

describe('kedge-dialer load', () => {
  it('calls each kedge in turn at the rate, and shows every stage', async (t) => {
    const kedges = [await startKedge(t), await startKedge(t)];
    const flags = await flagsFor(t, ...kedges);
    const { status, report } = await load(
      'http://a.us1:8080',
      ...flags,
      '--path=/health?x=1',
      '--method=put',
      '--data=c3a9',
      '--rate=40',
      '--duration=1s',
      '--expect=errors<0.1%,errors<=0, rate>5',
      '--expect=p50<9s,first.p99.9<9s,tls.max<9s',
    );
    assert.deepEqual([status, report.ok, report.sent, report.answered, report.failed], [0, true, 40, 40, 0]);
    assert.equal(report.expectations.length, 6);
    for (const kedge of kedges) {
      assert.equal(kedge.seen.filter(({ path, method }) => path === '/health?x=1' && method === 'PUT').length, 20);
      const { dns, tcp, tls, first, total } = report.kedges[new URL(kedge.url).host]!;
      assert.deepEqual([dns!['count'], first!['count'], total!['count']], [0, 20, 20]);
      assert.ok(tcp!['count']! >= 1 && tls!['count']! >= 1);
      assert.ok(first!['p50']! > 0 && first!['p50']! <= total!['max']! && total!['p50']! <= total!['p99.9']!);
    }
  });

  it('shows a second without answers in everything that it kept waiting', async (t) => {
    let from = Number.POSITIVE_INFINITY;
    const kedge = await startKedge(t, {
      handler: (_request, response) => {
        const now = performance.now();
        // It begins with the 50th call.
        if (kedge.seen.length === 50) from = now;
        const left = from + 1000 - now;
        if (left > 0 && left <= 1000) setTimeout(() => response.end(), left);
        else response.end();
      },
    });
    const { status, report } = await load(
      'http://a.us1',
      ...(await flagsFor(t, kedge)),
      '--rate=50',
      '--duration=3s',
      '--expect=p99<500ms',
    );
    assert.deepEqual([report.sent, report.answered], [150, 150]);
    const { tcp, tls, total } = report.kedges[new URL(kedge.url).host]!;
    assert.ok(tls!['count']! > 1, 'a connection a second');
    assert.equal(tls!['count'], tcp!['count'], 'resumed ones too');
    // A loop that waits for its answers would have one call that took long, of some hundred.
    assert.ok(total!['p90']! > 500 && total!['p99']! > 850, JSON.stringify(total));
    assert.equal(status, 1);
    assert.deepEqual([report.ok, report.expectations[0]!.ok], [false, false]);
  });

  it('goes on while nothing comes back, and says what went wrong', async (t) => {
    const kedge = await startKedge(t, {
      handler: (request, response) => {
        if (request.url === '/none') return;
        response.statusCode = kedge.seen.length % 2 === 0 ? 503 : 200;
        response.end('x');
      },
    });
    const flags = await flagsFor(t, kedge);
    const common = ['http://a.us1', ...flags, '--rate=30', '--duration=1s'];
    const silent = await load(...common, '--path=/none', '--timeout=400ms', '--expect=errors<=30');
    assert.equal(silent.status, 0);
    assert.equal(silent.report.sent, 30);
    assert.deepEqual(silent.report.failures, { 'no answer within 400 ms': 30 });
    assert.ok(silent.report.kedges[new URL(kedge.url).host]!['total']!['p50']! >= 390);
    const { status, out } = await runNode([MAIN, 'load', ...common, '--expect=errors<40%,p50<9s']);
    assert.equal(status, 1, out);
    assert.match(out, /^http:\/\/a\.us1: 30 calls in [\d.]+ s, 15 answered \([\d.]+\/s\), 15 failed\n/);
    assert.match(out, /\n {2}ms +count +p50 +p90 +p99 +p99\.9 +max\n127\.0\.0\.1:\d+\n/);
    assert.match(out, /\n {2}tls +\d+( +\d+\.\d\d){5}\n/);
    assert.match(out, /\n +15 x status 503\nFAIL errors<40%: 50%\nok {3}p50<9s: [\d.]+ms\n$/);
  });

  it('calls gRPC with the bytes it is given', async (t) => {
    const kedge = await startGrpcKedge(t);
    const flags = await flagsFor(t, kedge);
    const message = join(await tempDir(t), 'message');
    await writeFile(message, '{"text":"hi"}');
    const common = ['a.us1:90', ...flags, '--rate=20', '--duration=500ms'];
    const { status, report } = await load(
      ...common,
      '--grpc=test.Echo/Unary',
      `--data-file=${message}`,
      '--expect=errors<0.1%',
    );
    assert.deepEqual([status, report.answered, kedge.calls.length], [0, 10, 10]);
    assert.equal(kedge.calls[0]!.authority, 'a.us1:90');
    assert.equal(report.kedges[new URL(kedge.url).host]!['first']!['count'], 10);
    const unknown = await load(...common, '--grpc=test.Echo/None', '--expect=errors<0.1%');
    assert.equal(unknown.status, 1);
    const [[what, count] = []] = Object.entries(unknown.report.failures);
    assert.deepEqual([/^grpc UNIMPLEMENTED: /.test(what!), count], [true, 10]);
  });

  it('prints what there is when it is interrupted', { timeout: 60_000 }, async (t) => {
    const kedge = await startKedge(t);
    const args = [MAIN, 'load', 'http://a.us1', ...(await flagsFor(t, kedge)), '--duration=10m', '--rate=20'];
    const { NODE_TEST_CONTEXT: _, ...env } = process.env;
    const child = spawn(process.execPath, args, { env, stdio: ['ignore', 'pipe', 'inherit'] });
    t.after(() => child.kill('SIGKILL'));
    let out = '';
    child.stdout.setEncoding('utf8').on('data', (text: string) => {
      out += text;
    });
    while (kedge.seen.length < 25) await new Promise((resolve) => setTimeout(resolve, 20));
    child.kill('SIGINT');
    const [status] = await once(child, 'close');
    assert.equal(status, 0, out);
    assert.match(out, /^http:\/\/a\.us1: \d+ calls in [\d.]+ s, [1-9]\d* answered/);
  });

  it('says what is wrong with its options', async () => {
    const cases: [string[], RegExp][] = [
      [[], /load takes one target/],
      [['http://a', 'http://b'], /load takes one target/],
      [['http://a'], /says where calls go/],
      [['http://a', '--rate=0'], /`--rate` is a whole number of calls a second from 1/],
      [['http://a', '--rate=1.5'], /`--rate`/],
      [['http://a', '--duration=1h'], /`--duration` is a time such as/],
      [['http://a', '--timeout=0s'], /`--timeout` is a time such as/],
      [['http://a', '--timeout=99999m'], /`--timeout` is a time such as/],
      [['http://a', '--data-file=/nowhere'], /ENOENT.*\/nowhere/],
      [['http://a', '--data=abc'], /`--data` is hexadecimal/],
      [['http://a', '--data=ab', '--data-file=x'], /not with --data-file/],
      [['a:1', '--grpc=Method'], /`--grpc` is package.Service\/Method/],
      [['a:1', '--grpc=a.B/C', '--path=/x'], /`--path` is for HTTP alone/],
      [['http://a', '--expect=p99<50'], /`--expect` is like p99<50ms/],
      [['http://a', '--expect=p99<50ms,errors<1ms'], /`--expect`/],
      [['http://a', '--expect=tls.errors<1'], /`--expect`/],
      [['http://a', '--what'], /Unknown option '--what'/],
    ];
    await Promise.all(
      cases.slice(0, 3).map(async ([args, message]) => {
        const { status, out } = await runNode([MAIN, 'load', ...args]);
        assert.equal(status, 2, out);
        assert.match(out, message);
      }),
    );
    const { parse } = await import('../../src/cli/options.ts');
    for (const [args, message] of cases) assert.throws(() => parse(['load', ...args]), message, args.join(' '));
  });
});

describe('the histogram of load', () => {
  it('is within 0.8 % above the true percentile, whatever was recorded', () => {
    const seed = Number(process.env['KEDGE_TEST_SEED'] ?? Date.now() % 1e9);
    const next = random(seed);
    for (let round = 0; round < 200; round += 1) {
      const histogram = new Histogram();
      const values = Array.from({ length: 1 + Math.floor(next() * 500) }, () => Math.round(10 ** (next() * 8)) / 1000);
      for (const value of values) histogram.record(value);
      values.sort((one, other) => one - other);
      for (const percent of [1, 50, 90, 99, 99.9, 100]) {
        const exact = values[Math.ceil((values.length * percent) / 100) - 1]!;
        const found = histogram.percentile(percent);
        assert.ok(
          found >= exact && found <= exact * 1.008 + 0.001,
          `${percent} of seed ${seed}: ${found} for ${exact}`,
        );
      }
      assert.deepEqual([histogram.count, histogram.max], [values.length, values.at(-1)]);
    }
  });

  it('expects nothing of what did not happen', () => {
    const plan = loadPlan({ expect: ['dns.p50<1s', 'p50<1s', 'errors<1', 'rate>=0'] });
    const tally = {
      sent: 0,
      answered: 0,
      failures: new Map(),
      unanswered: 0,
      tookMs: 1,
      kedges: new Map(),
      all: noTimes(),
    };
    const { ok, expectations } = reportOf('x', plan, tally);
    assert.equal(ok, false);
    assert.deepEqual(
      expectations.map(({ ok, found }) => `${ok} ${found}`),
      ['false nothing', 'false nothing', 'true 0', 'true 0'],
    );
  });
});
