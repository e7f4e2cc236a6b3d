"""`train.py` up to where torch is needed: --help, and command lines and files that are refused at once."""

from __future__ import annotations

import itertools
import sys
import textwrap
from collections.abc import Sequence

from sdxs_lightning.config_files import (
    CONFIG_FLAGS,
    GROUP_FLAGS,
    MergedArguments,
    read_arguments,
    refuse_untrusted,
)
from sdxs_lightning.core.errors import UserError, nearest
from sdxs_lightning.renamed import renamed_in

OPTIONS = {
    "--config": "FILE or -c FILE: a configuration, or an overlay for those before it; any number of times",
    "--ckpt_path": "PATH|last|auto: resume from a checkpoint; `last` is the newest complete one of the run's folder, `auto` "
    "the same if there is one, else a new run",
    "--print_config": "print the resolved configuration, with the defaults of all options, instead of training",
    "--plan": "print what the run needs of a device's memory, and whether it fits, instead of training",
    "--plan_gpu_gb": "GIB: memory of a device, for --plan; by default that of the local GPU, or 80",
    "--plan_json": "FILE: where --plan writes its numbers",
    "--trust": "NAME: let configurations import classes of this module or package of yours, beside those of torch, lightning "
    "and this project; `pipe:` lets shard locations be commands; any number of times",
    "--seed_everything": "N: seed of all that is random; default 0",
    "--model": "NAME.OPTION VALUE: any option of the stage, as --model.student.weights PATH; `init_args` may be left out",
    "--data": "NAME.OPTION VALUE: any option of the data, as --data.batch_size 16",
    "--trainer": "NAME.OPTION VALUE: any option of Lightning's Trainer, as --trainer.devices 8",
}
"""Options of the command line itself and the groups of the others."""

EXAMPLES = """\
usage: python train.py --config FILE [--config OVERLAY ...] [--ckpt_path PATH|last|auto] [--GROUP.OPTION VALUE ...]

Trains a stage. Files merge in order, flags come after them; null switches a part off.

examples:
  python train.py --config configs/quickstart.yaml
  python train.py --config configs/sd15/distill.yaml --config configs/sd15/distill_8gpu.yaml --data.batch_size 16
  python train.py --config configs/sd15/distill.yaml --ckpt_path auto
  python train.py --config configs/sdxl/distill.yaml --config configs/hardware/fsdp2.yaml --plan --plan_gpu_gb 80

options:
"""

WHERE_OPTIONS_ARE_LISTED = """
The options of each stage are listed in configs/REFERENCE.md. --print_config shows those of a run with their values;
--model.help CLASS, --data.help CLASS and --trainer.callbacks.help CLASS describe the arguments of a class.
"""


def help_text() -> str:
    """Returns the text of --help."""
    width = max(map(len, OPTIONS))
    lines = [
        textwrap.fill(text, 116, initial_indent=f"  {name:<{width}}  ", subsequent_indent=" " * (width + 4))
        for name, text in OPTIONS.items()
    ]
    return EXAMPLES + "\n".join(lines) + "\n" + WHERE_OPTIONS_ARE_LISTED


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a stage from its command line.

    Args:
        arguments: the command line; None takes that of the process.

    Returns:
        The exit code, see `sdxs_lightning.core.errors`.
    """
    given = [_underscored(one) for one in (sys.argv[1:] if arguments is None else arguments)]
    if "--help" in given or "-h" in given:
        sys.stdout.write(help_text())
        return 0
    try:
        _refuse_early(given)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    # torch and Lightning take seconds; here, so that --help and refused files do not wait for them.
    from sdxs_lightning import cli

    return cli.main(given)


def _underscored(argument: str) -> str:
    """`--ckpt-path=a-b` as `--ckpt_path=a-b`."""
    name, equals, value = argument.partition("=")
    if not name.startswith("--"):
        return argument
    return f"--{name[2:].replace('-', '_')}{equals}{value}"


def _refuse_early(given: Sequence[str]) -> None:
    if not given:
        raise UserError(
            "no configuration: give --config configs/<base>/<stage>.yaml; `python train.py --help` has examples."
        )
    for argument in given:
        name = argument.partition("=")[0]
        known = name in OPTIONS or name in CONFIG_FLAGS or name.partition(".")[0] in GROUP_FLAGS
        if name.startswith("--") and not known and name != "--print_shtab":
            raise UserError(
                f"{name} is not an option{nearest(name, OPTIONS)}; `python train.py --help` lists them."
            )
    for argument, following in itertools.pairwise([*given, "--"]):
        group = argument.partition(".")[0]
        if (
            group in GROUP_FLAGS
            and "=" not in argument
            and "help" not in argument
            and following.startswith("--")
        ):
            raise UserError(f"{argument} needs a value: {argument} VALUE (null switches a part off).")
    merged = read_arguments(given)
    moved = renamed_in(merged)
    if moved:
        raise UserError("; ".join(moved) + ".")
    refuse_untrusted(merged)
    _check_groups(merged)


def _check_groups(merged: MergedArguments) -> None:
    """Refuses a run without a stage, such as an overlay by itself, and groups that are null."""
    for group in ("model", "data", "trainer"):
        if merged.settings.get(group, {}) is None:
            raise UserError(
                f"{group} is null (set {merged.place(group)}); only its parts can be switched off."
            )
    model = merged.settings.get("model")
    if (isinstance(model, dict) and "class_path" in model) or merged.flags & {"model", "model.class_path"}:
        return
    if any("help" in flag.split(".") for flag in merged.flags):
        return
    names = ", ".join(dict.fromkeys(file.name for file in merged.files)) or "the command line"
    raise UserError(
        f"model.class_path, the stage to train, is not set in {names}; an overlay comes after the configuration of a stage: "
        "--config configs/<base>/<stage>.yaml --config OVERLAY."
    )
