/** Tokens that may reach a mapped kedge and nobody else. */
export const TOKENS = ['canary-proxy-token', 'canary-backend-token'] as const;
