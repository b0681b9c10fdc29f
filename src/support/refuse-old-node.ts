/** Imported before undici, which an older Node.js cannot load, and would say so in a page of stack. */
import { unfitNode } from './node-version.ts';

const unfit = unfitNode();
if (unfit !== undefined) throw new Error(unfit);
