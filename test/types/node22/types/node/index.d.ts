/// <reference path="../../../../../node_modules/types-node-22/index.d.ts" />
