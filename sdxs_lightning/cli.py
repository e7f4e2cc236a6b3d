"""The training command line: configuration, resume, error messages and exit codes."""

import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import lightning.pytorch as pl
from jsonargparse import set_parsing_settings
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import SIGTERMException
from omegaconf.errors import OmegaConfBaseException

from sdxs_lightning.callbacks.checkpointing import Checkpointing
from sdxs_lightning.callbacks.elastic import join_elastic_group
from sdxs_lightning.callbacks.interruption import Interruption
from sdxs_lightning.callbacks.resume import Resume
from sdxs_lightning.callbacks.run_folder import origin
from sdxs_lightning.callbacks.save_config import SaveConfig
from sdxs_lightning.config_errors import reference_sentence, sentence, with_place
from sdxs_lightning.config_files import MergedArguments, read_arguments, refuse_untrusted
from sdxs_lightning.config_nulls import refuse_no_groups, refuse_nulls
from sdxs_lightning.core.errors import RunStopped, UserError
from sdxs_lightning.environment_values import EnvironmentValues
from sdxs_lightning.run_ends import (
    checks_processes,
    interrupted_early,
    is_our_message,
    lost_rank,
    report,
    started_by_rank_zero,
)
from sdxs_lightning.run_start import (
    check_folder_first,
    check_process_count,
    record_collectives,
    report_nothing_done,
)
from sdxs_lightning.trust import CODE_LOADERS, Trust, texts

os.environ.setdefault(
    "JSONARGPARSE_DEPRECATION_WARNINGS", "off"
)  # Lightning's own calls; nothing for the user to do


class ConstructionFailed(BaseException):
    """A class named in the configuration refused its arguments; the cause is chained.

    Not an Exception: jsonargparse would catch it, try the next type of a union and lose the message.
    """


class TrainingParser(LightningArgumentParser):
    """Reports errors in a sentence instead of printing the usage of 200 options."""

    command_line = MergedArguments([], [], {}, frozenset())
    environment = EnvironmentValues(command_line)

    def dump(self, cfg: Any, *args: Any, **kwargs: Any) -> str:
        """Text of a configuration, with what comes from the environment as it was written."""
        written = self.environment.as_written(cfg)
        if written != cfg:
            kwargs["skip_validation"] = True  # the text is of another type than the value
        text: str = super().dump(written, *args, **kwargs)
        return text

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raises instead of exiting.

        Raises:
            UserError: except in a nested parser, whose message becomes part of the outer one's.
        """
        if not self.exit_on_error:
            super().error(message, ex)
        options = [name for action in self._actions for name in action.option_strings]
        raise UserError(self.environment.hidden(sentence(message, options, self.command_line))) from ex


class TrainingCLI(LightningCLI):
    """`python train.py --config FILE [--config FILE ...] [--key value ...] [--ckpt_path PATH|last|auto]`.

    The stage is chosen by `model.class_path` in YAML, its data by `data.class_path`. Files merge in order, flags come after
    them, and `${...}` is resolved last (see `sdxs_lightning.config_files`).
    """

    def __init__(self, arguments: Sequence[str] | None) -> None:
        if os.getcwd() not in sys.path:  # for a `class_path` in a file of the user's own
            sys.path.append(os.getcwd())
        command_line = read_arguments(sys.argv[1:] if arguments is None else arguments)
        refuse_untrusted(command_line)
        refuse_nulls(command_line, command_line.settings)
        TrainingParser.command_line = command_line
        TrainingParser.environment = EnvironmentValues(command_line)
        # Only then: reading the docstrings under the fields of dataclasses takes longer than all other parsing.
        wants_help = any("help" in argument for argument in command_line.arguments)
        set_parsing_settings(docstring_parse_attribute_docstrings=wants_help)
        _allow_imports(command_line.trust)
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
        command_line, config = TrainingParser.command_line, self.config.as_dict()
        refuse_nulls(command_line, config)
        refuse_no_groups(command_line, config)
        command_line.trust.check_locations(texts(config))

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds `--ckpt_path` and `--plan`."""
        parser.add_argument(
            "--ckpt_path",
            type=str | None,
            default=None,
            help="checkpoint to resume from; 'last' is the newest complete one of the run's folder, 'auto' the same if there "
            "is one, else a new run: one command for start and restart",
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
            help="GiB of a device, for --plan; by default those of the local GPU, or 80",
        )
        parser.add_argument(
            "--plan_json", type=str | None, default=None, help="file that --plan writes its numbers to"
        )

    def before_instantiate_classes(self) -> None:
        """Lets the errors of constructors pass unchanged."""
        self.parser.add_instantiator(_construct, object, subclasses=True)

    def instantiate_classes(self) -> None:
        """Instantiates everything, or with `--plan` the stage only: a plan needs neither data nor the run's machine."""
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
        callbacks: list[pl.Callback] = self.trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
        interruptions = [one for one in callbacks if isinstance(one, Interruption)]
        for interruption in interruptions:
            interruption.install(self.trainer)
        try:
            check_process_count(self.trainer)
            record_collectives(Path(self.trainer.default_root_dir))
            join_elastic_group(self.trainer)
            config = TrainingParser.environment.as_written(self.config).as_dict() | {"code": origin()}
            resume = Resume(self.trainer, config, newest=self.config.ckpt_path in ("last", "auto"))
            for callback in callbacks:
                if isinstance(callback, Checkpointing):
                    callback.resume = resume
            check_folder_first(self.trainer, self.config.ckpt_path)
            self.trainer.fit(self.model, self.datamodule)
            report_nothing_done(self.trainer, resume.path)
        finally:
            for interruption in interruptions:
                interruption.restore()
            for callback in callbacks:
                if isinstance(callback, SaveConfig) and callback.lock is not None:
                    callback.lock.release()


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
        report(stop, agreed=trainer is not None, shown=_shown)
        # Lightning's launcher kills all ranks when it sees that a rank which it started has failed, also rank 0 while it is
        # still closing its files. This stop was agreed on by all ranks, and rank 0 alone carries its code.
        return 0 if started_by_rank_zero(trainer) else stop.exit_code
    except SIGTERMException:
        return interrupted_early(143, "SIGTERM")
    except KeyboardInterrupt:
        return interrupted_early(130, "Ctrl-C")
    except SystemExit as exit_:
        if isinstance(exit_.__context__, KeyboardInterrupt):  # what Lightning makes of it
            return interrupted_early(130, "Ctrl-C")
        raise
    except Exception as error:
        lost = lost_rank(trainer, error)
        if lost is not None:
            report(lost, agreed=False, shown=_shown)
            return lost.exit_code
        if not is_our_message(error):
            raise
        report(error, agreed=False, shown=_shown)
        return UserError.exit_code
    return 0


def _shown(message: str) -> str:
    """A message with the place of the setting that it quotes, and without values of the environment."""
    return TrainingParser.environment.hidden(with_place(message, TrainingParser.command_line))


def _quiet() -> None:
    """Filters messages of Lightning that appear at every start and require no action."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: (
            "litlogger" not in record.getMessage()
            and "litmodels" not in record.getMessage()
            and "TPU available" not in record.getMessage()
        )
    )
    for message in (
        ".*LeafSpec.*",  # Lightning 2.6 on torch 2.15
        ".*in eval mode at the start of training.*",  # the averaged student and what is frozen
        ".*srun. command is available on your system but is not used.*",  # torchrun and one process are no mistake there
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
        if is_our_message(cause):
            raise UserError(str(cause)) from cause
        if checks_processes(cause):
            raise UserError(str(cause)) from cause
        raise cause from None
    except RuntimeError as error:
        if checks_processes(error):
            raise UserError(str(error)) from error
        raise
    except OmegaConfBaseException as error:
        raise UserError(
            reference_sentence(str(error), error.full_key, TrainingParser.command_line)
        ) from error
    except MisconfigurationException as error:
        raise UserError(str(error)) from error


_allowed: set[str] = set()
"""What an earlier command line of this process allowed: jsonargparse's settings are those of the process."""


def _allow_imports(trust: Trust) -> None:
    """Limits what jsonargparse imports because a value names it."""
    set_parsing_settings(
        import_path_denylist=["*", *CODE_LOADERS, *_allowed], import_path_allowlist=list(trust.prefixes)
    )
    _allowed.update(trust.prefixes)


def _construct(class_type: type, *args: Any, **kwargs: Any) -> Any:
    kwargs.pop("applied_instantiation_links", None)
    try:
        return class_type(*args, **kwargs)
    except Exception as error:
        raise ConstructionFailed from error
