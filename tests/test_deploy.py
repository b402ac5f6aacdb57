"""deploy/: what dashboards ask for exists and has data; manifests agree with the server and one another."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from typer.main import get_command

from configs.loading import load_config
from configs.schema import ServerConfig
from engine.errors import StepFailed
from engine.messages import FinishReason, Outputs, Stats, Submit, TokenOutput
from server.cli import app
from server.gate import OPEN_PATHS
from server.metrics import Metrics
from tests.server.builders import (
    MODEL,
    PATIENCE,
    FakeEngine,
    chat_body,
    cost,
    http_server,
    save_tokenizer,
    say,
    text_body,
    then,
)

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
BOARD = json.loads((DEPLOY / "grafana" / "farspan.json").read_text())
PANELS = [panel for panel in BOARD["panels"] if panel["type"] != "row"]
ENGINE_LEAVES = 10  # seconds; engine/client.py's SHUTDOWN_SECONDS
SELECTOR = re.compile(r"(farspan:\w+)(?:\{([^}]*)\})?")


def documents(path: Path) -> list[Any]:
    return list(yaml.safe_load_all(path.read_text()))


def kind(name: str, folder: str = "cpu") -> Any:
    """The one object of a kind in a folder of manifests."""
    found = [
        document
        for file in sorted((DEPLOY / "kubernetes" / folder).glob("*.yaml"))
        for document in documents(file)
        if document["kind"] == name
    ]
    (only,) = found
    return only


def arguments(words: list[str]) -> dict[str, Any]:
    """Flags of `farspan serve` as its own parser reads them; unknown ones are an error."""
    serve: Any = get_command(app).commands["serve"]  # type: ignore[attr-defined]
    context = serve.make_context("serve", list(words), resilient_parsing=False)
    return {name: value for name, value in context.params.items() if value}


def floored(submit: Submit) -> list[TokenOutput]:
    """An answer to a prompt that fell below its plan's recall floor."""
    return [TokenOutput(submit.request_id, (5,), FinishReason.STOP, cost(floored_chunks=1))]


@pytest.fixture(scope="module")
def scrape(tmp_path_factory: pytest.TempPathFactory) -> str:
    """/metrics after answers under two plans, a failure, a refusal, a long prompt."""
    engine = FakeEngine(say(5, 6, 7))
    metrics = Metrics(MODEL, engine)
    folder = save_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    with http_server(engine, folder, metrics=metrics, max_open_requests=1) as url:
        for body in (chat_body(), chat_body(plan="dense", stream=True)):
            httpx.post(f"{url}/v1/chat/completions", json=body, timeout=PATIENCE)
        engine.script = floored
        httpx.post(f"{url}/v1/completions", json=text_body(), timeout=PATIENCE)
        engine.script = then(say(5), StepFailed("no"))
        httpx.post(f"{url}/v1/completions", json=text_body(), timeout=PATIENCE)
        metrics.refused("open_requests")
        metrics.on_step(Outputs((), Stats(steps=1, step_tokens=9, step_seconds=0.1, step_context=2048)))
        text = httpx.get(f"{url}/metrics").text
    return text


def selectors(expression: str) -> list[tuple[str, dict[str, str]]]:
    """Series that a query asks for, with what their labels must match."""
    return [
        (name, dict(re.findall(r'(\w+)=~?"([^"]*)"', matchers or "")))
        for name, matchers in SELECTOR.findall(expression)
    ]


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_every_query_of_a_panel_has_data_after_a_mixed_load(panel: dict[str, Any], scrape: str) -> None:
    samples = [sample for family in text_string_to_metric_families(scrape) for sample in family.samples]
    assert panel["targets"] and panel["description"]
    for target in panel["targets"]:
        asked = selectors(target["expr"])
        assert asked, target["expr"]
        for name, labels in asked:
            pattern = {key: value.replace("$model", ".*") for key, value in labels.items()}
            found = [
                sample
                for sample in samples
                if sample.name == name
                and all(re.fullmatch(value, sample.labels.get(key, "")) for key, value in pattern.items())
            ]
            assert found, f"{name}{labels} is not at /metrics"
        for label in re.findall(r"{{(\w+)}}", target["legendFormat"]):
            assert re.search(rf"by \([^)]*\b{label}\b", target["expr"]), "the legend shows what is kept"


def test_a_query_for_what_is_not_there_would_be_noticed(scrape: str) -> None:
    ((name, labels),) = selectors('sum(rate(farspan:no_such_total{model_name=~"$model"}[5m]))')
    assert name not in scrape and labels == {"model_name": "$model"}


def test_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in BOARD["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not taken & cells and place["x"] + place["w"] <= 24, panel["title"]
        taken |= cells
    assert len({panel["id"] for panel in BOARD["panels"]}) == len(BOARD["panels"])


def test_compose_starts_what_the_dockerfile_builds_with_flags_that_exist() -> None:
    (compose,) = documents(DEPLOY / "compose.yaml")
    stages = re.findall(r"^FROM \S+ AS (\w+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    for name in ("farspan", "farspan-gpu"):
        service = compose["services"][name]
        assert service["build"]["target"] in stages
        assert (DEPLOY / service["build"]["context"] / "Dockerfile").exists()
        assert arguments(service["command"])["host"] == "0.0.0.0"
        assert all(port.startswith("127.0.0.1:") for port in service["ports"]), "no key is asked for"
        assert int(service["stop_grace_period"].removesuffix("s")) >= (
            ServerConfig().shutdown_timeout + ENGINE_LEAVES
        )
    for service in compose["services"].values():
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            assert (DEPLOY / source).exists() if source.startswith(".") else source in compose["volumes"]
        assert ":" in service["image"] and not service["image"].endswith(":latest")
    (prometheus,) = documents(DEPLOY / "prometheus.yml")
    targets = prometheus["scrape_configs"][0]["static_configs"][0]["targets"]
    assert targets == ["farspan:8000"] and "farspan" in compose["services"]
    (source,) = documents(DEPLOY / "grafana/provisioning/datasources/prometheus.yaml")
    assert source["datasources"][0]["url"] == "http://prometheus:9090"


def test_a_pod_is_probed_where_the_server_answers_without_a_key() -> None:
    pod = kind("Deployment")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    paths = {
        name: container[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "liveness", "readiness")
    }
    assert paths == {"startup": "/livez", "liveness": "/livez", "readiness": "/readyz"}
    assert set(paths.values()) <= OPEN_PATHS
    (port,) = container["ports"]
    assert port["containerPort"] == ServerConfig().port
    assert kind("Service")["spec"]["ports"][0]["targetPort"] == port["name"]


def test_a_pod_has_time_to_drain_and_no_privileges() -> None:
    pod = kind("Deployment")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    flags = arguments(container["args"])
    before = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] >= before + flags["shutdown_timeout"] + ENGINE_LEAVES
    uid = re.search(r"useradd .*--uid (\d+)", (ROOT / "Dockerfile").read_text())
    assert (
        uid and pod["securityContext"]["runAsUser"] == int(uid[1]) and pod["securityContext"]["runAsNonRoot"]
    )
    assert container["securityContext"]["readOnlyRootFilesystem"]
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    claim = volumes[mounts["/data"]]["persistentVolumeClaim"]["claimName"]
    assert claim == kind("PersistentVolumeClaim")["metadata"]["name"]
    assert "/tmp" in mounts, "the engine's socket and compilers need one that can be written"


@pytest.mark.skipif(
    shutil.which("check-jsonschema") is None,
    reason="check-jsonschema is not installed: pip install check-jsonschema, on the PATH",
)
def test_composes_own_schema_knows_every_field() -> None:
    command = ["check-jsonschema", "--builtin-schema", "vendor.compose-spec", str(DEPLOY / "compose.yaml")]
    checked = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def kustomized(folder: str) -> str:
    command = ["kubectl", "kustomize", str(DEPLOY / "kubernetes" / folder)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=PATIENCE).stdout


@pytest.mark.skipif(
    shutil.which("kubectl") is None or shutil.which("kubernetes-validate") is None,
    reason="kubectl or kubernetes-validate is not installed: pip install kubernetes-validate, on the PATH",
)
@pytest.mark.parametrize("version", ["1.29", "1.37"])
def test_kubernetes_schemas_know_every_field_of_the_manifests(tmp_path: Path, version: str) -> None:
    for folder in ("cpu", "gpu"):
        file = tmp_path / f"{folder}.yaml"
        file.write_text(kustomized(folder))
        command = ["kubernetes-validate", "--strict", "--kubernetes-version", version, str(file)]
        checked = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
        assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
def test_kustomize_builds_both_and_the_gpu_asks_for_one() -> None:
    built = {folder: list(yaml.safe_load_all(kustomized(folder))) for folder in ("cpu", "gpu")}
    for folder, objects in built.items():
        assert {found["kind"] for found in objects} == {"Deployment", "Service", "PersistentVolumeClaim"}
        (deployment,) = [found for found in objects if found["kind"] == "Deployment"]
        (container,) = deployment["spec"]["template"]["spec"]["containers"]
        assert container["image"] == {"cpu": "farspan:cpu", "gpu": "farspan:cuda"}[folder]
        asked = arguments(container["args"]).get("device")
        gpus = container["resources"]["limits"].get("nvidia.com/gpu")
        assert (asked, gpus) == (("cuda", "1") if folder == "gpu" else (None, None))


def unit() -> dict[str, list[str]]:
    """Values by key, of the systemd unit."""
    found: dict[str, list[str]] = {}
    for line in (DEPLOY / "farspan.service").read_text().splitlines():
        if "=" in line and not line.startswith("#"):
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    return found


def test_the_unit_starts_a_command_that_exists_and_gives_it_time_to_leave(tmp_path: Path) -> None:
    settings = unit()
    (command,) = settings["ExecStart"]
    program, name, *flags = command.split()
    assert program.endswith("/bin/farspan") and name == "serve"
    assert arguments(flags)["config"] == Path("/etc/farspan/server.yaml")
    assert int(settings["TimeoutStopSec"][0]) >= ServerConfig().shutdown_timeout + ENGINE_LEAVES
    assert settings["RestartPreventExitStatus"] == ["2"] and settings["DynamicUser"] == ["yes"]
    (tmp_path / "server.yaml").write_text("")
    assert load_config(tmp_path / "server.yaml", {}).server.port == 8000


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    text = (DEPLOY / "farspan.service").read_text().replace("/opt/farspan/.venv/bin/farspan", sys.executable)
    (tmp_path / "farspan.service").write_text(text)
    checked = subprocess.run(
        ["systemd-analyze", "verify", str(tmp_path / "farspan.service")],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert checked.returncode == 0 and "farspan.service" not in checked.stderr, checked.stderr
