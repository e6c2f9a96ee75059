// Least privilege, for mongosh. Creates both roles, or brings them up to date:
//   STREAMJOBS_DATABASE=app STREAMJOBS_COLLECTION=jobs mongosh "$ADMIN_URI" deploy/role.js
// "hello", which tells the server's time and whether streams can be had, needs no privilege.

const database = process.env.STREAMJOBS_DATABASE || "app";
const collection = process.env.STREAMJOBS_COLLECTION || "jobs";

const runnerActions = [
  "find", // reads of what is due, of runners' records, of a claim or outcome without an answer; half of a stream
  "insert", // put; a runner's record, which is written by an upsert
  "update", // claims, outcomes, renewals, take-back, cancel, retry
  "remove", // runners' records only: the own one at a clean stop, a fenced one once its jobs are free; never a job
  "changeStream", // the one stream: on this collection, so neither the database nor the cluster has to be readable
  "listIndexes", // the check at start, which reports missing indexes
];

const adminActions = [
  "createIndex", // streamjobs indexes --create; it also makes the collection where it is not there yet
  "collStats", // how large the collection and its indexes are
  "indexStats", // whether an index is used
];

const target = db.getSiblingDB(database);
const privilege = (actions) => ({ resource: { db: database, collection }, actions });

function ensure(name, definition) {
  if (target.getRole(name) === null) {
    target.createRole({ role: name, ...definition });
  } else {
    target.updateRole(name, definition);
  }
}

ensure("streamjobsRunner", { privileges: [privilege(runnerActions)], roles: [] });
ensure("streamjobsAdmin", { privileges: [privilege(adminActions)], roles: ["streamjobsRunner"] });

// Users, with a password from the prompt; the database of the roles is then the URI's authSource.
// target.createUser({ user: "runner", pwd: passwordPrompt(), roles: ["streamjobsRunner"] });
// target.createUser({ user: "jobs-admin", pwd: passwordPrompt(), roles: ["streamjobsAdmin"] });
