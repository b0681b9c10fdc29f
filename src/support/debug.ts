import createDebug from 'debug';

/**
 * The way of each call, stage by stage, with `DEBUG=kedge:*`. Only names, codes and numbers are ever logged: no header,
 * token, key or body. On the hot path ask `.enabled` first, so that a silent log costs one property read.
 */
export const debug = {
  map: createDebug('kedge:map'),
  auth: createDebug('kedge:auth'),
  identity: createDebug('kedge:identity'),
  dial: createDebug('kedge:dial'),
  http: createDebug('kedge:http'),
  grpc: createDebug('kedge:grpc'),
};
