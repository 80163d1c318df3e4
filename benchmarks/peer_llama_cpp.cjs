// llama.cpp's worker: the library that the npm package @node-llama-cpp/linux-x64 has built, driven as remote.py says.
//
//     node peer_llama_cpp.cjs FILE THREADS
//
// peer_llama_cpp.py starts it. What it times is llama_decode, without the choice of a token.

const fs = require("fs");
const path = require("path");
const readline = require("readline");

const HOME = path.join(process.env.PEER_HOME, "node_modules", "@node-llama-cpp", "linux-x64");
const BINARIES = path.join(HOME, "bins", "linux-x64");
const LONGEST = 2304; // tokens of a prompt
const MORE = 256; // tokens that the cache of a sequence has room for
const AT_ONCE = 512; // tokens of a prompt that llama.cpp takes together, its own default

const llama = require(path.join(BINARIES, "llama-addon.node"));
const seconds = () => Number(process.hrtime.bigint()) / 1e9;

class Worker {
  async start(file, threads) {
    llama.setLoggerLogLevel(2); // errors
    llama.loadBackends(BINARIES);
    await llama.init();
    const start = seconds();
    this.threads = threads;
    this.model = new llama.AddonModel(file, { gpuLayers: 0, useMmap: true, addonExports: llama });
    if (!(await this.model.init())) throw new Error(`llama.cpp does not load ${file}`);
    this.filled = {}; // lengths of sequences -> their context
    this.alone = await this.context(1, LONGEST);
    const loaded = seconds() - start;
    await this.prefill({ tokens: 8 });
    this.started = { load_seconds: loaded, first_token_seconds: seconds() - start, version: this.version() };
  }

  version() {
    const info = (file) => JSON.parse(fs.readFileSync(path.join(HOME, file), "utf8"));
    const built = info(path.join("bins", "linux-x64", "_nlcBuildMetadata.json")).buildOptions.llamaCpp.release;
    return `llama.cpp ${built} of node-llama-cpp ${info("package.json").version}; ${llama.systemInfo().trim()}`;
  }

  async context(sequences, tokens) {
    const context = new llama.AddonContext(this.model, {
      contextSize: sequences * tokens, batchSize: AT_ONCE, sequences, threads: this.threads, flashAttention: "auto",
    });
    if (!(await context.init())) throw new Error(`llama.cpp has no memory for ${sequences} x ${tokens} tokens`);
    return context;
  }

  // Computes [sequence, place, ids] together, with the logits of each one's last; seconds.
  async compute(context, parts) {
    context.initBatch(parts.reduce((sum, [, , ids]) => sum + ids.length, 0));
    for (const [sequence, place, ids] of parts)
      context.addToBatch(sequence, place, Uint32Array.from(ids), Uint32Array.of(ids.length - 1));
    const start = seconds();
    await context.decodeBatch();
    return seconds() - start;
  }

  // Computes so many tokens into an empty sequence; seconds.
  async fill(context, sequence, tokens) {
    context.disposeSequence(sequence);
    const ids = Array.from({ length: tokens }, (_, index) => 100 + ((37 * index) % 90000));
    let taken = 0;
    for (let place = 0; place < tokens; place += AT_ONCE)
      taken += await this.compute(context, [[sequence, place, ids.slice(place, place + AT_ONCE)]]);
    return taken;
  }

  async prefill({ tokens }) {
    return { seconds: await this.fill(this.alone, 0, tokens) };
  }

  // Seconds of each of `steps` tokens of all sequences, which stand behind so many tokens each, filled in once.
  async batch({ lengths, steps }) {
    const key = lengths.join();
    if (!this.filled[key]) {
      this.filled[key] = await this.context(lengths.length, Math.max(...lengths) + MORE);
      for (const [sequence, length] of lengths.entries()) await this.fill(this.filled[key], sequence, length);
    }
    const context = this.filled[key];
    for (const [sequence, length] of lengths.entries()) context.removeTokenCellsFromSequence(sequence, length, -1);
    const taken = [];
    for (let step = 0; step <= steps; step++)
      taken.push(await this.compute(context, lengths.map((length, row) => [row, length + step, [200 + step + row]])));
    return { seconds: taken.slice(1) };
  }

  decode({ context, steps }) {
    return this.batch({ lengths: [context], steps });
  }

  memory() {
    const status = fs.readFileSync("/proc/self/status", "utf8");
    const bytes = (field) => 1024 * Number(status.match(new RegExp(`${field}:\\s*(\\d+)`))[1]);
    return { now: bytes("VmRSS"), peak: bytes("VmHWM"), own: bytes("RssAnon") };
  }
}

async function main() {
  const say = (answer) => process.stdout.write(JSON.stringify(answer) + "\n");
  const worker = new Worker();
  await worker.start(process.argv[2], Number(process.argv[3]));
  say(worker.started);
  for await (const line of readline.createInterface({ input: process.stdin })) {
    const { do: method, ...call } = JSON.parse(line);
    say(await worker[method](call));
  }
  process.exit(0);
}

main().catch((error) => {
  console.error(String(error));
  process.exit(1);
});
