/**
 * Ends this process at its end without Node's clean-up, which spins for ever where TLS has lost the end of a write
 * (`Environment::CleanupHandles()`; https://github.com/nodejs/node/issues/61304), as it does to servers whose connections are cut.
 */
export function exitAtOnce(): void {
  process.once('exit', (code) => process.exit(code));
}
