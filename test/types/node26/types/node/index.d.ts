/// <reference path="../../../../../node_modules/types-node-26/index.d.ts" />
