// The only import of undici. Modules are evaluated in the order of these lines, and the first has to come first.
import './hush.ts';
import { Agent, Client, Dispatcher, Dispatcher1Wrapper, getGlobalDispatcher, Pool } from 'undici';
import { unhush } from './hush.ts';

unhush();

export { Agent, Client, Dispatcher, Dispatcher1Wrapper, getGlobalDispatcher, Pool };
