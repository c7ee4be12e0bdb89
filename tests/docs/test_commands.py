"""Every command that README and docs/ show: taken by the product's parsers and checks, and run where that is cheap."""

from __future__ import annotations

import argparse
import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch.distributed.run
import transformers
import yaml
from hydra._internal.utils import get_args_parser

from launch import cli
from launch.doctor.command import add_arguments
from launch.sweeps.search import Search
from launch.sweeps.trials import expand, folder_of
from tests.docs import scene
from tests.docs.commands import NAMED, lines, variants, words
from tests.docs.pages import PAGES, ROOT, Block, all_blocks, sentences, write_files
from trainer.__main__ import guarded
from trainer.checkpoint.format import folder_name
from trainer.checkpoint.retention import DAMAGED
from trainer.config.compose import load, load_sized
from trainer.plugin_checks import check_plugins
from trainer.resilience.interruption import SAVE, STOP

# Runs of the pages' commands last seconds by these, each where the command does not say otherwise.
SMALL = [
    "experiment=smoke", "train.steps=2", "checkpoint.every=0", "eval.every=2", "sample.count=0", "track.report=false",
    "track.wandb.mode=disabled", "run.fresh=true",
]  # fmt: skip


def onecurve(given: list[str], run: bool) -> None:
    """Parses; runs what is cheap, and of the rest composes and checks what it would start."""
    arguments = cli.parse(given)
    name = next(name for name in (" ".join(given[:2]), given[0]) if name in COMMANDS)
    COMMANDS[name](arguments, run)


def runs(arguments: argparse.Namespace, run: bool) -> None:
    if run:
        assert arguments.func(arguments) == 0


def pack(arguments: argparse.Namespace, run: bool) -> None:
    shutil.rmtree(arguments.out, ignore_errors=True)  # the folder has what another page's command made
    runs(arguments, run)
    assert not run or (arguments.out / "dataset.json").is_file()


def restore(arguments: argparse.Namespace, run: bool) -> None:
    name = folder_name(2)
    (arguments.run_dir / "checkpoints" / name).rename(arguments.run_dir / "checkpoints" / f"{DAMAGED}{name}")
    runs(arguments, run)
    assert (arguments.run_dir / "checkpoints" / name).is_dir() == run


def composed(arguments: argparse.Namespace, run: bool) -> None:
    """What it trains, or plans for, is a config that is taken; the slow test starts it."""
    check_plugins(load_sized(arguments.overrides, arguments.procs, arguments.config_dir)[0])


def submit(arguments: argparse.Namespace, run: bool) -> None:
    arguments.print_only = True
    assert arguments.func(arguments) == 0


def sweep(arguments: argparse.Namespace, run: bool) -> None:
    overrides, procs, config_dir = arguments.overrides, arguments.procs, arguments.config_dir
    if arguments.trials:
        folder = folder_of(overrides, config_dir)
        next(Search(overrides, arguments.trials, arguments.metric, procs, folder, config_dir).trials())
    else:
        assert len(expand(overrides, procs, config_dir)) > 1


def parsed(arguments: argparse.Namespace, run: bool) -> None:
    """Parsing is all that is done here; the slow test runs it."""


COMMANDS: dict[str, Callable[[argparse.Namespace, bool], None]] = {
    "train": composed, "plan": composed, "sweep": sweep, "submit": submit, "doctor": parsed,
    "data pack": pack, "checkpoint restore": restore,
    **dict.fromkeys(("data index", "data check", "data order", "data stats"), runs),
    **dict.fromkeys(("checkpoint ls", "checkpoint verify", "checkpoint diff", "checkpoint prune"), runs),
    **dict.fromkeys(("recipes", "sample", "report", "evaluate", "replay", "export"), runs),
    **dict.fromkeys(("status", "logs", "cancel"), runs),
}  # fmt: skip


def module(given: list[str], procs: int) -> None:
    """`-m MODULE ...`, or a file of the project, on so many processes."""
    if given[0] != "-m":
        assert (ROOT / given[0]).is_file(), f"{given[0]}: no such file"
        return
    name, rest = given[1], given[2:]
    assert importlib.util.find_spec(name), f"{name}: no such module"
    if name == "launch.doctor":
        parser = argparse.ArgumentParser()
        add_arguments(parser)
        parser.parse_args(rest)
    elif rest == ["--help"]:
        assert guarded(rest, 0.0) == 0
    elif name == "trainer":
        check_plugins(load(get_args_parser().parse_args(rest).overrides, procs))


def torchrun(given: list[str], run: bool, procs: str = "1") -> None:
    arguments = torch.distributed.run.get_args_parser().parse_args(["--nproc-per-node", procs, *given])
    assert arguments.module
    nodes = int(arguments.nnodes.rpartition(":")[2])
    module(["-m", arguments.training_script, *arguments.training_script_args], nodes * int(arguments.nproc_per_node))


def by_others(count: argparse.ArgumentParser, given: list[str], run: bool) -> None:
    """Of another launcher only the number of processes is looked at: it is not installed everywhere."""
    place = given.index("python")
    arguments, _ = count.parse_known_args(given[:place])
    module(given[place + 1 :], arguments.n * arguments.nodes)


def counted(*options: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument(*options, dest="n", type=int, required=True)
    parser.add_argument("--nodes", type=int, default=1)
    return parser


def make(given: list[str], run: bool) -> None:
    """Asks make what it would do: the targets install what is downloaded, and run for minutes."""
    subprocess.run(["make", "-n", *given], cwd=ROOT, check=True, capture_output=True)


def touch(given: list[str], run: bool) -> None:
    """The file is one that a run looks for; tests/end_to_end/test_stops.py makes both under real runs."""
    assert Path(given[0]).name in (STOP, SAVE)
    assert Path(given[0]).parent.is_dir()


def pip(given: list[str], run: bool) -> None:
    """Nothing is downloaded here; what is asked for of ours has to be there to be installed."""
    extras = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text().partition("optional-dep")[2], re.M)
    wanted = re.findall(r"\[(.+?)\]", " ".join(given))
    assert set(wanted) <= {*extras}, f"the extras are {extras}"


def sbatch(given: list[str], run: bool) -> None:
    """`onecurve submit` writes that file; tests/slurm submits it to a real Slurm."""
    assert re.fullmatch(r"runs/mine/slurm/\d+/job\.sbatch", given[0])


PROGRAMS: dict[str, Callable[[list[str], bool], None]] = {
    "onecurve": onecurve,
    "python": lambda given, run: module(given, 1),
    "torchrun": torchrun,
    "mpirun": partial(by_others, counted("-np")),
    "mpiexec": partial(by_others, counted("-n")),
    "srun": partial(by_others, counted("--ntasks-per-node")),
    "make": make,
    "touch": touch,
    "pip": pip,
    "sbatch": sbatch,
}


def program(line: str) -> str:
    return Path(line.split(" ")[0]).name


def is_script(block: Block) -> bool:
    """Whether bash has to run it to know what its commands are."""
    return block.language == "bash" and "\ndone\n" in block.text


def is_commands(block: Block) -> bool:
    return block.language in ("", "bash") and program(block.first) in PROGRAMS


SHOWN = [(block.page, line) for block in all_blocks() if is_commands(block) for line in lines(block.text)]
SHOWN_ONCE = list(dict.fromkeys((page, command) for page, line in SHOWN for command in variants(line)))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pages")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        scene.build(folder)
    return folder


@pytest.fixture
def folder(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the pages' folder, which is the working folder."""
    folder = tmp_path / "here"
    shutil.copytree(built, folder)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    scene.forget_package()
    yield folder
    scene.forget_package()


def package(page: str, folder: Path) -> None:
    """The files that a page shows, and those that it only speaks of."""
    write_files(page, folder)
    for group, name, text in (
        ("model", "net", "name: my_package.net:Net\nwidth: 64\n"),  # README says so in a sentence
        ("objective", "gan", "name: tests.recipes.gan:GAN\n"),
    ):
        file = folder / "my_conf" / group / f"{name}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            file.write_text(text)


@pytest.mark.parametrize(("page", "command"), SHOWN_ONCE, ids=[f"{page}: {command}" for page, command in SHOWN_ONCE])
def test_a_command_of_a_block_is_taken_and_does_what_it_says(page: str, command: str, folder: Path) -> None:
    package(page, folder)
    first, *given = words(command, folder)
    PROGRAMS[program(first)](given, True)


@pytest.mark.parametrize("page", PAGES)
def test_commands_within_sentences_are_taken(page: str, folder: Path) -> None:
    package(page, folder)
    for text in sentences(page):
        if program(text) in PROGRAMS and " " in text and not text.startswith("srun --"):
            for command in variants(named(text), NAMED):
                first, *given = words(command, folder)
                try:
                    PROGRAMS[program(first)](given, False)
                except (Exception, SystemExit) as error:
                    raise AssertionError(f"{page}: `{text}`, taken as `{command}`") from error


def named(text: str) -> str:
    """The command with what it needs, where a sentence only names it, or an option of it."""
    for name, rest in NAMED.items():
        bare, options = text[: len(name)], text[len(name) :].split()
        if bare == name and all(option.startswith("-") for option in options):
            return " ".join([name, rest, *options])
    return text


def test_the_loop_over_machines_starts_ranks_that_fit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """bash runs it, with an ssh that only says what it was to run where."""
    (script,) = [block for block in all_blocks() if is_script(block)]
    (folder / "bin").mkdir()
    (folder / "bin" / "ssh").write_text('#!/bin/sh\nprintf "%s\\0%s\\0" "$2" "$3"\n')
    (folder / "bin" / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder / "bin"), prepend=":")
    done = subprocess.run(["bash", "-euc", script.text], cwd=folder, capture_output=True, text=True, check=True)
    told = done.stdout.split("\0")[:-1]
    started = dict(zip(told[::2], told[1::2], strict=True))
    assert sorted(started) == ["node1", "node2", "node3"]
    for number, machine in enumerate(sorted(started)):
        change, _, command = started[machine].partition(" && ")
        assert change == f"cd {folder}"
        assert f"--nnodes 3 --node-rank {number} " in command
        assert f"run.dir={folder}/runs/mine" in command
        torchrun(words(command, folder)[1:], True)


def test_the_pods_of_kubernetes_start_ranks_that_fit() -> None:
    (block,) = [block for block in all_blocks() if block.language == "yaml" and not block.file]
    spec = yaml.safe_load(block.text)["spec"]
    (pods,) = spec["pytorchReplicaSpecs"].values()
    (container,) = pods["template"]["spec"]["containers"]
    assert str(container["resources"]["limits"]["nvidia.com/gpu"]) == spec["nprocPerNode"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {
        volume["name"] for volume in pods["template"]["spec"]["volumes"]
    }
    first, *given = container["command"]
    assert first == "torchrun"
    torchrun(["--nnodes", str(pods["replicas"]), *given], True, procs=spec["nprocPerNode"])


# Of the adversarial run the page shows one key; the rest is the reader's (tests/recipes trains one).
STARTED = [
    (page, command)
    for page, command in SHOWN_ONCE
    if re.match(r"onecurve (train|sweep|plan|doctor)|torchrun", command) and "objective=gan" not in command
]


@pytest.mark.slow
@pytest.mark.parametrize(("page", "command"), STARTED, ids=[f"{page}: {command}" for page, command in STARTED])
def test_what_a_command_starts_ends_well(page: str, command: str, folder: Path) -> None:
    """On this machine, for two steps, of a small model where none is named."""
    package(page, folder)
    if "model.weights=weights/gpt2" in command:
        shape = {"vocab_size": 257, "n_positions": 64, "n_embd": 128, "n_layer": 4, "n_head": 2}  # that of `SMALL`
        small = transformers.GPT2Config(**shape, bos_token_id=0, eos_token_id=0)
        transformers.GPT2LMHeadModel(small).save_pretrained(folder / "weights" / "gpt2")
    first, *given = words(command, folder)
    if "doctor" not in command and "plan" not in command:
        taught = [text.replace("'", "") for text in scene.TRAIN] if "models.frozen" in command else []  # as its teacher
        keys = {word.partition("=")[0] for word in given}
        given += [text for text in (*SMALL, *taught) if text.partition("=")[0] not in keys]
    if "--trials" in given:
        given[given.index("--trials") + 1] = "2"
    start = {"onecurve": "onecurve", "torchrun": "torch.distributed.run"}[first]
    done = subprocess.run(
        [sys.executable, "-m", start, *given], cwd=folder, capture_output=True, text=True, timeout=600
    )
    if "doctor" in command:  # what this machine lacks is its own matter
        assert done.returncode in (0, 4), done.stdout + done.stderr
    else:
        assert done.returncode == 0, done.stdout + done.stderr
