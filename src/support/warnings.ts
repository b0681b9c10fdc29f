import { is, isFunction } from './shape.ts';

/** Who is told about what will hurt later. */
export type WarningListener = (warning: Error) => void;

/** The default one. */
export function emitWarning(warning: Error): void {
  process.emitWarning(warning);
}

export const warningListener = is('a function that takes a warning', (value): value is WarningListener =>
  isFunction(value),
);
