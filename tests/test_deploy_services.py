"""The files that start and stop a runner, as far as they can be checked without a cluster, an engine or a network."""

import json
import os
import re
import shutil
import sys
import time

import pytest
import yaml

from streamjobs.settings import Settings
from tests.deploy_files import COMPOSE, DEPLOY, ROOT, RUN, STOP, WORKFLOW, load, read, run

SYSTEMD_ANALYZE = shutil.which("systemd-analyze")


def seconds(text):
    assert re.fullmatch(r"\d+s", text)
    return int(text[:-1])


# ---- Compose, Dockerfile, workflow


@pytest.mark.parametrize(
    ("schema", "path"), [("vendor.compose-spec", COMPOSE), ("vendor.github-workflows", WORKFLOW)]
)
def test_matches_its_schema(schema, path):
    pytest.importorskip("check_jsonschema", reason="check-jsonschema is not installed")
    done = run(sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, str(path))
    assert done.returncode == 0, done.stdout + done.stderr


def test_compose_starts_a_set_of_three_then_indexes_then_the_runner():
    services = load(COMPOSE)["services"]
    members = [name for name, service in services.items() if service.get("healthcheck")]
    assert members == ["mongo1", "mongo2", "mongo3"]
    for name in members:
        assert services[name]["image"] == "mongo:${MONGO_VERSION:-8.0}"
        assert services[name]["command"][:3] == ["mongod", "--replSet", "rs0"]
        assert services[name]["volumes"] == [f"{name}:/data/db"]
        assert "127.0.0.1" in services[name]["ports"][0], "without authentication: loopback only"

    script = services["initiate"]["command"][0]
    assert "replSetInitiate" in script
    assert "AlreadyInitialized" in script
    assert not re.search(r"(?<!\$)\$\{", script), "Compose would take ${…} as its own"

    healthy = {name: {"condition": "service_healthy"} for name in members}
    done = {"condition": "service_completed_successfully"}
    assert services["indexes"]["command"] == ["indexes", "--create"]
    assert services["indexes"]["depends_on"] == {"initiate": done, **healthy}
    assert services["runner"]["command"] == RUN
    assert services["runner"]["depends_on"] == {"indexes": done, **healthy}
    assert seconds(services["runner"]["stop_grace_period"]) > STOP
    assert services["runner"]["environment"] == {
        "STREAMJOBS_URI": "mongodb://mongo1:27017,mongo2:27017,mongo3:27017/?replicaSet=rs0"
    }
    assert ROOT / services["runner"]["build"]["dockerfile"] == DEPLOY / "Dockerfile"


def test_dockerfile_gets_the_signal_and_is_not_root():
    lines = [line for line in read("Dockerfile").splitlines() if line and not line.startswith("#")]
    final = lines[max(i for i, line in enumerate(lines) if line.startswith("FROM ")) :]
    told = {line.split(" ", 1)[0]: line.split(" ", 1)[1] for line in final if not line.startswith(" ")}
    assert sum(line.startswith("FROM ") for line in lines) == 2
    assert json.loads(told["ENTRYPOINT"]) == ["streamjobs"]
    assert json.loads(told["CMD"]) == RUN
    assert told["STOPSIGNAL"] == "SIGTERM"
    assert told["WORKDIR"] == "/app"
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", told["USER"]), "a number, which runAsNonRoot can check"


def test_dockerignore_lets_through_what_the_dockerfile_copies():
    copied = re.findall(r"^COPY (?!--from)(.*) \S+$", read("Dockerfile"), re.MULTILINE)
    ignore = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert "*" in ignore
    assert {f"!{name}" for names in copied for name in names.split()} == {
        line for line in ignore if line.startswith("!")
    }


def test_workflow_runs_the_suite_on_every_server_and_python():
    workflow = load(WORKFLOW)
    suite, embedded = workflow["jobs"]["mongodb"], workflow["jobs"]["embedded"]
    assert suite["strategy"]["matrix"] == {
        "mongodb": ["6.0", "7.0", "8.0"],
        "python": ["3.11", "3.12", "3.13", "3.14"],
    }
    assert "replicaSet=rs0" in suite["env"]["STREAMJOBS_TEST_URI"]
    scripts = [step["run"] for step in suite["steps"] if "run" in step]
    assert "python -m pip install '.[test]'" in scripts
    assert "python -m pytest" in scripts
    assert any("--replSet" in script and "rs.initiate" in script for script in scripts)
    assert [step["run"] for step in embedded["steps"] if "run" in step] == ["bash .ci/run"]
    assert "STREAMJOBS_TEST_URI" not in json.dumps(embedded)
    assert workflow["permissions"] == {"contents": "read"}
    assert workflow["concurrency"]["cancel-in-progress"] is True


# ---- systemd


def unit():
    pairs = re.findall(r"^(\w+)=(.*)$", read("streamjobs.service"), re.MULTILINE)
    return {name: [value for key, value in pairs if key == name] for name, _ in pairs}


def test_unit_stops_gracefully_and_always_comes_back():
    told = unit()
    assert told["Type"] == ["exec"]
    assert told["Restart"] == ["always"]
    assert told["KillSignal"] == ["SIGTERM"]
    assert told["KillMode"] == ["mixed"]
    assert int(told["TimeoutStopSec"][0]) > STOP
    assert told["EnvironmentFile"]
    assert told["NoNewPrivileges"] == ["yes"]
    assert told["ExecStart"][0].split()[1:] == RUN


@pytest.mark.skipif(SYSTEMD_ANALYZE is None, reason="systemd-analyze is not on PATH")
def test_unit_is_verified_by_systemd(tmp_path):
    # The program is not installed where the unit expects it: any that exists stands for it.
    text = re.sub(
        r"^ExecStart=\S+", f"ExecStart={sys.executable}", read("streamjobs.service"), flags=re.MULTILINE
    )
    path = tmp_path / "streamjobs.service"
    path.write_text(text, encoding="utf-8")
    done = run(SYSTEMD_ANALYZE, "verify", "--man=no", str(path))
    told = [line for line in done.stderr.splitlines() if "streamjobs.service" in line]
    assert done.returncode == 0, done.stderr
    assert not told


# ---- Kubernetes


def manifests():
    documents = list(yaml.safe_load_all(read("kubernetes.yaml")))
    assert len({document["kind"] for document in documents}) == len(documents)
    return {document["kind"]: document for document in documents}


@pytest.mark.parametrize("kind", ["Job", "Deployment"])
def test_pods_are_confined(kind):
    pod = manifests()[kind]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] > 0
    assert f"USER {pod['securityContext']['runAsUser']}:" in read("Dockerfile")
    assert pod["automountServiceAccountToken"] is False
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert container["resources"]["requests"]
    assert container["resources"]["limits"]["memory"]
    (uri,) = container["env"]
    reference = uri["valueFrom"]["secretKeyRef"]
    assert uri["name"] == "STREAMJOBS_URI"
    assert reference["name"] == manifests()["Secret"]["metadata"]["name"]
    assert reference["key"] in manifests()["Secret"]["stringData"]


def test_job_makes_the_indexes():
    pod = manifests()["Job"]["spec"]["template"]["spec"]
    assert pod["containers"][0]["args"] == ["indexes", "--create"]
    assert pod["containers"][0]["image"] == runner()["image"]


def runner():
    (container,) = manifests()["Deployment"]["spec"]["template"]["spec"]["containers"]
    return container


def test_deployment_waits_for_the_runners_stop_and_shares_its_labels():
    deployment = manifests()["Deployment"]["spec"]
    pod = deployment["template"]["spec"]
    labels = deployment["template"]["metadata"]["labels"]
    assert pod["terminationGracePeriodSeconds"] > STOP
    assert deployment["selector"]["matchLabels"] == labels
    assert manifests()["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    assert manifests()["Job"]["spec"]["template"]["metadata"]["labels"] != labels


def test_health_file_is_on_a_writable_volume_in_memory():
    args = runner()["args"]
    assert args[:2] == RUN
    assert args[2:] == ["--health-file", "/run/streamjobs/health"]
    volumes = {
        volume["name"]: volume for volume in manifests()["Deployment"]["spec"]["template"]["spec"]["volumes"]
    }
    mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in runner()["volumeMounts"]}
    assert mounts["/run/streamjobs"]["emptyDir"]["medium"] == "Memory"
    assert "emptyDir" in mounts["/tmp"]


@pytest.mark.skipif(shutil.which("find") is None, reason="find is not on PATH")
@pytest.mark.parametrize(
    ("probe", "age"), [("startupProbe", 30), ("readinessProbe", 30), ("livenessProbe", 300)]
)
def test_probes_ask_for_the_files_age(probe, age, tmp_path):
    settings = Settings()
    health = tmp_path / "health"
    command = runner()[probe]["exec"]["command"]
    command = [part.replace("/run/streamjobs/health", str(health)) for part in command]
    assert age > 2 * settings.beat, "one late renewal is no illness"
    assert run(*command).returncode != 0, "no file"
    health.touch()
    assert run(*command).returncode == 0
    for old, good in ((age - 10, True), (age + 10, False)):
        when = time.time() - old
        os.utime(health, (when, when))
        assert (run(*command).returncode == 0) is good, old


# ---- The example


def test_example_is_the_smallest_application():
    code = "import app; assert list(app.jobs.handlers) == ['hello'], app.jobs.handlers"
    done = run(
        sys.executable,
        "-Bc",
        code,
        cwd=DEPLOY,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        },
    )
    assert done.returncode == 0, done.stderr
