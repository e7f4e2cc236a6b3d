"""The command line: YAML files and flags in, a trained stage out, every end with its sentence and its exit code."""

import logging
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import lightning.pytorch as pl
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import SIGTERMException
from omegaconf.errors import OmegaConfBaseException

from sdxs_lightning.callbacks import checkpoint_folder as folders
from sdxs_lightning.callbacks.checkpointing import Checkpointing
from sdxs_lightning.callbacks.ranks import Ranks
from sdxs_lightning.config_errors import sentence
from sdxs_lightning.config_files import MergedArguments, read_arguments
from sdxs_lightning.core.errors import Interrupted, RunStopped, UserError

os.environ.setdefault(
    "JSONARGPARSE_DEPRECATION_WARNINGS", "off"
)  # Lightning's own calls; nothing for the user to do

TRACEBACK = "SDXS_TRACEBACK"
"""Environment variable: set to 1, the ends that are told in a sentence show their traceback too."""


class ConstructionFailed(BaseException):
    """A class named in the configuration refused its arguments; the cause is chained.

    No Exception, so that jsonargparse lets it pass: it would try the next type of a union and bury the message.
    """


class TrainingParser(LightningArgumentParser):
    """Says what is wrong in a sentence instead of printing the usage of 200 options."""

    command_line = MergedArguments([], [], {})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raises what the command line turns into a sentence.

        Raises:
            UserError: always, but from a parser inside, whose message is part of the outer one's.
        """
        if not self.exit_on_error:
            super().error(message, ex)
        options = [name for action in self._actions for name in action.option_strings]
        raise UserError(sentence(message, options, self.command_line)) from ex


class SaveConfig(SaveConfigCallback):
    """Keeps the resolved configuration beside what it produced, as <run>/config.yaml."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Writes it, unless an earlier stage of the run has.

        Raises:
            UserError: on all ranks, if the run's folder cannot be written.
        """
        if self.already_saved:
            return
        ranks = Ranks()
        problem = ranks.first_message(self._write(Path(trainer.default_root_dir)) if ranks.first else None)
        if problem:
            raise UserError(problem)
        self.already_saved = True

    def _write(self, folder: Path) -> str | None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / self.config_filename
            self.parser.save(self.config, path, skip_none=False, overwrite=True, multifile=False)
        except OSError as error:
            return (
                f"the run's folder '{folder}' cannot be written ({folders.write_failure(error)}); give another one as "
                "--trainer.default_root_dir, or mend its permissions."
            )
        return None


class TrainingCLI(LightningCLI):
    """`python train.py --config FILE [--config FILE ...] [--key value ...] [--ckpt_path PATH|last]`.

    The stage is chosen by `model.class_path` in YAML, its data by `data.class_path`. Files merge in order, flags come after
    them, and `${...}` is resolved last (see `sdxs_lightning.config_files`).
    """

    def __init__(self, arguments: Sequence[str] | None) -> None:
        command_line = read_arguments(sys.argv[1:] if arguments is None else arguments)
        TrainingParser.command_line = command_line
        super().__init__(
            model_class=pl.LightningModule,
            datamodule_class=pl.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            parser_class=TrainingParser,
            parser_kwargs={"parser_mode": "omegaconf+", "allow_abbrev": False, "description": self.__doc__},
            save_config_callback=SaveConfig,
            seed_everything_default=0,
            trainer_defaults={"default_root_dir": "outputs/run"},
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            args=command_line.arguments,
            run=False,
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses the merged command line; Lightning's own warns that it differs from sys.argv."""
        self.config = parser.parse_args(args)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds `--ckpt_path`, and one seed for all that is random."""
        parser.add_argument(
            "--ckpt_path",
            type=str | None,
            default=None,
            help="checkpoint to go on from; 'last' is the newest complete one of the run's folder",
        )
        parser.add_argument(
            "--plan",
            action="store_true",
            help="print what the run needs of a device's memory, and whether it fits, instead of training; needs the "
            "base's JSON files only, and no GPU",
        )
        parser.add_argument(
            "--plan_gpu_gb",
            type=float | None,
            default=None,
            help="GiB of a device, for --plan; by default those of the GPU at hand, or 80",
        )
        parser.add_argument(
            "--plan_json", type=str | None, default=None, help="file that --plan writes its numbers to"
        )

    def before_instantiate_classes(self) -> None:
        """Lets what a class says about its arguments through unchanged."""
        self.parser.add_instantiator(_construct, object, subclasses=True)

    def instantiate_classes(self) -> None:
        """Everything, or with `--plan` the stage alone: a plan needs neither data nor the run's machine."""
        if not self.config.plan:
            super().instantiate_classes()
            return
        config = self.config.clone()
        config.data = None
        for name in ("callbacks", "logger", "strategy", "plugins", "profiler"):
            if name in config.trainer:
                config.trainer[name] = None
        self.model = self.parser.instantiate_classes(config).model

    def plan(self) -> None:
        """Prints the memory plan.

        Raises:
            UserError: for what the plan cannot read.
        """
        # Here, because a training has no use for it.
        from sdxs_lightning.memory_plan.command import show_plan

        show_plan(self.model, self.config.as_dict())

    def fit(self) -> None:
        """Trains.

        Raises:
            RunStopped: for every end that a sentence explains.
        """
        path = self.checkpoint_path()
        self.trainer.fit(
            self.model, self.datamodule, ckpt_path=path, weights_only=None if path is None else True
        )

    def checkpoint_path(self) -> str | None:
        """What `--ckpt_path` means, checked.

        Raises:
            UserError: if it is not there, not complete, or of another strategy.
        """
        wanted: str | None = self.config.ckpt_path
        if wanted is None:
            return None
        path = self._newest() if wanted == "last" else Path(wanted)
        if (path / folders.MANIFEST).exists() or (path / folders.STATE).exists():
            if not folders.complete(path):
                raise UserError(
                    f"the checkpoint '{path}' is not complete: a file is missing or shorter than its {folders.MANIFEST} says; "
                    "take an older one, or --ckpt_path last for the newest complete one."
                )
            path = path / folders.STATE
        if not path.exists():
            raise UserError(f"--ckpt_path '{path}' does not exist; give a checkpoint, or 'last'.")
        if path.is_dir() and not isinstance(self.trainer.strategy, ModelParallelStrategy):
            raise UserError(
                f"the checkpoint '{path}' is sharded; resume with --config configs/hardware/fsdp2.yaml, which reads it on any "
                "number of devices (one: --trainer.devices 1, with data.init_args.batch_size for the same global batch)."
            )
        return str(path)

    def _newest(self) -> Path:
        saver = next(
            (one for one in self.trainer.checkpoint_callbacks if isinstance(one, Checkpointing)), None
        )
        folder = (saver or Checkpointing()).run_folder(self.trainer)
        newest = folders.newest_complete_checkpoint(folder)
        if newest is None:
            broken = len(folders.incomplete_checkpoints(folder))
            what = f"only {broken} incomplete one(s)" if broken else "none"
            raise UserError(
                f"--ckpt_path last looks for the newest complete checkpoint in '{folder}' and found {what}; leave --ckpt_path "
                "away to begin anew, or give the run's folder as --trainer.default_root_dir."
            )
        return newest


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a stage from its command line.

    Args:
        arguments: the command line; None takes that of the process.

    Returns:
        The exit code, see `sdxs_lightning.core.errors`.
    """
    trainer: pl.Trainer | None = None
    _quiet()
    try:
        cli = _build(arguments)
        if cli.config.plan:
            cli.plan()
            return 0
        trainer = cli.trainer
        cli.fit()
    except RunStopped as stop:
        _tell(stop, agreed=trainer is not None)
        # Lightning's launcher kills everybody when it sees that a rank which it started has failed, also rank 0 while it is
        # still closing its files. This stop was agreed on by all ranks, and rank 0 alone carries its code.
        return 0 if _started_by_rank_zero(trainer) else stop.exit_code
    except SIGTERMException:
        return _interrupted_early(143, "SIGTERM")
    except KeyboardInterrupt:
        return _interrupted_early(130, "Ctrl-C")
    except SystemExit as exit_:
        if isinstance(exit_.__context__, KeyboardInterrupt):  # what Lightning makes of it
            return _interrupted_early(130, "Ctrl-C")
        raise
    except Exception as error:
        if not _said_by_us(error):
            raise
        _tell(error, agreed=False)
        return UserError.exit_code
    return 0


def _quiet() -> None:
    """Leaves out what Lightning says at every start and what asks nothing of the user."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: "litlogger" not in record.getMessage() and "TPU available" not in record.getMessage()
    )
    for message in (
        ".*LeafSpec.*",  # Lightning 2.6 on torch 2.15
        ".*in eval mode at the start of training.*",  # the averaged student and what is frozen
        ".*does not have many workers.*",  # latents are read faster than a worker can hand them over
    ):
        warnings.filterwarnings("ignore", message)


def _build(arguments: Sequence[str] | None) -> TrainingCLI:
    try:
        return TrainingCLI(arguments)
    except ConstructionFailed as failure:
        cause = failure.__cause__
        assert cause is not None
        if isinstance(cause, RunStopped):
            raise cause from None
        if _said_by_us(cause):
            raise UserError(str(cause)) from cause
        raise cause from None
    except OmegaConfBaseException as error:
        raise UserError(f"{str(error).splitlines()[0]} (key {error.full_key}).") from error
    except MisconfigurationException as error:
        raise UserError(str(error)) from error


def _construct(class_type: type, *args: Any, **kwargs: Any) -> Any:
    kwargs.pop("applied_instantiation_links", None)
    try:
        return class_type(*args, **kwargs)
    except Exception as error:
        raise ConstructionFailed from error


def _said_by_us(error: BaseException) -> bool:
    """Whether our own code raised it, on purpose: then its message is a sentence for the user and no bug."""
    frames = traceback.extract_tb(error.__traceback__)
    root = Path(__file__).resolve().parents[1]
    ours = [root / name for name in ("sdxs_lightning", "data", "evaluation")]
    return (
        bool(frames)
        and any(Path(frames[-1].filename).resolve().is_relative_to(folder) for folder in ours)
        and (frames[-1].line or "").startswith("raise ")
    )


def _tell(error: BaseException, agreed: bool) -> None:
    """Writes the sentence to stderr; what all ranks agreed on, rank 0 says alone."""
    rank = next(
        (int(os.environ[name]) for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK") if name in os.environ), 0
    )
    if agreed and rank:
        return
    if os.environ.get(TRACEBACK) == "1":
        traceback.print_exception(error)
    word = "stopped" if isinstance(error, Interrupted) else "error"
    sys.stderr.write(f"{word}{f' on rank {rank}' if rank else ''}: {error}\n")


def _interrupted_early(code: int, name: str) -> int:
    sys.stderr.write(
        f"stopped: {name} came outside the training steps, or twice; checkpoints written so far are complete.\n"
    )
    return code


def _started_by_rank_zero(trainer: pl.Trainer | None) -> bool:
    if trainer is None or trainer.local_rank == 0:
        return False
    connector = trainer._accelerator_connector
    return isinstance(connector.cluster_environment, LightningEnvironment)
