"""The command line: recipes, configs, runs, copies, audits and error messages."""

import ast
import errno
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from em_lightning import cli
from em_lightning.cli.audit import load_model
from em_lightning.cli.recipes import config_of, docstring, recipes, variants_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script"),
    pytest.mark.filterwarnings("ignore:.*args parameter is intended"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*logging interval"),
]
ROOT = Path(__file__).parents[1]
SMALL = [
    "--data.num_points=64",
    "--data.train_clouds=16",
    "--data.val_clouds=4",
    "--data.test_clouds=4",
    "--data.batch_size=8",
    "--model.num_components=3",
    "--model.num_iters=2",
    "--trainer.max_epochs=1",
    "--trainer.enable_progress_bar=false",
    "--trainer.accelerator=cpu",
    "--trainer.log_every_n_steps=1",
]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Run the test in a temporary folder and return the folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def configs():
    for name, script in recipes().items():
        yield pytest.param(name, config_of(script), id=name)
        for variant, path in variants_of(script).items():
            yield pytest.param(name, path, id=f"{name}/{variant}")


def with_local_data(argument):
    """Return the argument with the local path of the data instead of PATH/TO/x; skip the test if there is no copy."""
    if "PATH/TO/" not in argument:
        return argument
    found = sorted((ROOT.parent / "shared" / "data").rglob(Path(argument).name))
    return str(found[0]) if found else pytest.skip(f"needs {argument} beside the project")


# Of the rows of the comparison of activations that lose accuracy.
@pytest.mark.filterwarnings("ignore:.* over the 128 units of")
@pytest.mark.parametrize("name, config", list(configs()))
def test_every_config_runs_by_the_command_in_its_header(name, config, here):
    command, needs = config.read_text().splitlines()[:2]
    program, run, recipe, *arguments = shlex.split(command.removeprefix("# "))
    assert (program, run, recipe) == ("em-lightning", "run", name)
    assert arguments[:2] == ([] if config.stem == name else ["--config", config.stem])
    assert re.search("second|minute|hour", needs) and re.search("[GM]B", needs), f"{config}: time, memory"
    fast = ["--trainer.fast_dev_run=true", "--trainer.accelerator=cpu"]
    assert cli.main([run, recipe, *map(with_local_data, arguments), *fast]) == 0


def test_a_recipe_starts_with_a_sentence_and_is_short_apart_from_its_networks():
    for path in recipes().values():
        assert docstring(path).splitlines()[0].endswith(".")
        parts = ast.parse(path.read_text()).body
        definitions = sum(
            part.end_lineno - part.lineno + 3 for part in parts if isinstance(part, ast.ClassDef | ast.FunctionDef)
        )
        assert len(path.read_text().splitlines()) - definitions <= 60, path


def test_ls_lists_the_recipes(capsys):
    assert cli.main(["ls"]) == 0
    printed = capsys.readouterr().out
    assert "point_cloud_gmm" in printed and "geometric_shapes" in printed


def test_help_has_at_most_40_lines(here, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    for args in [[], ["cp"], ["run"], ["audit"], *(["run", name] for name in recipes())]:
        with pytest.raises(SystemExit, match="0"):
            cli.main([*args, "--help"])
        printed = capsys.readouterr().out
        assert len(printed.splitlines()) <= 40 and max(map(len, printed.splitlines())) <= 120, args
    assert "--model." in printed and "--trainer.max_epochs=" in printed
    with pytest.raises(SystemExit, match="0"):
        cli.main(["run", "point_cloud_gmm", "--help=all"])
    assert "--trainer.gradient_clip_val" in capsys.readouterr().out


def test_a_whole_config_can_be_printed_and_run(here, capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["run", "point_cloud_gmm", "--model.num_components=3", "--print_config"])
    Path("mine.yaml").write_text(capsys.readouterr().out)
    assert "num_components: 3" in Path("mine.yaml").read_text()
    assert cli.main(["run", "point_cloud_gmm", "--config", "mine.yaml", "--trainer.fast_dev_run=true"]) == 0


def test_a_copy_is_edited_and_run(here, capsys):
    assert cli.main(["cp", "point_cloud_gmm", "mine"]) == 0
    script, config, variant, pretrained = capsys.readouterr().out.split()
    assert [Path(path).stem for path in (variant, pretrained)] == ["geometric_shapes", "pretrained"]
    assert "em-lightning run point_cloud_gmm.py" in Path(script).read_text()
    Path(config).write_text(Path(config).read_text().replace("num_components: 16", "num_components: 5"))
    Path(variant).write_text("model: {lr: 0.5}\n")
    Path(script).write_text(Path(script).read_text().replace("recipe = ", "print('edited')\nrecipe = "))
    with pytest.raises(SystemExit, match="0"):
        cli.main(["run", script, "--config", "geometric_shapes", "--print_config"])
    printed = capsys.readouterr().out
    assert "edited" in printed and "num_components: 5" in printed and "lr: 0.5" in printed
    assert cli.main(["cp", "point_cloud_gmm", "mine"]) == 2
    assert script in capsys.readouterr().err


def test_a_run_writes_results_figures_and_tensorboard_events(here, capsys):
    assert cli.main(["run", "point_cloud_gmm", *SMALL]) == 0
    folder = here / "lightning_logs" / "point_cloud_gmm" / "version_0"
    written = {path.name for path in folder.iterdir()}
    pictures = {"clouds.png", "sizes.png", "times.png"}
    assert pictures | {"results.md", "results.json", "report.html", "config.yaml", "checkpoints"} <= written
    assert (folder / "checkpoints" / "last.ckpt").exists()
    rows = json.loads((folder / "results.json").read_text())["rows"]
    names = [row["method"] for row in rows]
    assert {"EM, tuned", "MAP-EM, tuned", "kernel density", "scikit-learn, tuned"} < set(names)
    assert names[-1] == "trained operator"
    assert all(row["N = 32"] < 10 and row["ms, N = 32"] > 0 for row in rows)
    printed = capsys.readouterr().out
    assert "Data: procedural surfaces" in printed and "| trained operator |" in printed
    files, command, verdict = printed.strip().splitlines()[-3:]
    assert verdict.startswith("The trained operator is ")
    assert files.startswith(f"Files in {folder.relative_to(here)}: clouds.png") and "results.md" in files
    assert command == f"TensorBoard: tensorboard --logdir {folder.parent.relative_to(here)}"
    page = (folder / "report.html").read_text()
    assert "/*DATA*/" not in page and "http" not in page

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    tags = events.Tags()
    assert {"clouds", "sizes", "times"} <= set(tags["images"])
    assert {"train/log_likelihood", "val/log_likelihood"} <= set(tags["scalars"])

    resumed = cli.main(
        ["run", "point_cloud_gmm", *SMALL, "--trainer.max_epochs=2", f"--ckpt_path={folder}/checkpoints/last.ckpt"]
    )
    assert resumed == 0
    history = json.loads((here / "lightning_logs/point_cloud_gmm/version_1/results.json").read_text())
    assert history["rows"][-1]["method"] == "trained operator"


@pytest.mark.slow
def test_seeds_run_in_separate_processes_and_are_combined(here, capfd, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert cli.main(["run", "point_cloud_gmm", *SMALL, "--seeds=0,1"]) == 0
    (table,) = (here / "lightning_logs" / "point_cloud_gmm").glob("*-seeds/results.md")
    assert "seeds 0, 1" in table.read_text() and " ± " in table.read_text()
    capfd.readouterr()
    assert cli.main(["run", "point_cloud_gmm", "--data", "PointCloudFolder", "--data.root=gone", "--seeds=5"]) == 2
    message = capfd.readouterr().err
    assert all(words in message for words in ("seed 5", "root='gone'", "output.txt"))
    assert cli.main(["run", "point_cloud_gmm", "--seeds=0,1", "--trainer.devices=2"]) == 2
    assert "--trainer.devices=2" in capfd.readouterr().err


@pytest.mark.parametrize(
    "args, words",
    [
        (["point_cloud_gm"], ["'point_cloud_gm'", "point_cloud_gmm,"]),
        (["mine.py"], ["'mine.py'", "recipe"]),
        (["point_cloud_gmm", "--config", "geometric"], ["--config='geometric'", "geometric_shapes"]),
        (["point_cloud_gmm", "--config=nowhere.yaml"], ["--config='nowhere.yaml'", "variant"]),
        (["point_cloud_gmm", "--trainer.max_epoch=3"], ["trainer.max_epoch", "trainer.max_epochs"]),
        (["point_cloud_gmm", "--model.num_component=3"], ["model.num_component", "model.num_components"]),
        (["point_cloud_gmm", "--model.num_components=many"], ["num_components", "many"]),
        (["point_cloud_gmm", "--model.num_components=0"], ["num_components=0", "at least 1"]),
        (["point_cloud_gmm", "--data.num_points=0"], ["num_points=0"]),
        (["point_cloud_gmm", "--data.num_point=9"], ["data.num_point", "data.num_points"]),
        (["point_cloud_gmm", "--data", "PointCloudFolder", "--data.root=/nowhere"], ["root='/nowhere'", "zip archive"]),
    ],
)
def test_invalid_arguments_print_one_line_and_exit_2(args, words, here, capsys):
    assert cli.main(["run", *args]) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("em-lightning: ") and all(word in message for word in words), message


def test_an_unknown_key_of_a_config_file_is_named(here, capsys):
    Path("mine.yaml").write_text("model:\n  num_compnents: 3\n")
    assert cli.main(["run", "point_cloud_gmm", "--config", "mine.yaml"]) == 2
    assert "num_compnents" in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_corrupt_mesh_is_named(here, capsys):
    (here / "meshes").mkdir()
    (here / "meshes" / "bad.off").write_text("OFF\n3 1 0\n0 0 0\n")
    assert cli.main(["run", "point_cloud_gmm", "--data", "PointCloudFolder", "--data.root=meshes"]) == 2
    assert "bad.off" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["cp", "run"])
def test_an_unwritable_folder_is_named_with_an_option_that_the_command_has(command, capsys, monkeypatch):
    def fail(*_):
        raise PermissionError(errno.EACCES, "Permission denied", "folder")

    monkeypatch.setattr(cli, {"cp": "copy", "run": "run"}[command], fail)
    assert cli.main([command, "gaussian_mixture"]) == 2
    words = capsys.readouterr().err
    assert "'folder'" in words and ("--trainer.logger.save_dir" in words) == (command == "run")


def test_a_programming_error_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(cli, "print_recipes", lambda: [].index(3))
    with pytest.raises(ValueError, match="3 is not in list"):
        cli.main(["ls"])


@pytest.mark.slow
def test_two_processes_train_to_the_same_likelihood(here):
    results = []
    for options in ([], ["--trainer.strategy=ddp", "--trainer.devices=2", "--data.batch_size=4"]):
        start = ["--model.init=farthest", "--model.num_starts=1"]  # deterministic start, equal on all ranks
        command = [sys.executable, "-m", "em_lightning.cli", "run", "point_cloud_gmm", *SMALL, *start, *options]
        done = subprocess.run(
            command, cwd=here, env={"PYTHONPATH": str(ROOT), "PATH": "", "OMP_NUM_THREADS": "1"}, capture_output=True
        )
        assert done.returncode == 0, done.stderr.decode()
        folder = here / "lightning_logs" / "point_cloud_gmm" / f"version_{len(results)}"
        rows = json.loads((folder / "results.json").read_text())["rows"]
        results.append(rows[-1]["N = 32"])
    assert len(list((here / "lightning_logs" / "point_cloud_gmm").iterdir())) == 2
    assert results[0] == pytest.approx(results[1], abs=0.02)


MODELS = """
import torch
from em_lightning.modules import PointCloudGMM

def classifier():
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3), torch.nn.Softmax(-1))

def needs(arguments):
    return None

def sized(sizes):
    return torch.nn.Linear(sizes.width, 3)

ready = classifier()
number = lambda: 3
"""


@pytest.mark.parametrize("name", ["classifier", "ready"])
def test_audit_marks_softmax_as_em(name, here, capsys):
    Path("networks.py").write_text(MODELS)
    assert cli.main(["audit", f"networks.py:{name}", "--input=5,8"]) == 0
    lines = capsys.readouterr().out.splitlines()
    relu, softmax = (next(line for line in lines if kind in line) for kind in ("ReLU", "Softmax"))
    assert "elementwise, no normalization, hard zeros" in relu and " no " in relu
    assert " yes " in softmax


def test_audit_loads_a_checkpoint(here, capsys):
    import lightning

    from em_lightning.modules import PointCloudGMM

    trainer = lightning.Trainer(logger=False, enable_checkpointing=False, max_steps=0, accelerator="cpu")
    trainer.strategy.connect(PointCloudGMM(num_components=3))
    trainer.save_checkpoint("trained.ckpt")
    args = ["audit", "em_lightning.modules:PointCloudGMM", "--input=2,40,3", "--ckpt_path=trained.ckpt"]
    assert cli.main(args) == 0
    assert "E-step" in capsys.readouterr().out


def test_audit_loads_a_checkpoint_with_its_surgery(here, capsys):
    import lightning

    from em_lightning.surgery import swap_activations

    Path("nets.py").write_text(
        "import lightning, torch\n"
        "class Net(lightning.LightningModule):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.layers = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.ReLU())\n"
        "    def forward(self, x):\n"
        "        return self.layers(x)\n"
    )
    model = load_model("nets.py:Net")
    swap_activations(model, "softmax_gated")
    trainer = lightning.Trainer(logger=False, enable_checkpointing=False, max_steps=0, accelerator="cpu")
    trainer.strategy.connect(model)
    trainer.save_checkpoint("swapped.ckpt")
    assert cli.main(["audit", "nets.py:Net", "--input=5,8", "--ckpt_path=swapped.ckpt"]) == 0
    assert "SoftmaxGatedActivation" in capsys.readouterr().out
    Path("nets.py").write_text(Path("nets.py").read_text().replace("8, 4", "8, 5"))
    assert cli.main(["audit", "nets.py:Net", "--input=5,8", "--ckpt_path=swapped.ckpt"]) == 2
    message = capsys.readouterr().err
    assert "--ckpt_path=swapped.ckpt" in message and "Net" in message and "size mismatch" in message


REAL = """
import dataclasses
import lightning
import torch
import torch.nn.functional as F
from torch import nn
from torch_geometric.data import Batch, Data
from torch_geometric.nn import GINConv


class Tokens(nn.Module):
    def __init__(self, vocabulary, width=8):
        super().__init__()
        self.embed, self.head = nn.Embedding(vocabulary, width), nn.Linear(width, vocabulary)

    def forward(self, input_ids, attention_mask=None):
        assert input_ids.max() < self.embed.num_embeddings and input_ids.dtype == torch.int64
        assert attention_mask is None or set(attention_mask.unique().tolist()) <= {0, 1}
        return self.head(self.embed(input_ids)).softmax(-1)


def ten():
    return Tokens(10)


class Two(nn.Module):
    def forward(self, x, y):
        return (x @ y).softmax(-1)


class Dictionary(nn.Module):
    def forward(self, batch):
        return (batch["left"] + batch["right"]).softmax(-1)


class Graphs(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = GINConv(nn.Linear(3, 4))

    def forward(self, data):
        return self.conv(data.x, data.edge_index).softmax(-1)


def graphs():
    edges = torch.tensor([[0, 1, 2], [1, 2, 0]])
    return Batch.from_data_list([Data(x=torch.randn(3, 3), edge_index=edges) for _ in range(2)])


@dataclasses.dataclass
class Sizes:
    width: int = 6


class Classifier(lightning.LightningModule):
    def __init__(self, sizes, classes):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Linear(sizes.width, classes)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch):
        return F.cross_entropy(self(batch["x"]), batch["y"])


def classifier():
    return Classifier(Sizes(), 3)


def labelled():
    return {"x": torch.randn(4, 6), "y": torch.tensor([0, 1, 2, 0])}
"""


@pytest.mark.parametrize(
    "args, operation",
    [
        (["real.py:ten", "--input=2,5:10"], "softmax"),
        (["real.py:ten", "--input=input_ids=2,5:7", "--input=attention_mask=2,5:2"], "softmax"),
        (["real.py:Tokens", "--input=2,5:7", "--init_args={vocabulary: 7}"], "softmax"),
        (["real.py:Two", "--input=2,3", "--input=3,5"], "softmax"),
        (["real.py:Two", "--input=y=3,5", "--input=x=2,3"], "softmax"),
        (["real.py:Dictionary", "--input=left=2,3", "--input=right=2,3"], "softmax"),
        (["real.py:Graphs", "--batch=graphs"], "softmax"),
        (["real.py:classifier", "--batch=labelled"], "cross-entropy"),
        (["real.py:classifier", "--batch=real.py:labelled"], "cross-entropy"),
    ],
)
def test_audit_takes_the_inputs_of_real_models(args, operation, here, capsys):
    Path("real.py").write_text(REAL)
    assert cli.main(["audit", *args]) == 0
    (row,) = [line for line in capsys.readouterr().out.splitlines() if f" {operation} " in line]
    assert row.split("  ")[-2].strip() == "yes" or " yes  " in row


def test_audit_loads_the_weights_of_any_module(here, capsys):
    Path("real.py").write_text(REAL)
    import torch

    args = ["audit", "real.py:ten", "--input=2,5:10", "--ckpt_path=weights.pt"]
    weights = load_model("real.py:ten").state_dict()
    torch.save(weights, "weights.pt")
    assert cli.main(args) == 0
    torch.save({"state_dict": {key: value[:9] for key, value in weights.items()}}, "weights.pt")
    assert cli.main(args) == 2
    message = capsys.readouterr().err
    assert "--ckpt_path=weights.pt" in message and "size mismatch" in message


def test_audit_loads_trusted_hyperparameters(here, capsys):
    Path("trusted.py").write_text(REAL)
    save = """
import lightning, trusted
trainer = lightning.Trainer(logger=False, enable_checkpointing=False, max_steps=0, accelerator="cpu")
trainer.strategy.connect(trusted.classifier())
trainer.save_checkpoint("trusted.ckpt")
"""
    subprocess.run([sys.executable, "-c", save], check=True, capture_output=True)
    args = ["audit", "trusted.py:Classifier", "--batch=labelled", "--ckpt_path=trusted.ckpt"]
    assert cli.main(args) == 2
    message = capsys.readouterr().err
    assert "Sizes" in message and "weights_only=False" in message
    assert cli.main([*args, "--weights_only=false"]) == 0
    assert "cross-entropy" in capsys.readouterr().out


@pytest.mark.parametrize(
    "args, words",
    [
        (["networks.py", "--input=5,8"], ["'networks.py'", "path/to/file.py:NAME"]),
        (["networks.py:clasifier", "--input=5,8"], ["'clasifier'"]),
        (["nowhere:Model", "--input=5,8"], ["nowhere:Model", "No module named 'nowhere'"]),
        (["networks.py:needs", "--input=5,8"], ["networks.py:needs", "'arguments'"]),
        (["networks.py:needs", "--input=5,8", "--init_args={arguments: 3}"], ["torch.nn.Module", "NoneType"]),
        (["networks.py:needs", "--input=5,8", "--init_args=3"], ["--init_args=3", "mapping"]),
        (["networks.py:needs", "--input=5,8", "--init_args={"], ["--init_args={"]),
        (["networks.py:ready", "--input=5,8:ten"], ["--input=5,8:ten", "8,128:50257"]),
        (["networks.py:ready", "--input=5,8:0"], ["--input=5,8:0", "shape"]),
        (["networks.py:ready", "--input=x=5,8", "--input=5,8"], ["--input=x=5,8 --input=5,8", "name all"]),
        (["networks.py:ready", "--input=x=5,8", "--input=x=5,8"], ["--input=x=5,8 --input=x=5,8", "name all"]),
        (["networks.py:ready", "--input=5,9"], ["--input=5,9", "5x9"]),
        (["networks.py:ready", "--input=features=5,8"], ["features must be of the arguments"]),
        (["networks.py:sized", "--input=5,8", "--init_args={sizes: {width: 8}}"], ["'width'", "dataclasses"]),
        (["networks.py:ready", "--batch=nothing"], ["'nothing'"]),
        (["networks.py:ready", "--batch=number"], ["--batch=number"]),
        (["networks.py:number", "--input=5,8"], ["'networks.py:number'", "torch.nn.Module", "int"]),
        (["network.py:ready", "--input=5,8"], ["network.py:ready", "No such file"]),
        (["networks.py:ready", "--input=5,8", "--ckpt_path=gone"], ["gone"]),
        (["networks.py:ready", "--input=5x8"], ["--input=5x8", "32,784"]),
    ],
)
def test_invalid_arguments_of_an_audit_print_one_line(args, words, here, capsys):
    Path("networks.py").write_text(MODELS)
    assert cli.main(["audit", *args]) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("em-lightning: ") and all(word in message for word in words), message


@pytest.mark.parametrize(
    "args, words",
    [
        (["--jobs=2"], "--jobs=2"),
        (["--model.num_features=700"], "model.num_features"),
        (["--model.init_args.num_classes", "3"], "model.num_classes"),
    ],
)
def test_options_without_effect_are_refused(args, words, here, capsys):
    assert cli.main(["run", "volume_control", *args]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("option, value", [("--seeds", "a"), ("--jobs", "two")])
def test_an_option_that_cannot_be_parsed_ends_with_exit_code_2(option, value, here, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["run", "volume_control", option, value])
    message = capsys.readouterr().err
    assert option in message and repr(value) in message


def test_a_key_of_another_class_names_the_chosen_class(here, capsys):
    assert cli.main(["run", "decoder_free_sae", "--data.root", "somewhere"]) == 2
    message = capsys.readouterr().err
    assert "root" in message and "Digits" in message and "Did you mean" not in message


def test_options_override_configs_given_after_them(here, capsys):
    Path("mine.yaml").write_text("model: {num_components: 4}\n")
    with pytest.raises(SystemExit, match="0"):
        cli.main(["run", "point_cloud_gmm", "--model.num_components=3", "--config=mine.yaml", "--print_config"])
    assert "num_components: 3" in capsys.readouterr().out


def test_a_copy_runs_as_a_script(here):
    assert cli.main(["cp", "volume_control", "mine"]) == 0
    environment = {"PYTHONPATH": str(ROOT), "PATH": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "mine/volume_control.py", "--trainer.fast_dev_run=true"]
    assert subprocess.run(command, env=environment, capture_output=True).returncode == 0


def test_checkpoints_can_be_switched_off(here):
    quick = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--report.figures=false"]
    assert cli.main(["run", "volume_control", *quick, "--trainer.enable_checkpointing=false"]) == 0
    assert not list(here.rglob("*.ckpt")) and list(here.rglob("results.json"))
