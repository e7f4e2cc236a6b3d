"""The Kubernetes Job says of exit codes what the code means by them, and starts what is there."""

from __future__ import annotations

import yaml

from sdxs_lightning.core.errors import CheckpointNotWritten, TrainingDiverged, UserError
from tests.helpers.tiny_run import ROOT

FOLDER = ROOT / "configs" / "kubernetes"


def test_the_job_agrees_with_the_code() -> None:
    service, job = yaml.safe_load_all((FOLDER / "job.yml").read_text())
    spec = job["spec"]
    by_action = {
        rule["action"]: set(rule["onExitCodes"]["values"])
        for rule in spec["podFailurePolicy"]["rules"]
        if "onExitCodes" in rule
    }
    refused = {one.exit_code for one in (UserError, TrainingDiverged, CheckpointNotWritten)}
    assert by_action == {"FailJob": refused, "Ignore": {128 + 10, 128 + 15}}  # SIGUSR1, SIGTERM
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    arguments = dict(argument.removeprefix("--").split("=") for argument in container["args"][3:])
    files = [argument.partition("=")[2] for argument in container["args"] if argument.startswith("--config=")]
    assert all((ROOT / file).is_file() for file in files)
    assert int(arguments["trainer.num_nodes"]) == spec["completions"] == spec["parallelism"]
    assert int(arguments["trainer.devices"]) == container["resources"]["limits"]["nvidia.com/gpu"]
    assert arguments["ckpt_path"] == "auto"
    variables = {one["name"]: one.get("value") for one in container["env"]}
    # The first pod's name under the headless service.
    assert variables["MASTER_ADDR"] == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert pod["subdomain"] == service["metadata"]["name"]
    assert {one["name"] for one in container["volumeMounts"]} == {one["name"] for one in pod["volumes"]}


def test_the_image_has_the_locked_environment() -> None:
    text = (FOLDER / "Dockerfile").read_text()
    assert text.count("uv sync --locked") == 2
    for line in text.splitlines():
        if line.startswith("COPY pyproject.toml"):
            assert all((ROOT / name).is_file() for name in line.split()[1:-1])
