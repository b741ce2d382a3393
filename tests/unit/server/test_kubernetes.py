"""The manifests for Kubernetes, without a cluster: schemas, hardening, probes, the end of calls, and real names."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from prometheus_client import CollectorRegistry

from data_owner_client.plm.connection.settings import ConnectionSettings
from harness.tiny_models import TinyModels
from plm_owner_server.operations.metrics import Metrics
from plm_owner_server.operations.serving_state import ServingState
from plm_owner_server.settings import ServerSettings
from plm_owner_server.transports.rest_routes import HEALTHZ, READYZ
from tests import support
from tests.kustomize import Manifest, containers, identity, merged, render

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "deploy" / "kubernetes"
OVERLAYS = sorted(path.parent for path in FOLDER.glob("overlays/*/kustomization.yaml"))
GPUS = "nvidia.com/gpu"
# Kinds of the Prometheus operator, for which Kubernetes has no schema.
FOREIGN = {"ServiceMonitor"}
DOCKERFILES = {
    "pema-server": "server.Dockerfile",
    "pema-server-cuda": "server.Dockerfile",  # with other arguments: docker/compose.gpu.yml
    "pema-server-vllm": "vllm.Dockerfile",
}
# Seconds that the server takes after its drain: it cuts off what is still sent, and vLLM's processes end.
AFTER_DRAIN_SECONDS = 25


@pytest.fixture(params=OVERLAYS, ids=lambda path: path.name)
def overlay(request: pytest.FixtureRequest) -> dict[tuple[str, str], Manifest]:
    return {identity(manifest): manifest for manifest in render(request.param)}


@pytest.fixture
def deployment(overlay: dict[tuple[str, str], Manifest]) -> Manifest:
    spec: Manifest = overlay["Deployment", "pema-server"]["spec"]
    return spec


@pytest.fixture
def pod(deployment: Manifest) -> Manifest:
    spec: Manifest = deployment["template"]["spec"]
    return spec


@pytest.fixture
def server(pod: Manifest) -> Manifest:
    (container,) = pod["containers"]
    return dict(container)


def values(container: Manifest) -> dict[str, str]:
    """The variables of a container; those from a secret have the value `KEY of SECRET`."""
    found = {}
    for entry in container["env"]:
        secret = entry.get("valueFrom", {}).get("secretKeyRef")
        found[entry["name"]] = f"{secret['key']} of {secret['name']}" if secret else entry["value"]
    return found


def selected(selector: dict[str, str], deployment: Manifest) -> bool:
    return bool(selector) and selector.items() <= deployment["template"]["metadata"]["labels"].items()


def test_there_is_an_overlay_for_each_need() -> None:
    assert {path.name for path in OVERLAYS} == {"cpu-trial", "gpu", "vllm", "replicas"}


@pytest.mark.parametrize("path", OVERLAYS, ids=lambda path: path.name)
def test_rendering_is_that_of_kustomize(path: Path) -> None:
    if kustomize := shutil.which("kustomize"):
        command = [kustomize, "build", str(path)]
    elif kubectl := shutil.which("kubectl"):
        command = [kubectl, "kustomize", str(path)]
    else:
        pytest.skip("neither kustomize nor kubectl is installed")
    rendered = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    theirs = {identity(manifest): manifest for manifest in yaml.safe_load_all(rendered)}
    assert in_order({identity(manifest): manifest for manifest in render(path)}) == in_order(theirs)


def in_order(value: Any) -> Any:
    """A copy in which lists of objects are sorted: kustomize orders what it merges in its own way."""
    if isinstance(value, dict):
        return {name: in_order(value[name]) for name in sorted(value)}
    if isinstance(value, list):
        return sorted(map(in_order, value), key=json.dumps) if any(isinstance(item, dict) for item in value) else value
    return value


def test_a_patch_merges_as_kubernetes_documents_it() -> None:
    base = {"env": [{"name": "A", "value": "1"}, {"name": "B", "value": "2"}], "args": ["a", "b"], "type": "x"}
    patch = {
        "env": [{"name": "B", "$patch": "delete"}, {"name": "A", "value": "3"}, {"name": "C", "value": "4"}],
        "args": ["c"],
        "type": None,
    }
    assert merged(base, patch) == {"env": [{"name": "A", "value": "3"}, {"name": "C", "value": "4"}], "args": ["c"]}
    assert base["type"] == "x"


@pytest.mark.parametrize("version", ["1.35", "1.37"])
def test_manifests_obey_the_schemas_of_kubernetes(overlay: dict[tuple[str, str], Manifest], version: str) -> None:
    checked = [manifest for manifest in overlay.values() if manifest["kind"] not in FOREIGN]
    assert len(checked) >= 5
    for manifest in checked:
        # With strict, a field that the kind does not have is a mistake.
        assert kubernetes_validate.validate(manifest, version, strict=True) == version


def test_pods_keep_to_the_restricted_standard(overlay: dict[tuple[str, str], Manifest], pod: Manifest) -> None:
    assert overlay["Namespace", "pema"]["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
    assert pod["automountServiceAccountToken"] is False
    assert all({"emptyDir", "persistentVolumeClaim", "secret"} & volume.keys() for volume in pod["volumes"])
    for container in containers(overlay["Deployment", "pema-server"]):
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }


def test_images_and_their_user_are_those_of_the_dockerfiles(pod: Manifest) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    for container in pod["initContainers"] + pod["containers"]:
        name, _, tag = container["image"].partition(":")
        assert tag == version
        dockerfile = (ROOT / "docker" / DOCKERFILES[name]).read_text(encoding="utf-8")
        (made,) = re.findall(r"useradd .*--uid (\d+) .* (\w+) \\$", dockerfile, re.MULTILINE)
        assert re.findall(r"^USER (\S+)$", dockerfile, re.MULTILINE)[-1] == made[1]
        assert pod["securityContext"]["runAsUser"] == int(made[0])


def test_all_that_is_used_is_bounded(pod: Manifest) -> None:
    for container in pod["initContainers"] + pod["containers"]:
        assert container["resources"]["limits"].keys() >= {"cpu", "memory", "ephemeral-storage"}
        assert container["resources"]["requests"].keys() >= {"cpu", "memory"}
    assert all(volume["emptyDir"]["sizeLimit"] for volume in pod["volumes"] if "emptyDir" in volume)


def test_gpus_are_as_many_as_the_engine_takes(server: Manifest) -> None:
    variables = values(server)
    gpus = int(server["resources"]["limits"].get(GPUS, 0))
    if server["image"].startswith("pema-server-vllm:"):
        assert gpus == int(variables["PEMA_TENSOR_PARALLEL_SIZE"]) > 1
    else:
        assert gpus == (1 if variables.get("PEMA_DEVICE") == "cuda" else 0)


def test_the_probes_fit_the_loading_of_a_model(deployment: Manifest, server: Manifest) -> None:
    startup, ready, live = (server[f"{name}Probe"] for name in ("startup", "readiness", "liveness"))
    scheme = "HTTP" if values(server).get("PEMA_INSECURE") == "true" else "HTTPS"
    for probe, path in ((startup, READYZ), (ready, READYZ), (live, HEALTHZ)):
        assert probe["httpGet"] == {"path": path, "port": "rest", "scheme": scheme}
    loading = startup["periodSeconds"] * startup["failureThreshold"]
    assert loading >= 1200  # vLLM's image has as long in its HEALTHCHECK
    assert deployment["progressDeadlineSeconds"] > loading
    assert live["periodSeconds"] * live["failureThreshold"] >= 60


def test_the_longest_call_may_end_before_a_pod_is_killed(pod: Manifest, server: Manifest) -> None:
    drain = int(values(server)["PEMA_DRAIN_TIMEOUT"])
    assert drain >= ConnectionSettings().timeout
    (_, pause) = server["lifecycle"]["preStop"]["exec"]["command"]
    assert pod["terminationGracePeriodSeconds"] >= int(pause) + drain + AFTER_DRAIN_SECONDS


def test_an_update_leaves_a_server_or_ends_the_only_one_first(deployment: Manifest, pod: Manifest) -> None:
    one_writer = any(
        "persistentVolumeClaim" in volume and not volume["persistentVolumeClaim"].get("readOnly")
        for volume in pod["volumes"]
    )
    assert deployment["strategy"]["type"] == ("Recreate" if one_writer else "RollingUpdate")
    if not one_writer:
        assert sorted(deployment["strategy"]["rollingUpdate"].values()) == [0, 1]


def test_each_variable_is_a_setting_and_its_value_is_accepted(pod: Manifest, server: Manifest) -> None:
    known = {f"PEMA_{name.upper()}" for name in ServerSettings.model_fields}
    for container in pod["initContainers"] + pod["containers"]:
        assert {name for name in values(container) if name.startswith("PEMA_")} <= known
    image = (ROOT / "docker" / DOCKERFILES[server["image"].split(":")[0]]).read_text(encoding="utf-8")
    of_image = dict(re.findall(r"\b(PEMA_\w+)=(\S+)", image))
    variables = of_image | values(server)
    variables["PEMA_MASTER_SECRET"] = variables.get("PEMA_MASTER_SECRET", "").ljust(32)
    settings = ServerSettings(
        _env_file=None,
        **{name.removeprefix("PEMA_").lower(): value for name, value in variables.items() if name in known and value},
    )
    ports = {port["name"]: port["containerPort"] for port in server["ports"]}
    assert ports == {"rest": settings.port, "grpc": settings.port + 1, "metrics": settings.metrics_port}
    assert settings.host == settings.metrics_host == "0.0.0.0"  # noqa: S104
    assert settings.insecure or settings.tls_certificate


def test_secrets_are_named_and_not_stored_here(overlay: dict[tuple[str, str], Manifest], server: Manifest) -> None:
    assert not [name for kind, name in overlay if kind == "Secret"]
    variables = values(server)
    if variables.get("PEMA_INSECURE") == "true":
        assert variables["PEMA_STORE"].startswith("sqlite:///")  # which has its master secret in its volume
        return
    for name in ("PEMA_STORE", "PEMA_MASTER_SECRET"):
        assert variables[name] == f"{name} of pema-store"
    mounts = {mount["mountPath"] for mount in server["volumeMounts"] if mount.get("readOnly")}
    assert {str(Path(variables[f"PEMA_TLS_{name}"]).parent) for name in ("CERTIFICATE", "KEY")} <= mounts


def test_what_is_mounted_is_a_volume_and_is_used(pod: Manifest) -> None:
    mounted = {m["name"] for container in pod["initContainers"] + pod["containers"] for m in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}


def test_services_and_policies_are_about_the_servers(
    overlay: dict[tuple[str, str], Manifest], deployment: Manifest, server: Manifest
) -> None:
    ports = {port["name"]: port["containerPort"] for port in server["ports"]}
    clients = overlay["Service", "pema-server"]["spec"]
    assert {port["targetPort"]: port["port"] for port in clients["ports"]} == {"rest": 8000, "grpc": 8001}
    for (kind, _), manifest in overlay.items():
        spec = manifest.get("spec", {})
        if kind == "Service":
            assert selected(spec["selector"], deployment)
            assert all(ports[port["targetPort"]] == port["port"] for port in spec["ports"])
        elif kind == "NetworkPolicy":
            assert selected(spec["podSelector"]["matchLabels"], deployment)
            assert all(rule["from"] and rule["ports"] for rule in spec["ingress"])
            assert all(port["port"] in ports for rule in spec["ingress"] for port in rule["ports"])
        elif kind == "PodDisruptionBudget":
            assert selected(spec["selector"]["matchLabels"], deployment)
            assert spec["maxUnavailable"] == 1
    assert {"Ingress", "Egress"} == set(overlay["NetworkPolicy", "pema-server"]["spec"]["policyTypes"])


def test_prometheus_finds_the_metrics_and_calls_them_as_the_dashboard_does(
    overlay: dict[tuple[str, str], Manifest],
) -> None:
    monitor = overlay.get(("ServiceMonitor", "pema-server"))
    if monitor is None:
        assert ("HorizontalPodAutoscaler", "pema-server") not in overlay
        return
    service = overlay["Service", "pema-metrics"]
    assert monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    (endpoint,) = monitor["spec"]["endpoints"]
    assert endpoint["port"] in {port["name"] for port in service["spec"]["ports"]}
    prometheus = yaml.safe_load((ROOT / "docker/monitoring/prometheus.yml").read_text(encoding="utf-8"))
    assert {"targetLabel": "job", "replacement": prometheus["scrape_configs"][0]["job_name"]} in endpoint["relabelings"]


def test_the_autoscaler_reads_a_metric_that_the_server_has(tiny_models: TinyModels) -> None:
    (autoscaler,) = (m for m in render(FOLDER / "overlays/replicas") if m["kind"] == "HorizontalPodAutoscaler")
    (metric,) = (entry["pods"] for entry in autoscaler["spec"]["metrics"])
    registry: CollectorRegistry = Metrics(ServingState(support.make_service(tiny_models["llama"]))).registry
    name, labels = metric["metric"]["name"], metric["metric"]["selector"]["matchLabels"]
    assert registry.get_sample_value(name, labels) == 0
    assert int(metric["target"]["averageValue"]) < ServerSettings(_env_file=None).max_waiting_requests
    assert f"- seriesQuery: '{name}{{" in (ROOT / "docs/kubernetes.md").read_text(encoding="utf-8")
