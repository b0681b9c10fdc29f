/**
 * Runs the tests that depend on the Node line on each supported one: the HTTP wire (whose callers bring their own undici),
 * the gRPC wire, targets (whose URL parsers differ) and the import's silence.
 */
import { spawnSync } from 'node:child_process';

/** All of them, or those named as arguments. */
const LINES = process.argv.length > 2 ? process.argv.slice(2) : ['22', '24', '26'];
const TESTS = [
  'test/*.test.ts',
  'test/http/*.test.ts',
  'test/grpc/*.test.ts',
  'test/connect/*.test.ts',
  'test/identity/*.test.ts',
  'test/dial/*.test.ts',
  'test/kedge/*.test.ts',
  'test/wires/*.test.ts',
];

/**
 * Walks whose HTTP/2 servers run beside them and end sessions while calls arrive, which some lines abort the process for. Node
 * 22 does when DATA comes to a server for a stream that its closing session turned away ("Assertion failed:
 * onread->IsFunction()" in stream_base.cc); Node 26 does once in some twenty walks, on one side or the other, when it reads a
 * RST_STREAM ("current_nghttp2_memory_ >= previous_size" in node_http2.cc). Node 24 walks all of them, and further.
 */
const SKIPPED: Readonly<Record<string, string>> = {
  '22': 'one HTTP call, whatever happens|in whatever order things happen',
  '26': 'one HTTP call, whatever happens',
};

const failed = LINES.filter((line) => {
  console.log(`# Node ${line}`);
  const args = ['-y', '-p', `node@${line}`, 'node', 'test/run.ts'];
  const skipped = SKIPPED[line];
  if (skipped !== undefined) args.push(`--test-skip-pattern=${skipped}`);
  args.push(...TESTS);
  // The long tests are as long as they get in `npm test`.
  const env = {
    ...process.env,
    KEDGE_TEST_ABORTS: '10000',
    KEDGE_TEST_ROTATION_SECONDS: '4',
    KEDGE_TEST_MODEL_STEPS: '4000',
  };
  return spawnSync('npx', args, { stdio: 'inherit', env }).status !== 0;
});
if (failed.length > 0) {
  console.error(`failed on Node ${failed.join(', ')}`);
  process.exitCode = 1;
}
