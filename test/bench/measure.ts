/** A line of the table. */
export interface Row {
  readonly name: string;
  readonly rival: string;
  readonly comparison?: Comparison;
  readonly value?: string;
}

/** One side of a comparison: makes one call. */
export type Call = () => Promise<unknown>;

export interface Sample {
  perSecond: number;
  cpuMicros: number;
}

/** Keeps `concurrency` calls under way for `ms`. */
export async function load(call: Call, concurrency: number, ms: number): Promise<Sample> {
  const cpu = process.cpuUsage();
  const begin = performance.now();
  let calls = 0;
  const worker = async () => {
    while (performance.now() - begin < ms) {
      await call();
      calls += 1;
    }
  };
  await Promise.all(Array.from({ length: concurrency }, worker));
  const seconds = (performance.now() - begin) / 1000;
  const { user, system } = process.cpuUsage(cpu);
  return { perSecond: calls / seconds, cpuMicros: (user + system) / calls };
}

export interface Comparison {
  ours: Sample;
  theirs: Sample;
  /** Ours / theirs, of each pair of rounds. */
  ratio: Spread;
}

export interface Spread {
  min: number;
  median: number;
  max: number;
}

/** Both sides in turn, in one run: the machine's moods meet both. */
export async function compare(
  ours: Call,
  theirs: Call,
  concurrency: number,
  rounds = 5,
  ms = 1000,
): Promise<Comparison> {
  await load(ours, concurrency, ms / 2);
  await load(theirs, concurrency, ms / 2);
  const pairs: [Sample, Sample][] = [];
  for (let round = 0; round < rounds; round += 1) {
    // Whoever comes first changes, so that neither always runs in the other's wake.
    if (round % 2 === 0) {
      const a = await load(ours, concurrency, ms);
      pairs.push([a, await load(theirs, concurrency, ms)]);
    } else {
      const b = await load(theirs, concurrency, ms);
      pairs.push([await load(ours, concurrency, ms), b]);
    }
  }
  return {
    ours: medianSample(pairs.map(([a]) => a)),
    theirs: medianSample(pairs.map(([, b]) => b)),
    ratio: spread(pairs.map(([a, b]) => a.perSecond / b.perSecond)),
  };
}

export function spread(values: number[]): Spread {
  const sorted = [...values].sort((a, b) => a - b);
  return { min: sorted[0]!, median: sorted[Math.floor(sorted.length / 2)]!, max: sorted.at(-1)! };
}

function medianSample(samples: Sample[]): Sample {
  return {
    perSecond: spread(samples.map(({ perSecond }) => perSecond)).median,
    cpuMicros: spread(samples.map(({ cpuMicros }) => cpuMicros)).median,
  };
}
