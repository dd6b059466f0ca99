"""Docker and Kubernetes examples: what they name exists.  That their launch commands start: test_doctor_launch.py."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
KUBERNETES = sorted((EXAMPLES / "kubernetes").glob("*.yaml"))
SERVERS = ("server", "prefill", "decode")


def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((EXAMPLES / "compose.yaml").read_text())
    return loaded


def manifests(*kinds: str) -> list[dict[str, Any]]:
    loaded = [item for file in KUBERNETES for item in yaml.safe_load_all(file.read_text())]
    return [item for item in loaded if not kinds or item["kind"] in kinds]


def pod(deployment: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The spec of its pod, and the one container."""
    spec = deployment["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    return spec, container


def entrypoint() -> list[str]:
    text = (EXAMPLES / "Dockerfile").read_text()
    found = re.search(r"^ENTRYPOINT (\[.+\])$", text, re.MULTILINE)
    assert found is not None
    loaded: list[str] = json.loads(found[1])
    return loaded


def filled_in(words: list[str]) -> list[str]:
    """As Compose fills in ${NAME:-default}, and Kubernetes $(NAME)."""
    return [re.sub(r"\$\(\w+\)", "a-key", re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", str(word))) for word in words]


def commands() -> Iterator[tuple[str, list[str]]]:
    """Each container's name and whole command."""
    for name, service in compose()["services"].items():
        yield f"compose {name}", filled_in([*service.get("entrypoint", entrypoint()), *service["command"]])
    for deployment in manifests("Deployment"):
        _, container = pod(deployment)
        yield deployment["metadata"]["name"], filled_in([*container.get("command", entrypoint()), *container["args"]])


COMMANDS = dict(commands())
LAUNCHED = {name: words for name, words in COMMANDS.items() if "sglang.launch_server" in words}
ROUTERS = {name: words for name, words in COMMANDS.items() if "sglang_router.launch_router" in words}


def value(words: list[str], flag: str) -> str:
    (found,) = [word.partition("=")[2] for word in words if word.startswith(f"{flag}=")]
    return found


def differs(words: list[str]) -> tuple[str, ...]:
    """What is asked of SGLang, without what is the same as nothing: Compose's and Kubernetes' are asked once."""
    flags = words[words.index("sglang.launch_server") + 1 :]
    same = ("--mixquant-recipe=auto", "--tp-size=1")
    keyless = [re.sub("^(--api-key)=.+", r"\1=a", flag) for flag in flags if flag not in same]
    return tuple(flag for flag in keyless if not flag.startswith("--model-path="))


def test_there_are_a_server_and_a_pair_of_each() -> None:
    assert len(LAUNCHED) == 6 and len(ROUTERS) == 2 and len(COMMANDS) == 8


@pytest.mark.parametrize("name", LAUNCHED)
def test_servers_are_of_mixquant_and_watched(name: str) -> None:
    words = LAUNCHED[name]
    assert words[words.index("--quantization") + 1] == "mixquant" and words[words.index("--host") + 1] == "0.0.0.0"
    assert "--enable-metrics" in words
    mode = [word for word in words if word.startswith("--disaggregation-mode=")]
    assert mode == [f"--disaggregation-mode={role}" for role in ("prefill", "decode") if role in name]
    assert bool(mode) != any(word.startswith("--api-key=") for word in words), "the router hands no keys on"


@pytest.mark.parametrize("name", ROUTERS)
def test_routers_know_their_pair(name: str) -> None:
    launch_router = pytest.importorskip("sglang_router.launch_router")
    words = ROUTERS[name]
    args = launch_router.parse_router_args(words[words.index("sglang_router.launch_router") + 1 :])
    assert args.pd_disaggregation and args.mini_lb and args.host == "0.0.0.0" and args.port == 8595
    prefix = "" if "compose" in name else "mixquant-"
    servers = {
        role: LAUNCHED[f"compose {role}" if "compose" in name else f"mixquant-{role}"] for role in ("prefill", "decode")
    }
    ports = {role: value(words, "--port") for role, words in servers.items()}
    bootstrap = int(value(servers["prefill"], "--disaggregation-bootstrap-port"))
    assert args.prefill_urls == [(f"http://{prefix}prefill:{ports['prefill']}", bootstrap)]
    assert args.decode_urls == [f"http://{prefix}decode:{ports['decode']}"]


def test_the_pair_is_that_of_serve_pd() -> None:
    """The flags of scripts/serve_pd, less ports and places."""
    from scripts.serve.pair import Plan

    plan = Plan("M", 8595, prefill_gpu="0", decode_gpu="1", ports=dict.fromkeys(("prefill", "decode", "bootstrap"), 1))
    own = {"--host", "--port", "--nccl-port", "--model-path", "--tp-size", "--disaggregation-bootstrap-port"}
    for role in ("prefill", "decode"):
        command, _ = plan.server(role)
        script = {word for word in command if word.startswith("--")} - own
        for name in (f"compose {role}", f"mixquant-{role}"):
            named = {word.partition("=")[0] for word in LAUNCHED[name] if word.startswith("--")} - own
            assert named - {"--mixquant-recipe"} == script


# -- the image ---


def test_the_image_is_of_a_tested_version_and_changes_nothing_in_it() -> None:
    pins = {path.stem.removeprefix("sglang-") for path in (ROOT / "scripts" / "pins").glob("*.txt")}
    text = (EXAMPLES / "Dockerfile").read_text()
    assert re.findall(r"^FROM (\S+)$", text, re.MULTILINE) == ["lmsysorg/sglang:v${SGLANG}"]
    assert re.findall(r"^ARG SGLANG=(\S+)$", text, re.MULTILINE)[0] in pins
    assert set(re.findall(r"SGLANG=(\d[\d.]*\d)", text)) <= pins
    installs = re.findall(r"pip install (.+?)(?: &&|$)", text, re.MULTILINE)
    assert installs and all("--no-deps" in words and "/opt/mixquant-sglang" in words for words in installs)
    args = compose()["services"]["server"]["build"]["args"]
    assert filled_in([args["SGLANG"]])[0] in pins


def test_what_the_image_is_built_from_is_what_the_package_needs() -> None:
    lines = (EXAMPLES / "Dockerfile.dockerignore").read_text().splitlines()
    kept = {line[1:] for line in lines if line.startswith("!")}
    assert "*" in lines and all((ROOT / name).exists() for name in kept)
    text = (ROOT / "pyproject.toml").read_text()
    folders = {
        line.strip(' ",').partition(".")[0] for line in re.findall(r'^  "mixquant_sglang[\w.]*",$', text, re.MULTILINE)
    }
    other = set(
        re.findall(r'^(?:"mixquant_sglang\.\w+" = "|readme = "|license-files = \[")([\w.]+)"', text, re.MULTILINE)
    )
    assert kept == folders | other | {"pyproject.toml"} and other == {"configs", "README.md", "LICENSE"}


# -- Compose ---


def test_compose_names_what_exists() -> None:
    loaded = compose()
    for name, service in loaded["services"].items():
        for volume in service.get("volumes", []):
            assert volume.partition(":")[0] in loaded["volumes"]
        for other in service.get("depends_on", {}):
            assert (
                "healthcheck" in loaded["services"][other]
                and loaded["services"][other]["profiles"] == service["profiles"]
            )
        for port in service.get("ports", []):
            assert port.rpartition(":")[2] == value(COMMANDS[f"compose {name}"], "--port")
        if "build" in service:
            context = EXAMPLES / service["build"]["context"]
            assert (context / service["build"]["dockerfile"]).samefile(EXAMPLES / "Dockerfile")
            (device,) = service["deploy"]["resources"]["reservations"]["devices"]
            assert device["capabilities"] == ["gpu"] and len(device["device_ids"]) == 1
            assert service["ipc"] == "host" and "restart" in service
            url = re.search(r"http://127\.0\.0\.1:(\d+)(/\w+)", service["healthcheck"]["test"][3])
            assert url is not None and url[2] in paths()
            assert url[1] == value(COMMANDS[f"compose {name}"], "--port")
            compile(service["healthcheck"]["test"][3], "healthcheck", "exec")
    devices = [
        loaded["services"][r]["deploy"]["resources"]["reservations"]["devices"][0]["device_ids"] for r in SERVERS[1:]
    ]
    assert devices[0] != devices[1]


# -- Kubernetes ---


def paths() -> set[str]:
    """Routes of SGLang's server."""
    found = importlib.util.find_spec("sglang")
    assert found is not None and found.origin is not None
    text = (Path(found.origin).parent / "srt" / "entrypoints" / "http_server.py").read_text()
    return set(re.findall(r'^@app\.get\("(/\w+)"\)', text, re.MULTILINE))


def test_probes_ask_what_sglang_answers_and_wait_as_long_as_it_does() -> None:
    assert {"/health", "/health_generate"} <= paths()
    for deployment in manifests("Deployment"):
        _, container = pod(deployment)
        probes = {
            kind: container[kind] for kind in ("startupProbe", "readinessProbe", "livenessProbe") if kind in container
        }
        assert {"readinessProbe", "livenessProbe"} <= set(probes)
        for kind, probe in probes.items():
            assert probe["httpGet"]["path"] in ("/health", "/health_generate")
            assert probe["httpGet"]["port"] in {port["name"] for port in container["ports"]}
            if deployment["metadata"]["name"] != "mixquant-router":  # SGLang answers after up to 20 s
                assert probe["timeoutSeconds"] > 20, kind
        (port,) = [port["containerPort"] for port in container["ports"] if port["name"] == "http"]
        assert str(port) == value(COMMANDS[deployment["metadata"]["name"]], "--port")


def test_kubernetes_names_what_exists() -> None:
    for file in KUBERNETES:
        items = list(yaml.safe_load_all(file.read_text()))
        named = {(item["kind"], item["metadata"]["name"]): item for item in items}
        assert len(named) == len(items)
        labels = []
        for item in (item for item in items if item["kind"] == "Deployment"):
            own = item["spec"]["template"]["metadata"]["labels"]
            labels.append(own)
            assert item["spec"]["selector"]["matchLabels"].items() <= own.items()
            spec, container = pod(item)
            assert spec["enableServiceLinks"] is False
            volumes = {volume["name"]: volume for volume in spec.get("volumes", [])}
            mounts = {mount["name"]: mount["mountPath"] for mount in container.get("volumeMounts", [])}
            assert set(volumes) == set(mounts)
            for source in container.get("envFrom", []):
                secret = named["Secret", source["secretRef"]["name"]]["stringData"]
                assert set(re.findall(r"\$\((\w+)\)", " ".join(container["args"]))) <= set(secret)
            if "sglang_router.launch_router" in COMMANDS[item["metadata"]["name"]]:
                continue
            assert ("PersistentVolumeClaim", volumes["cache"]["persistentVolumeClaim"]["claimName"]) in named
            assert mounts["cache"] == "/cache" and mounts["shm"] == "/dev/shm"
            given = {one["name"]: one["value"] for one in container["env"]}  # where SGLang's weights and our timings go
            assert given == {"XDG_CACHE_HOME": "/cache", "TRITON_CACHE_DIR": "/cache/triton"}
            assert volumes["shm"]["emptyDir"]["medium"] == "Memory"
            tp = int(value(COMMANDS[item["metadata"]["name"]], "--tp-size"))
            assert container["resources"]["limits"]["nvidia.com/gpu"] == tp
            notes = item["spec"]["template"]["metadata"]["annotations"]
            assert notes["prometheus.io/port"] == value(COMMANDS[item["metadata"]["name"]], "--port")
            assert notes["prometheus.io/scrape"] == "true" and notes["prometheus.io/path"] == "/metrics"
        for item in (item for item in items if item["kind"] == "Service"):
            chosen = [own for own in labels if item["spec"]["selector"].items() <= own.items()]
            assert len(chosen) == 1, item["metadata"]["name"]
            ports = {port["name"]: port["port"] for port in item["spec"]["ports"]}
            command = COMMANDS[item["metadata"]["name"]]
            assert str(ports["http"]) == value(command, "--port")
            if "bootstrap" in ports:
                assert str(ports["bootstrap"]) == value(command, "--disaggregation-bootstrap-port")
    images = {pod(item)[1]["image"] for item in manifests("Deployment")}
    project = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert project is not None and images == {f"mixquant-sglang:{project[1]}"}


def test_the_policy_lets_prometheus_and_the_pair_in_and_nobody_else() -> None:
    (policy,) = manifests("NetworkPolicy")
    chosen = {e["key"]: e["values"] for e in policy["spec"]["podSelector"]["matchExpressions"]}
    assert chosen == {"app": ["mixquant-pair"], "mixquant/role": ["prefill", "decode"]}
    pair, prometheus = policy["spec"]["ingress"]
    assert "ports" not in pair and prometheus["ports"] == [{"port": 30000}]


def test_prometheus_finds_the_pods_by_what_they_have() -> None:
    loaded = yaml.safe_load((EXAMPLES / "monitoring" / "prometheus-kubernetes.yml").read_text())
    (scrape,) = loaded["scrape_configs"]
    asked = " ".join(label for rule in scrape["relabel_configs"] for label in rule["source_labels"])
    for item in manifests("Deployment"):
        meta = item["spec"]["template"]["metadata"]
        assert (
            re.fullmatch("mixquant.*", meta["labels"]["app"]) and "__meta_kubernetes_pod_label_mixquant_role" in asked
        )
        for name in meta.get("annotations", {}):
            assert f"__meta_kubernetes_pod_annotation_{re.sub(r'[^a-z]', '_', name)}" in asked


def test_no_key_is_in_the_examples() -> None:
    for item in manifests("Secret"):
        assert set(item["stringData"].values()) <= {"", "change-me"}
