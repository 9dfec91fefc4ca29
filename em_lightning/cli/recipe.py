"""RecipeCLI: the LightningCLI that trains a recipe, with the defaults of all recipes."""

from __future__ import annotations

import difflib
import logging
import sys
import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentError
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, LearningRateMonitor, ProgressBar, TQDMProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry

from em_lightning.checkpoints import AtomicCheckpointIO, RunCheckpoint, WatchedDDPStrategy, connection_error
from em_lightning.cli.recipes import Recipe, config_of, docstring, variants_of

# Warnings about internals of Lightning and PyTorch, or settings that are right here, as --ckpt_path=last at a start.
_WARNINGS = (
    ".*does not have many workers.*",
    ".*number of training batches.*smaller than the logging interval.*",
    ".*LightningCLI's args parameter is intended to run from within Python.*",
    ".*isinstance.treespec, LeafSpec.* is deprecated.*",
    ".*torch.jit.script. is.*deprecated.*",
    ".*dirpath has changed.*",
    ".*no last checkpoint available.*",
)
_HIDDEN_WORDS = ("litlogger", "litmodels", "TPU available")  # of messages to hide: advertisements, list of devices


class RecipeCLI(LightningCLI):
    """The LightningCLI of a recipe: its defaults, checkpoints and report."""

    def __init__(self, recipe: Recipe, args: Sequence[str]) -> None:
        self.recipe = recipe
        self.script = Path(recipe.script)
        if recipe.threads:
            torch.set_num_threads(recipe.threads)
        for pattern in _WARNINGS:
            warnings.filterwarnings("ignore", pattern)
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"lightning\.pytorch\.cli")
        log = logging.getLogger("lightning.pytorch.utilities.rank_zero")
        log.addFilter(lambda record: not any(word in record.getMessage() for word in _HIDDEN_WORDS))
        for entry in StrategyRegistry.values():  # "ddp" and its variants, one of which "auto" may choose
            if entry["strategy"] is DDPStrategy:
                entry["strategy"] = WatchedDDPStrategy
        super().__init__(
            recipe.model,
            recipe.data,
            subclass_mode_model=recipe.model_subclasses,
            subclass_mode_data=recipe.data_subclasses,
            seed_everything_default=0,
            run=False,
            args=list(args),
            parser_kwargs={
                "allow_abbrev": False,
                "default_env": True,  # environment variables, such as PL_TRAINER__MAX_EPOCHS=3
                "exit_on_error": False,
                "default_config_files": [str(config_of(self.script))],
                "prog": f"em-lightning run {self.script.stem}",
            },
            save_config_kwargs={"overwrite": True},
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add checkpoint and report, and the defaults that all recipes share."""
        parser.add_argument("--ckpt_path", type=str | None, default=None, help="checkpoint to resume from")
        parser.add_argument("--table", type=dict | None, default=None, help="rows, which em-lightning run starts")
        parser.add_lightning_class_args(RunCheckpoint, "checkpoint")
        parser.add_lightning_class_args(self.recipe.report, "report")
        logger = {"save_dir": "lightning_logs", "name": self.script.stem, "default_hp_metric": False}
        parser.set_defaults(
            {
                "trainer.logger": {"class_path": "lightning.pytorch.loggers.TensorBoardLogger", "init_args": logger},
                "trainer.num_sanity_val_steps": 0,
                "trainer.enable_model_summary": False,
                "checkpoint.filename": "last",
                "checkpoint.save_on_train_epoch_end": True,
                "checkpoint.enable_version_counter": False,
            }
        )
        for name in self.recipe.data_to_model:
            target = f"model.init_args.{name}" if self.recipe.model_subclasses else f"model.{name}"
            parser.link_arguments(f"data.{name}", target, apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the arguments, or print the short help and exit; ValueError if an argument is wrong."""
        if {"-h", "--help"} & set(args):
            print(self.short_help(parser))
            raise SystemExit(0)
        keys = [arg.partition("=")[0].removeprefix("--") for arg in args if arg.startswith("--")]
        for name in self.recipe.data_to_model:  # if the model is a subclass, jsonargparse would ignore the given value
            if {f"model.{name}", f"model.init_args.{name}"} & set(keys):
                raise ValueError(f"model.{name} must not be given, because it is the data's {name}")
        try:
            super().parse_arguments(parser, ["--help" if arg == "--help=all" else arg for arg in args])
        except ArgumentError as error:
            message = " ".join(str(error).split())
            known = [key.replace(".init_args", "") for key in parser.get_defaults().keys(branches=True)]
            for key in keys:
                if key not in known and key.rpartition(".")[2] in message:
                    near = difflib.get_close_matches(key, [other for other in known if "." in other], n=1)
                    message += f" Did you mean --{near[0]}?" if near else ""
            raise ValueError(message) from error

    def instantiate_trainer(self, **options: Any) -> Any:
        """Return the trainer, with a progress bar in terminals only, unless configured, and atomic checkpoints."""
        if self.config.trainer.enable_checkpointing is False:
            self.parser.callback_keys.remove("checkpoint")  # with it, Lightning would raise
        settings = self.config_init.trainer
        callbacks = [settings.callbacks] if isinstance(settings.callbacks, Callback) else settings.callbacks or []
        if settings.logger is False:  # LearningRateMonitor raises without a logger
            callbacks = [each for each in callbacks if not isinstance(each, LearningRateMonitor)]
        if not any(isinstance(each, ProgressBar) for each in callbacks) and settings.enable_progress_bar is not False:
            if sys.stderr.isatty():
                # RichProgressBar hides the last line. Refresh every fifth step, as a refresh takes 0.3 ms.
                callbacks = [*callbacks, TQDMProgressBar(refresh_rate=5)]
            elif settings.enable_progress_bar is None:
                settings.enable_progress_bar = False
        try:
            trainer = super().instantiate_trainer(callbacks=list(callbacks), **options)
        except (ValueError, MisconfigurationException) as error:
            raise ValueError(f"the trainer cannot be built: {error}") from error
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        return trainer

    def fit(self) -> None:
        """Print a line on the data and one on the model, then train."""
        if self.trainer.is_global_zero:
            self.datamodule.prepare_data()
            self.datamodule.setup("fit")
            print(f"Data: {self.datamodule.describe()}")
            parameters = [p.numel() for p in self.model.parameters() if p.requires_grad]
            print(f"Model: {type(self.model).__name__} with {sum(parameters):,} trainable parameters")
        try:
            self.trainer.fit(self.model, self.datamodule, ckpt_path=self.config.ckpt_path, weights_only=True)
        except RuntimeError as error:
            if message := connection_error(error):
                raise ConnectionError(message) from error
            raise

    def short_help(self, parser: LightningArgumentParser) -> str:
        """Return the recipe's docstring, and its own arguments with their defaults, on one screen."""
        shown = ("model.", "data.", "report.", "seed_everything", "trainer.max_epochs", "trainer.accelerator")
        defaults = parser.get_defaults().items()
        listed = {key: value for key, value in defaults if key.startswith(shown) and value is not None}
        options = [f"--{k.replace('.init_args', '').replace('.class_path', '')}={value}" for k, value in listed.items()]
        variants = ", ".join(variants_of(self.script)) or "none"
        paragraphs = (
            f"Arguments with defaults: {' '.join(options)}",
            f"--config NAME or FILE: a config on top of the default one; variants: {variants}. --seeds 0,1,2: one run "
            "per seed, and one table of all. --jobs N: parallel runs, by default one per GPU or, on CPUs, per core.",
            "--help=all: all arguments. --print_config: the whole config.",
        )
        filled = (textwrap.fill(text, 100, break_on_hyphens=False) for text in paragraphs)
        return "\n\n".join([docstring(self.script), *filled])
