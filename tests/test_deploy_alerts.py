"""Events to metrics to alerts to the runbook: each names only what the one before it has."""

import json
import re

import pytest

from streamjobs.events import CATALOGUE, FIELDS
from tests.deploy_files import DEPLOY, load, read


def vector():
    return load(DEPLOY / "vector.yaml")


def one_of(field):
    """The values that the catalogue's text for a field lists."""
    return set(re.findall(r"[a-z]+", FIELDS[field][1].split(" where ")[0])) - {"or"}


def program():
    """The text of every VRL program and condition."""
    transforms = vector()["transforms"]
    return "\n".join(
        [
            transforms["events"]["source"],
            transforms["wanted"]["condition"],
            *transforms["by_event"]["route"].values(),
        ]
    )


def test_vector_is_wired():
    config = vector()
    outputs = set(config["sources"])
    for name, transform in config["transforms"].items():
        outputs |= {f"{name}.{route}" for route in transform.get("route", {})} or {name}
    used = {
        name
        for part in (*config["transforms"].values(), *config["sinks"].values())
        for name in part["inputs"]
    }
    assert used == outputs
    assert config["sinks"]["loki"]["labels"].keys() >= {"event", "level", "kind"}


def test_vector_knows_exactly_the_events_of_the_catalogue():
    (known,) = re.findall(r"known = \[(.*?)\]", program(), re.DOTALL)
    assert sorted(re.findall(r'"([^"]+)"', known)) == sorted(CATALOGUE)
    assert set(re.findall(r'\.derived\.event == "([^"]+)"', program())) <= set(CATALOGUE)
    assert set(re.findall(r'\.state == "([^"]+)"', program())) <= one_of("state")


def test_vector_names_only_fields_of_the_catalogue():
    own = {"event", "level", "timestamp"}
    text = re.sub(r'"[^"]*"|#.*', "", program())
    derived = set(re.findall(r"\.derived\.(\w+)", text))
    named = set(re.findall(r"(?<![\w.])\.([a-z]\w*)", text)) - {"derived"}
    assert named
    assert named <= own | FIELDS.keys()

    for name, transform in vector()["transforms"].items():
        for metric in transform.get("metrics", []):
            templates = [metric["field"], *metric.get("tags", {}).values()]
            for template in templates:
                field = template.removeprefix("{{ ").removesuffix(" }}")
                top, _, rest = field.partition(".")
                assert (rest in derived) if top == "derived" else (field in own | FIELDS.keys()), (
                    name,
                    field,
                )
    for template in vector()["sinks"]["loki"]["labels"].values():
        for field in re.findall(r"{{ (\S+) }}", template):
            assert field.removeprefix("derived.") in (derived if "." in field else own)


def test_vector_metrics_only_use_fields_that_their_event_has():
    # log_to_metric makes nothing of an event without the field.
    always = {"event", "level", "timestamp"}
    for name, event in (("try_metrics", "try"), ("start_metrics", "try"), ("stream_metrics", "stream.state")):
        for metric in vector()["transforms"][name]["metrics"]:
            for template in (metric["field"], *metric["tags"].values()):
                field = template.strip("{ }")
                assert field.startswith("derived.") or field in always | set(CATALOGUE[event].fields)


def produced():
    """Metric names as Prometheus sees them, with their labels."""
    told = {}
    for transform in vector()["transforms"].values():
        for metric in transform.get("metrics", []):
            ends = ("_bucket", "_sum", "_count") if metric["type"] == "histogram" else ("",)
            for end in ends:
                told[metric["name"] + end] = set(metric["tags"]) | ({"le"} if end == "_bucket" else set())
    return told


def rules():
    return [rule for group in load(DEPLOY / "alerts.yaml")["groups"] for rule in group["rules"]]


def alerts():
    return [rule for rule in rules() if "alert" in rule]


def test_alerts_use_only_metrics_and_labels_that_are_produced():
    there = produced()
    for rule in rules():
        if "record" in rule:
            (base,) = set(re.findall(r"streamjobs_\w+", rule["expr"]))
            there[rule["record"]] = there[base]
    for rule in rules():
        used = re.findall(r"(streamjobs[_:][\w:]+)(?:\{([^}]*)\})?", rule["expr"])
        assert used, rule
        for metric, matchers in used:
            assert metric in there, (rule, metric)
            assert set(re.findall(r"(\w+)=", matchers)) <= there[metric], (rule, metric)
        for grouped in re.findall(r"by \(([^)]*)\)", rule["expr"]):
            names = set(re.split(r",\s*", grouped)) - {"instance"}
            assert all(names <= there[metric] for metric, _ in used), rule
        for label in re.findall(r"\$labels\.(\w+)", json.dumps(rule.get("annotations", {}))):
            assert label == "instance" or any(label in there[metric] for metric, _ in used), (rule, label)


def test_alerts_name_only_events_outcomes_and_states_that_exist():
    named = {"event": set(), "outcome": set(), "state": set()}
    for rule in rules():
        for label, values in re.findall(r'(event|outcome|state)=~?"([^"]*)"', rule["expr"]):
            named[label] |= set(values.split("|"))
    assert named["event"]
    assert named["event"] <= set(CATALOGUE)
    # The counter is of events that go by a runner, and that are not dropped as debug.
    assert all(
        "runner" in CATALOGUE[name].fields and CATALOGUE[name].level != "debug" for name in named["event"]
    )
    assert named["outcome"] <= one_of("outcome")
    assert named["state"] <= one_of("state")


@pytest.mark.parametrize("rule", alerts(), ids=lambda rule: rule["alert"])
def test_alert_says_what_it_is_and_has_a_runbook(rule):
    assert rule["labels"]["severity"] in {"warning", "critical"}
    assert rule["annotations"].keys() == {"summary", "description", "runbook"}
    assert all(rule["annotations"].values())
    assert rule["annotations"]["runbook"] == f"deploy/README.md#{rule['alert'].lower()}"
    (text,) = re.findall(
        rf"^### {rule['alert']}\n\n(.+?)(?=\n\n|\Z)", read("README.md"), re.MULTILINE | re.DOTALL
    )
    assert len(text) > 80


def test_runbook_has_no_alert_that_is_gone():
    runbook = read("README.md").split("## Runbook")[1]
    headings = re.findall(r"^### (\w+)$", runbook, re.MULTILINE)
    assert headings == [rule["alert"] for rule in alerts()]


def test_readme_names_only_what_exists():
    text = read("README.md")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert (DEPLOY / target).exists(), target
    files = {path.name for path in DEPLOY.iterdir() if path.is_file()} - {"README.md"}
    assert files <= set(re.findall(r"\]\(([^)#]+)\)", text))
    runbook = text.split("## Runbook")[1]
    dotted = set(re.findall(r"`([a-z]+\.[a-z]+)`", runbook)) - {"job.lost", "role.js"}
    assert dotted <= set(CATALOGUE)
