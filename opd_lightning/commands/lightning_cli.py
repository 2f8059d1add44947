"""LightningCLI with this program's classes, and a parser's errors in one line."""

from __future__ import annotations

import ast
import json
import os
import re
import sys
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ActionConfigFile, Namespace
from lightning.pytorch import LightningModule
from lightning.pytorch import Trainer as LightningTrainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from opd_lightning.checkpoints import LAST, needed, settle_folders
from opd_lightning.commands import checked_yaml  # noqa: F401, for all parsers
from opd_lightning.commands.callback_names import explain_taken_name
from opd_lightning.commands.command_table import TRAINER_COMMANDS
from opd_lightning.commands.flags import with_values
from opd_lightning.commands.parser_messages import failed_import, hint, one_line
from opd_lightning.commands.trainer import Trainer
from opd_lightning.errors import UserError, note, report
from opd_lightning.run.datamodule import RolloutDataModule
from opd_lightning.run.lock import FOLDER_SETTINGS
from opd_lightning.run.settings import flat_settings
from opd_lightning.training.base import DistillationModule

TRAINER_DEFAULTS = {
    "use_distributed_sampler": False,  # the stream distributes prompts over ranks
    "num_sanity_val_steps": 0,
    "log_every_n_steps": 1,
    "enable_model_summary": False,  # `FirstLine` replaces it
    "max_epochs": -1,  # runs are measured in optimiser steps: trainer.max_steps
}

OURS = "opd_lightning"
STANDARD_COMMANDS = ("fit", "validate", "test")
DASHED = [name for name in TRAINER_COMMANDS if name not in STANDARD_COMMANDS]
OWN_COMMANDS = [name.replace("-", "_") for name in DASHED]


def as_yaml(word: str) -> str:
    """Return a command-line word with a Python literal that contains `None` rewritten as YAML.

    jsonargparse passes `null` to the parsers of nested classes as `None`, which YAML reads as text.
    """
    option, equals, value = word.partition("=") if word.startswith("-") else ("", "", word)
    try:
        read = ast.literal_eval(value) if "None" in value else ""
        return option + equals + json.dumps(read) if not isinstance(read, str) else word
    except (ValueError, SyntaxError, TypeError):
        return word


class _Parser(LightningArgumentParser):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def parse_args(self, args: Any = None, *rest: Any, **more: Any) -> Any:
        return super().parse_args(args and [as_yaml(word) for word in args], *rest, **more)

    def _check_value_key(self, action: Any, value: Any, *rest: Any, **more: Any) -> Any:
        # A check changes the value in place. Where a later file names another class of method,
        # jsonargparse checks what it keeps of the earlier ones, LoRA's settings for example.
        kept = value.clone() if isinstance(value, Namespace) else value
        return super()._check_value_key(action, kept, *rest, **more)

    # The configuration was validated when parsed; validating again costs 0.2 CPU seconds.
    def dump(self, *args: Any, **kwargs: Any) -> str:
        return str(super().dump(*args, **{"skip_validation": True, **kwargs}))

    def save(self, *args: Any, **kwargs: Any) -> None:
        super().save(*args, **{"skip_validation": True, **kwargs})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:  # parses a nested class; the outer parser adds its place
            super().error(message, ex)
        if (line := explain_taken_name(message)) is not None:
            report(line)
            sys.exit(2)
        report(f"{one_line(message)}; {failed_import(ex) or hint(self.prog)}")
        sys.exit(2)


class SaveRunConfig(SaveConfigCallback):
    """Writes config.yaml to the run folder, for all commands to read.

    The file has no `ckpt_path`, which is a setting of one command, not of the run. A resumed run
    replaces it when training goes on: a start that is refused leaves it as it was.
    """

    def __init__(self, parser: LightningArgumentParser, config: Any, **kwargs: Any) -> None:
        config = config.clone()
        self._resumes = config.pop("ckpt_path", None) is not None
        super().__init__(parser, config, **kwargs)

    def setup(self, trainer: LightningTrainer, pl_module: LightningModule, stage: str) -> None:
        # Evaluation does not replace the config of the run.
        if stage == "fit" and not self._resumes:
            super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: LightningTrainer, pl_module: LightningModule) -> None:
        super().setup(trainer, pl_module, "fit")


class OPDCLI(LightningCLI):
    """Command line of `opd fit|validate|test` and of the further commands of `Trainer`."""

    def __init__(self, args: list[str]) -> None:
        # Commands are methods of the trainer; names of methods have no dashes.
        args = [word.replace("-", "_") if word in DASHED else word for word in args[:1]] + args[1:]
        args = with_values(args)
        commands = self.subcommands()
        self.command = args[0] if args and args[0] in commands else None
        if self.command is not None:
            # Building the parser of a command takes a second; build only the requested one.
            only = {self.command: commands[self.command]}
            self.subcommands = lambda: only  # type: ignore[method-assign]
        super().__init__(
            DistillationModule,
            RolloutDataModule,
            trainer_class=Trainer,
            trainer_defaults=TRAINER_DEFAULTS,
            seed_everything_default=0,
            subclass_mode_model=True,
            auto_configure_optimizers=False,
            save_config_callback=SaveRunConfig,
            # A resumed run replaces its config.
            save_config_kwargs={"overwrite": True},
            parser_kwargs={
                "prog": "opd",
                "description": "On-policy distillation; `opd --help` lists all commands.",
            },
            args=args,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        standard = LightningCLI.subcommands()
        return {
            # Only tensors and plain data are read from checkpoints.
            **{name: standard[name] | {"weights_only"} for name in STANDARD_COMMANDS},
            **{name: {"model", "datamodule"} for name in OWN_COMMANDS},
        }

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        parser = _Parser(**kwargs)
        parser.add_argument(
            "-c",
            "--config",
            action=ActionConfigFile,
            help="YAML file; several are merged, later ones win, the command line last",
        )
        self.newest_parser = parser  # after construction, the command's
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        # Lightning's method warns if arguments are passed from Python, as `main` does.
        asks_to_print = any(word.startswith("--print_config") for word in args)
        if self.command is None or asks_to_print:  # only the top-level parser prints
            self.config = parser.parse_args(args)
            return
        # The top-level parser would parse everything twice, which costs half a CPU second.
        config = self.newest_parser.parse_args(args[1:])
        self.config = Namespace(subcommand=self.command, **{self.command: config})

    def _add_instantiators(self) -> None:
        """Let a method that is not ours call `save_hyperparameters`.

        For this, Lightning writes the whole configuration as YAML: a tenth of a CPU second.
        """
        method = self.config[self.config.subcommand].get("model.class_path")
        if not str(method).startswith(f"{OURS}."):
            super()._add_instantiators()

    def before_instantiate_classes(self) -> None:
        command = self.config.subcommand
        if command == "estimate":  # for GPUs that need not be present
            self.config[command].trainer.accelerator = "cpu"
        path = self.config[command].get("ckpt_path")
        if path:
            path = self.config[command]["ckpt_path"] = os.path.expanduser(path)
        if path and path != LAST and not Path(path).exists():
            raise UserError(
                f"--ckpt_path: no checkpoint at {path!r}; look in the run folder's 'checkpoints', "
                f"or give {LAST!r}, its newest whole one"
            )

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except UserError:
            raise
        except RuntimeError as error:
            if twice := re.match(
                r"Found more than one stateful callback of type `(\w+)`", str(error)
            ):
                raise UserError(
                    f"trainer.callbacks: got two of {twice[1]} with the same `state_key`, under "
                    "which a checkpoint keeps a state; leave one out, or change what the key holds "
                    "(ModelCheckpoint's: monitor, mode and how often it saves)"
                ) from error
            if "--ntasks" not in str(error):  # raised by Lightning's SLURM environment
                raise
            raise UserError(
                f"SLURM: {os.environ.get('SLURM_NTASKS')} tasks were asked for with --ntasks, "
                "which does not say how many a node gets; use --ntasks-per-node, equal to "
                "trainer.devices"
            ) from error
        except (ValueError, MisconfigurationException) as error:
            # jsonargparse wraps a constructor's UserError in its report on type unions.
            raise UserError(one_line(str(error))) from error

    def before_fit(self) -> None:
        """Refuse to mix a new run with an old one; pass the settings to the run log."""
        assert isinstance(self.trainer, Trainer)
        folder = Path(str(self.trainer.log_dir), "checkpoints")
        resumes = self.config.fit.get("ckpt_path")
        if self.trainer.keeps_files and not resumes and any(folder.glob("[!.]*")):
            raise UserError(
                f"{str(folder)!r} holds the checkpoints of an earlier run; continue it with "
                f"--ckpt_path {LAST}, or name another run folder with {FOLDER_SETTINGS}"
            )
        self.trainer.run_log.settings = flat_settings(self.config.fit.as_dict())

    def before_validate(self) -> None:
        """Disable logging, so that evaluation adds nothing to the log of the run."""
        settle_folders(self.trainer)
        self.trainer.logger = None

    before_test = before_validate

    def _run_subcommand(self, subcommand: str) -> None:
        """Run a command; `OWN_COMMANDS` run on rank 0 only."""
        if subcommand not in OWN_COMMANDS or self.trainer.is_global_zero:
            super()._run_subcommand(subcommand)

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs: dict[str, Any] = super()._prepare_subcommand_kwargs(subcommand)
        # Lightning's commands resolve `last` later, once the process group exists.
        if subcommand in OWN_COMMANDS and kwargs.get("ckpt_path") == LAST:
            settle_folders(self.trainer)
            saved = needed(self.trainer)
            note(f"--ckpt_path {LAST}: {str(saved.path)!r}, step {saved.step}")
            kwargs["ckpt_path"] = str(saved.path)
        return kwargs

    def _parse_ckpt_path(self) -> None:
        # Lightning would load the whole checkpoint here for settings that the YAML has.
        pass

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.link_arguments("seed_everything", "data.seed", compute_fn=int)
