// One process of another job system, driven by benchmarks/others.py over stdin and stdout.
//   node runner.mjs worker|producer agenda_poll|agenda_stream|mongo_jobs URI DATABASE
// Each line on stdin is how many jobs to put (producer). Lines on stdout are JSON: {ready}, {put, at}, {begun, at};
// times are milliseconds of the machine's monotonic clock, which all processes share.
import { createInterface } from "node:readline";

const [role, which, uri, database] = process.argv.slice(2);
const now = () => Number(process.hrtime.bigint()) / 1e6;
const say = (line) => process.stdout.write(JSON.stringify(line) + "\n");
const begun = (number) => say({ begun: number, at: now() });
const CONCURRENCY = 10;

async function agenda(stream) {
  const { Agenda } = await import("agenda");
  const { MongoBackend, MongoChangeStreamNotificationChannel } = await import("@agendajs/mongo-backend");
  const { MongoClient } = await import("mongodb");
  const client = await MongoClient.connect(uri, { w: "majority" });
  const db = client.db(database);
  const system = new Agenda({
    backend: new MongoBackend({ mongo: db }),
    // a producer needs no stream of its own
    ...(stream && role === "worker" ? { notificationChannel: new MongoChangeStreamNotificationChannel({ db }) } : {}),
    maxConcurrency: CONCURRENCY,
    defaultConcurrency: CONCURRENCY,
  });
  system.on("error", (error) => console.error(error));
  system.define("bench", async (job) => begun(job.attrs.data.number));
  await system.ready;
  return {
    work: () => system.start(),
    put: (number) => system.now("bench", { number }),
    end: async () => {
      await system.stop();
      await client.close();
    },
  };
}

async function mongoJobs() {
  const { BackgroundJobs } = (await import("@clipboard-health/mongo-jobs")).default;
  const mongoose = (await import("mongoose")).default;
  await mongoose.connect(uri, { dbName: database, w: "majority" });
  class Bench {
    name = "bench";
    async perform({ number }) {
      begun(number);
    }
  }
  const system = new BackgroundJobs({ dbConnection: mongoose.connection });
  system.register(Bench, "bench");
  return {
    work: () => system.start(["bench"], { maxConcurrency: CONCURRENCY }),
    put: (number) => system.enqueue(Bench, { number }),
    end: async () => {
      await system.stop();
      await mongoose.disconnect();
    },
  };
}

const system = await (which === "mongo_jobs" ? mongoJobs() : agenda(which === "agenda_stream"));
if (role === "worker") await system.work();
say({ ready: true });
let number = 0;
for await (const line of createInterface({ input: process.stdin })) {
  for (let left = Number(line); left > 0; left--) {
    const at = now();
    const mine = number++;
    await system.put(mine);
    say({ put: mine, at });
  }
}
await Promise.race([system.end(), new Promise((resolve) => setTimeout(resolve, 3000))]);
process.exit(0);
