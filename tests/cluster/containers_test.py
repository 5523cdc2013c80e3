"""`launch/jobset.yaml` and `launch/Dockerfile`, without a cluster and without Docker."""

import json
import re
import shutil
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest
import yaml
from jax._src.clusters.k8s_cluster import K8sCluster

from esm1nv_jax.common.errors import UserError
from esm1nv_jax.training import process_group
from tests.training import processes

LAUNCH = processes.ROOT / "launch"
DOCUMENTS = {d["kind"]: d for d in yaml.safe_load_all((LAUNCH / "jobset.yaml").read_text("utf-8"))}
JOB = DOCUMENTS["JobSet"]["spec"]["replicatedJobs"][0]
SPEC = JOB["template"]["spec"]
POD = SPEC["template"]["spec"]


def test_the_job_names_what_its_api_asks_for():
    assert DOCUMENTS["JobSet"]["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
    assert SPEC["completionMode"] == "Indexed" and SPEC["parallelism"] == SPEC["completions"]
    # A rule by exit status, which must not restart the pod by itself; 2 alone ends the whole.
    assert POD["restartPolicy"] == "Never" and SPEC["backoffLimit"] == 0
    (rule,) = SPEC["podFailurePolicy"]["rules"]
    assert rule == {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [2]}}
    assert DOCUMENTS["JobSet"]["spec"]["failurePolicy"]["rules"] == [
        {"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    ]


def test_the_pod_has_its_disks_and_its_program():
    (container,) = POD["containers"]
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in POD["volumes"]}
    mounts = [m["mountPath"] for m in container["volumeMounts"]]
    for argument in container["args"]:
        field, _, value = argument.partition("=")
        assert field.startswith("--") and value
        assert any(value.startswith(m) for m in mounts) or (processes.ROOT / value).exists()
    # The script as bash reads it, with a program in the place of Python's.
    command = [*container["command"], *container["args"]]
    command[2] = command[2].replace("exec python", "exec echo")
    ended = subprocess.run(command, cwd=processes.ROOT, capture_output=True, text=True, check=True)
    assert ended.stdout.split() == ["-m", "esm1nv_jax.main", *container["args"]]


def test_the_launcher_is_told_of_kubernetes_and_of_all_gpus(monkeypatch):
    (container,) = POD["containers"]
    environ = {entry["name"]: entry["value"] for entry in container["env"]}
    gpus = container["resources"]["limits"]["nvidia.com/gpu"]
    assert process_group.promised_devices(2, environ) == SPEC["parallelism"] * gpus
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="extra k8s"):
        process_group.initialize_arguments(environ)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    assert process_group.initialize_arguments(environ) == {}
    with pytest.raises(UserError, match="it may be tpu_pod, kubernetes"):
        process_group.initialize_arguments({"ESM1NV_LAUNCHER": "k8s"})


def test_jax_finds_the_processes_with_the_rights_of_the_service_account(monkeypatch):
    """JAX's own detection, before an API that refuses what the role does not allow."""
    assert POD["serviceAccountName"] == DOCUMENTS["ServiceAccount"]["metadata"]["name"]
    (subject,) = DOCUMENTS["RoleBinding"]["subjects"]
    assert subject == {"kind": "ServiceAccount", "name": POD["serviceAccountName"]}
    assert DOCUMENTS["RoleBinding"]["roleRef"]["name"] == DOCUMENTS["Role"]["metadata"]["name"]
    allowed = {
        (group, resource, verb)
        for rule in DOCUMENTS["Role"]["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    jobset = DOCUMENTS["JobSet"]["metadata"]["name"]
    name = f"{jobset}-{JOB['name']}-0"
    labels = {"jobset.sigs.k8s.io/jobset-name": jobset, "job-name": name}
    job = SimpleNamespace(
        metadata=SimpleNamespace(name=name, labels=labels),
        spec=SimpleNamespace(parallelism=SPEC["parallelism"]),
    )
    owner = SimpleNamespace(controller=True, kind="Job")
    pod = SimpleNamespace(
        metadata=SimpleNamespace(name=f"{name}-1", labels=labels, owner_references=[owner]),
        spec=SimpleNamespace(subdomain=jobset),
    )

    def answer(right, result):
        def call(*_, **__):
            assert right in allowed
            return result

        return call

    class Cluster(K8sCluster):
        _ApiException = RuntimeError
        _core_api = SimpleNamespace(
            list_namespaced_pod=answer(("", "pods", "list"), SimpleNamespace(items=[pod]))
        )
        _batch_api = SimpleNamespace(read_namespaced_job=answer(("batch", "jobs", "get"), job))
        _namespace = classmethod(lambda cls: "default")

    K8sCluster._cluster_types.remove(Cluster)  # where JAX registers every subclass
    monkeypatch.setenv("HOSTNAME", "a-pod")
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "1")
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "10.0.0.1")
    assert Cluster.get_coordinator_address(None, None) == f"{name}-0.{jobset}:55527"
    assert (Cluster.get_process_count(), Cluster.get_process_id()) == (SPEC["parallelism"], 1)


def instructions() -> list[tuple[str, str]]:
    """(instruction, rest) of the Dockerfile, without comments, continued lines joined."""
    text = (LAUNCH / "Dockerfile").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines()
    return [tuple(line.split(" ", 1)) for line in joined]


def test_the_images_follow_the_rules_of_a_linter():
    """Of hadolint: pinned base, absolute WORKDIR, no root, JSON commands, no cache of pip, no ADD;
    and what is named exists: stages, files, extras."""
    stages, copied = {}, []
    for name, rest in instructions():
        if name == "FROM":
            base, _, stage = rest.partition(" AS ")
            assert base in stages or re.fullmatch(r"[\w./]+:(?!latest)[\w.-]+", base)
            stages[stage] = current = [] if base not in stages else [*stages[base]]
        elif name in ("ENTRYPOINT", "CMD"):
            assert all(isinstance(word, str) for word in json.loads(rest))
        elif name == "COPY":
            copied.append(rest)
        elif name == "RUN":
            assert "sudo" not in rest and "apt-get" not in rest
            assert "pip install" not in rest or "--no-cache-dir" in rest
        assert name in "FROM ENV WORKDIR COPY RUN USER ENTRYPOINT CMD".split()
        assert name != "WORKDIR" or rest.startswith("/")
        current.append((name, rest))
    assert {"cpu", "cuda"} < set(stages) and copied == [". ."]
    for stage in ("cpu", "cuda"):
        names = [name for name, _ in stages[stage]]
        assert dict(stages[stage])["USER"] != "root" and names[-1] == "CMD"
        assert names.index("USER") > max(i for i, name in enumerate(names) if name == "RUN")
    setup = (processes.ROOT / "setup.py").read_text(encoding="utf-8")
    extras = re.search(r"-e '\.\[(.*?)\]'", dict(stages["cuda"])["RUN"])[1].split(",")
    assert extras and all(f'    "{extra}": [' in setup for extra in extras)
    sent = (processes.ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    kept = [line[1:] for line in sent if line.startswith("!")]
    assert sent[0] == "*" and all((processes.ROOT / path).exists() for path in kept)


@pytest.mark.slow
def test_the_image_for_a_cpu_runs():
    docker = shutil.which("docker")
    if docker is None or subprocess.run([docker, "info"], capture_output=True).returncode:
        pytest.skip("docker is not installed, or its daemon does not run")
    build = ["docker", "build", "-f", "launch/Dockerfile", "--target", "cpu", "-t", "esm1nv:test"]
    subprocess.run([*build, "."], cwd=processes.ROOT, check=True)
    run = ["docker", "run", "--rm", "esm1nv:test", "-m", "esm1nv_jax", "inspect", "sample"]
    assert "sequences" in subprocess.run(run, capture_output=True, text=True, check=True).stdout


def test_what_an_image_holds_is_enough_to_install(tmp_path):
    """setup.py with the files of .dockerignore alone."""
    pytest.importorskip("setuptools")
    sent = (processes.ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    for path in (line[1:] for line in sent if line.startswith("!")):
        source, target = processes.ROOT / path, tmp_path / path
        if source.is_dir():
            ignore = shutil.ignore_patterns("__pycache__", "*.gz")
            shutil.copytree(source, target, ignore=ignore)
        else:
            shutil.copy(source, target)
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", "."]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    names = (tmp_path / "esm1nv_jax.egg-info/SOURCES.txt").read_text(encoding="utf-8")
    assert "esm1nv_jax/main.py" in names and "configs/pretrain_small.py" in names
