"""The Kubernetes manifests: fields as the APIs have them, what the operator checks beyond the schema, and what Keel
needs of them. Offline; tests/deploy_schema/kubernetes.json says where its facts come from."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import jsonschema  # type: ignore[import-untyped]
import pytest

from cluster.keys import GROUP, Keys
from cluster.streams import StreamName
from configs.load import load_config
from configs.run import FileSource, PretrainedModel, RunConfig
from keel.ray_environment import NODE_ENVIRONMENT
from tests.deploy_support import (
    GUIDE,
    ROOT,
    Command,
    Json,
    Manifest,
    commands,
    leaves,
    manifests,
    of_kind,
    pod_templates,
)

SCHEMA = json.loads((ROOT / "tests" / "deploy_schema" / "kubernetes.json").read_text())
SUBMISSION_MODES = {"K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"}
KEDA_REDIS_STREAMS = {
    "address", "addresses", "host", "hosts", "port", "ports", "username", "password", "stream", "consumerGroup",
    "databaseIndex", "enableTLS", "unsafeSsl", "pendingEntriesCount", "streamLength", "lagCount", "activationLagCount",
    "addressFromEnv", "usernameFromEnv", "passwordFromEnv",
}  # fmt: skip
"""Metadata of KEDA 2.20's redis-streams trigger; the schema has any string there."""
SECRET_NAME = re.compile(r"TOKEN|PASSWORD|SECRET|CREDENTIAL|REDIS_URL|API_?KEY", re.IGNORECASE)
GPU = "nvidia.com/gpu"

ALL = manifests()
JOBS = of_kind("RayJob")


def identify(manifest: Any) -> str:
    return str(manifest)


def problems(manifest: Manifest) -> list[str]:
    schema = SCHEMA | {"$ref": f"#/$defs/{manifest.doc['kind']}"}
    errors = jsonschema.Draft202012Validator(schema).iter_errors(manifest.doc)
    return [f"{error.json_path}: {error.message}" for error in errors]


def entry_config(job: Manifest) -> RunConfig:
    """The configuration that the job's entrypoint runs with."""
    (command,) = [command for command in commands() if command.where == str(job)]
    return config_of(command)


def config_of(command: Command) -> RunConfig:
    words = list(command.argv)
    overrides = [words[index + 1] for index, word in enumerate(words) if word == "--set"]
    return load_config(words[1], overrides=overrides)


# ---------------------------------------------------------------- fields


@pytest.mark.parametrize("manifest", ALL, ids=identify)
def test_every_field_is_known_and_of_its_type(manifest: Manifest) -> None:
    assert problems(manifest) == []


def test_the_check_is_strict() -> None:
    job = next(manifest for manifest in ALL if manifest.doc["kind"] == "RayJob")
    for change, where in (
        ({"backofLimit": 1}, "backofLimit"),
        ({"backoffLimit": "1"}, "backoffLimit"),
        ({"rayClusterSpec": {"workerGroupSpecs": []}}, "headGroupSpec"),
    ):
        broken = Manifest(job.path, job.doc | {"spec": job.doc["spec"] | change})
        assert any(where in problem for problem in problems(broken)), where
    pod = json.loads(json.dumps(job.doc))
    pod["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["volumeMount"] = []
    assert any("volumeMount" in problem for problem in problems(Manifest(job.path, pod)))


def test_every_type_of_the_schema_refuses_other_fields() -> None:
    def objects(schema: Any) -> Iterator[Json]:
        if isinstance(schema, dict):
            if "properties" in schema and isinstance(schema["properties"], dict) and "type" in schema:
                yield schema
            for inner in schema.values():
                yield from objects(inner)

    found = list(objects(SCHEMA["$defs"]))
    assert len(found) > 80
    assert all(schema["additionalProperties"] is False for schema in found)


# ---------------------------------------------------------------- what the schema cannot say


@pytest.mark.parametrize("job", JOBS, ids=identify)
def test_ray_jobs_are_as_the_operator_wants_them(job: Manifest) -> None:
    spec = job.doc["spec"]
    cluster = spec["rayClusterSpec"]
    assert len(job.doc["metadata"]["name"]) <= 47
    assert spec["submissionMode"] in SUBMISSION_MODES
    assert spec["shutdownAfterJobFinishes"] is True, "ttlSecondsAfterFinished needs it"
    assert spec["ttlSecondsAfterFinished"] >= 0
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert cluster["authOptions"]["mode"] == "token"
    assert f"ray=={cluster['rayVersion']}\n" in (ROOT / "requirements-cpu.lock").read_text()
    names = [group["groupName"] for group in cluster["workerGroupSpecs"]]
    assert len(names) == len(set(names))
    for group in cluster["workerGroupSpecs"]:
        assert 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    for _, template in pod_templates(job.doc):
        assert template["spec"].get("restartPolicy", "Never") == "Never", "the autoscaler's version 2 wants it"


@pytest.mark.parametrize("job", JOBS, ids=identify)
def test_a_retried_job_goes_on_from_shared_storage(job: Manifest) -> None:
    assert job.doc["spec"]["backoffLimit"] >= 1
    assert "--resume" in job.doc["spec"]["entrypoint"].split()
    runs_dir = entry_config(job).runs_dir
    for which, template in pod_templates(job.doc):
        claims = {
            volume["name"]: volume["persistentVolumeClaim"]["claimName"]
            for volume in template["spec"]["volumes"]
            if "persistentVolumeClaim" in volume
        }
        shared = [
            mount["mountPath"]
            for mount in template["spec"]["containers"][0]["volumeMounts"]
            if claims.get(mount["name"]) == "keel-shared"
        ]
        assert any(runs_dir.is_relative_to(path) for path in shared), which
    (claim,) = [m for m in of_kind("PersistentVolumeClaim") if m.doc["metadata"]["name"] == "keel-shared"]
    assert claim.doc["spec"]["accessModes"] == ["ReadWriteMany"]


@pytest.mark.parametrize("job", JOBS, ids=identify)
def test_a_stopped_job_has_time_to_save(job: Manifest) -> None:
    head = dict(pod_templates(job.doc))["head"]["spec"]["containers"][0]
    assert int(next(e["value"] for e in head["env"] if e["name"] == "RAY_JOB_STOP_WAIT_TIME_S")) >= 120


@pytest.mark.parametrize("job", JOBS, ids=identify)
def test_a_lost_pod_is_noticed_and_a_new_one_is_waited_for(job: Manifest) -> None:
    assert entry_config(job).placement.wait_s >= 300, "the autoscaler needs minutes for a pod"
    head = dict(pod_templates(job.doc))["head"]["spec"]["containers"][0]
    given = {variable["name"]: variable.get("value") for variable in head["env"]}
    wanted = {name: value for name, value in NODE_ENVIRONMENT.items() if name.startswith("RAY_health_check_")}
    assert wanted
    assert wanted.items() <= given.items()


@pytest.mark.parametrize("job", JOBS, ids=identify)
def test_every_model_and_table_is_on_the_shared_volume(job: Manifest) -> None:
    config = entry_config(job)
    paths = [*config.rm.models, *(source.path for source in (config.data.preferences, config.data.prompts,
             config.data.sft) if isinstance(source, FileSource))]  # fmt: skip
    if isinstance(config.model, PretrainedModel):
        paths.append(Path(config.model.path))
    assert [path for path in paths if not path.is_relative_to("/keel")] == []


@pytest.mark.parametrize("manifest", ALL, ids=identify)
def test_secrets_are_references(manifest: Manifest) -> None:
    assert manifest.doc["kind"] != "Secret", "a secret in a file of the repository is none"
    for path, value in leaves(manifest.doc):
        assert not re.search(r"(redis|rediss|https?)://[^/\s]*:[^@/\s$]+@", str(value)), f"{path}: a password in a URL"
    for which, template in pod_templates(manifest.doc):
        for container in template["spec"]["containers"]:
            for variable in container.get("env", []):
                if SECRET_NAME.search(variable["name"]):
                    assert "secretKeyRef" in variable.get("valueFrom", {}), f"{which}: {variable['name']}"


def test_the_guide_makes_every_secret_that_is_referred_to() -> None:
    made: set[tuple[str, str]] = set()
    for name, literals in re.findall(
        r"create secret generic (\S+)((?:\s+(?:\\\n\s*)?--from-literal=\S+)+)", GUIDE.read_text()
    ):
        made |= {(name, key) for key in re.findall(r"--from-literal=(\w+)=", literals)}
    wanted = {(job.doc["spec"]["rayClusterSpec"]["authOptions"]["secretName"], "auth_token") for job in JOBS}
    for manifest in ALL:
        for _, template in pod_templates(manifest.doc):
            for container in template["spec"]["containers"]:
                references = [
                    variable.get("valueFrom", {}).get("secretKeyRef") for variable in container.get("env", [])
                ]
                wanted |= {(reference["name"], reference["key"]) for reference in references if reference}
        if manifest.doc["kind"] == "TriggerAuthentication":
            wanted |= {(target["name"], target["key"]) for target in manifest.doc["spec"]["secretTargetRef"]}
    assert wanted == made


@pytest.mark.parametrize("manifest", ALL, ids=identify)
def test_images_are_pinned(manifest: Manifest) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    for which, template in pod_templates(manifest.doc):
        for container in template["spec"]["containers"]:
            name, _, tag = container["image"].rpartition(":")
            assert re.fullmatch(r"\d[\w.-]*", tag), f"{which}: {container['image']}"
            if name.startswith("keel-"):
                assert tag == version


@pytest.mark.parametrize("manifest", ALL, ids=identify)
def test_pods_are_confined_and_bounded(manifest: Manifest) -> None:
    for which, template in pod_templates(manifest.doc):
        security = template["spec"]["securityContext"]
        assert security["runAsNonRoot"] is True, which
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}, which
        mounted = {volume["name"] for volume in template["spec"]["volumes"]}
        for container in template["spec"]["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False, which
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}, which
            resources = container["resources"]
            assert {"cpu", "memory"} <= set(resources["requests"]), which
            assert resources["limits"]["memory"] == resources["requests"]["memory"], which
            assert resources["limits"].get(GPU) == resources["requests"].get(GPU), which
            assert {mount["name"] for mount in container["volumeMounts"]} <= mounted, which
            if manifest.doc["kind"] != "RayJob":  # KubeRay gives Ray's containers probes of their own.
                assert "livenessProbe" in container, which


def test_what_is_named_is_there() -> None:
    claims = {manifest.doc["metadata"]["name"] for manifest in of_kind("PersistentVolumeClaim")}
    templates = [template for manifest in ALL for _, template in pod_templates(manifest.doc)]
    for template in templates:
        for volume in template["spec"]["volumes"]:
            assert volume.get("persistentVolumeClaim", {}).get("claimName", "keel-shared") in claims
    for service in of_kind("Service"):
        selector = service.doc["spec"]["selector"].items()
        chosen = [template for template in templates if selector <= template["metadata"]["labels"].items()]
        assert chosen, f"{service} selects nothing"
        for port in service.doc["spec"].get("ports", []):
            for template in chosen:
                names = {port["name"] for port in template["spec"]["containers"][0]["ports"]}
                assert port["targetPort"] in names, service
    for manifest in ALL:
        if manifest.doc["kind"] in ("Deployment", "StatefulSet"):
            labels = manifest.doc["spec"]["template"]["metadata"]["labels"]
            assert manifest.doc["spec"]["selector"]["matchLabels"].items() <= labels.items()


# ---------------------------------------------------------------- what the run needs


def demands(config: RunConfig) -> list[tuple[float, float]]:
    """(CPUs, GPUs) of each of the run's processes, and of one stage's task beside them."""
    learner, rollout, reward = config.learner, config.rollout, config.reward
    return [
        *[(learner.cpus_per_rank, learner.gpus_per_rank)] * learner.ranks,
        *[(rollout.cpus_per_actor, rollout.gpus_per_actor)] * rollout.actors,
        *[(reward.cpus_per_worker, reward.gpus_per_worker)] * reward.workers,
        (1.0, 0.0),
    ]


def rooms(job: Manifest) -> list[tuple[float, float]]:
    """(CPUs, GPUs) of each worker pod that the job starts with."""
    found: list[tuple[float, float]] = []
    for group in job.doc["spec"]["rayClusterSpec"]["workerGroupSpecs"]:
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        found += [(float(limits["cpu"]), float(limits.get(GPU, 0)))] * group["minReplicas"]
    return found


def fits(wanted: list[tuple[float, float]], into: list[tuple[float, float]]) -> bool:
    """First fit, the largest first; what needs no GPU goes where fewest are."""
    left = sorted(into, key=lambda room: room[1])
    for cpus, gpus in sorted(wanted, key=lambda demand: (-demand[1], -demand[0])):
        for index, (free_cpus, free_gpus) in enumerate(left):
            if free_cpus >= cpus and free_gpus >= gpus:
                left[index] = (free_cpus - cpus, free_gpus - gpus)
                break
        else:
            return False
    return True


@pytest.mark.parametrize("job", JOBS, ids=identify)
def test_the_workers_hold_the_run(job: Manifest) -> None:
    config = entry_config(job)
    assert fits(demands(config), rooms(job)), (demands(config), rooms(job))
    gpus = sum(gpus for _, gpus in demands(config))
    assert sum(gpus for _, gpus in rooms(job)) == gpus, "GPUs that nobody uses"
    assert not fits(demands(config), rooms(job)[1:]), "a pod that nobody needs"


@pytest.mark.parametrize("job", JOBS, ids=identify)
def test_gpu_images_where_there_are_gpus(job: Manifest) -> None:
    gpus = any(gpus for _, gpus in rooms(job))
    images = {template["spec"]["containers"][0]["image"] for _, template in pod_templates(job.doc)}
    assert len(images) == 1, "Ray wants the same versions everywhere"
    assert next(iter(images)).startswith("keel-gpu:" if gpus else "keel-cpu:")


@pytest.mark.parametrize("job", JOBS, ids=identify)
def test_prometheus_finds_the_driver(job: Manifest) -> None:
    port = entry_config(job).metrics.discovery_port
    head = dict(pod_templates(job.doc))["head"]["spec"]["containers"][0]
    assert {"name": "discovery", "containerPort": port} in head["ports"]
    (scrape,) = of_kind("ScrapeConfig")
    service = f"http://keel-discovery:{port}/targets"
    assert [source["url"] for source in scrape.doc["spec"]["httpSDConfigs"]] == [service]


def test_scorers_are_scaled_by_the_stream_that_they_read() -> None:
    (scaled,) = of_kind("ScaledObject")
    (workers,) = of_kind("StatefulSet")
    (trigger,) = scaled.doc["spec"]["triggers"]
    metadata = cast(dict[str, str], trigger["metadata"])
    assert set(metadata) <= KEDA_REDIS_STREAMS
    (job,) = [
        job for job in JOBS if job.doc["metadata"]["labels"]["keel-run"] == scaled.doc["metadata"]["labels"]["keel-run"]
    ]
    config = entry_config(job)
    assert metadata["stream"] == Keys(config.name).stream(StreamName.ROLLOUTS)
    assert metadata["consumerGroup"] == GROUP
    assert int(metadata["lagCount"]) >= config.reward.batch_size
    target = scaled.doc["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("StatefulSet", workers.doc["metadata"]["name"])
    args = workers.doc["spec"]["template"]["spec"]["containers"][0]["args"]
    assert args[args.index("--run") + 1] == str(config.run_dir)
    limits = workers.doc["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert float(limits[GPU]) == config.reward.gpus_per_worker
    assert float(limits["cpu"]) >= config.reward.cpus_per_worker
    (auth,) = of_kind("TriggerAuthentication")
    assert trigger["authenticationRef"]["name"] == auth.doc["metadata"]["name"]
