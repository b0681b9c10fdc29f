// The only import of undici. Modules are evaluated in the order of these lines, and the first has to come first.
import './hush.ts';
import { Agent, Dispatcher, getGlobalDispatcher, Pool } from 'undici';
import { unhush } from './hush.ts';

unhush();

export { Agent, Dispatcher, getGlobalDispatcher, Pool };
