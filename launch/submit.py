"""`onecurve submit [--print-only] [overrides]`: writes the job of a run, or of a sweep, and gives it to Slurm.

Beside the script lie the whole config, the overrides and the revision of the code: the config that is queued is the one
that was checked, whatever becomes of its files.
"""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from filelock import Timeout

from launch import slurm_queue
from launch.jobscript import Task, render
from launch.revision import revision
from launch.sweep import processes_of
from launch.sweeps.trials import Sweep, expand
from launch.sweeps.trials import folder_of as trials_folder
from trainer import locks
from trainer.config import Config
from trainer.config import sweep as grammar
from trainer.config.compose import load, load_sized
from trainer.config.launch import Slurm
from trainer.errors import ConfigError
from trainer.files import replace_file
from trainer.secrets import prose, shown_command

CANCELLED = "slurm/cancelled"  # a job's id on each line; slurm/job.sh reads it, too


class Job(NamedTuple):
    """What is submitted: one run, or those of a sweep. `folder`: the run's, or the one that the sweep's runs lie in."""

    name: str
    folder: Path
    configs: list[Config]
    overrides: list[str]
    sweep: Sweep | None = None

    @property
    def launch(self) -> Slurm:
        return self.configs[0].launch

    @property
    def log(self) -> str:
        """In sbatch's words, below `folder`."""
        return "logs/slurm-%A_%a.log" if self.sweep else "logs/slurm-%j.log"


def add_commands(commands: Any) -> None:
    parser = commands.add_parser("submit", help="train on a Slurm cluster")
    parser.add_argument("--print-only", action="store_true", help="print the script; write and submit nothing")
    parser.add_argument("--test-only", action="store_true", help="let Slurm judge the script; submit nothing")
    parser.add_argument("--unchecked-data", action="store_true", help="where the shards can be seen on the nodes alone")
    parser.add_argument("--config-dir", help="folder with config groups of your own")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="launch=slurm is taken, if none is named")
    parser.set_defaults(func=submit)


def submit(arguments: argparse.Namespace) -> int:
    job = compose_config(arguments.overrides, arguments.config_dir)
    if arguments.print_only:
        print(_script(job, 1), end="")
        return 0
    if not slurm_queue.is_here():
        raise ConfigError("submit: there is no sbatch here; run it where Slurm is, or look with --print-only")
    if not arguments.unchecked_data:
        _look_at_data(job.configs[0])
    _refuse_twice(job)
    judged = slurm_queue.test_only(_script(job, 1))  # before anything is written
    if arguments.test_only:
        print(judged)
        return 0
    script, jobs = write(job), list[str]()
    for _ in range(job.launch.chain):
        jobs.append(slurm_queue.submit(script))
        slurm_queue.note(job.folder, jobs[-1])
        if job.sweep:
            for task, config in enumerate(job.configs):
                slurm_queue.note(folder_of(config), f"{jobs[-1]}_{task}")
    log = job.folder / job.log.replace("%j", jobs[0]).replace("%A_%a", f"{jobs[0]}_0")
    what = f"{len(job.configs)} runs, each on " if job.sweep else ""
    print(f"{job.name}: submitted as job {' '.join(jobs)}: {what}{job.launch.nodes} node(s)")
    print(f"\nscript  {script}\nlog     {log}\n\nnext:")
    for command in ("status", "logs --follow", "cancel"):
        print(f"  onecurve {command} {shlex.quote(str(job.folder))}")
    return 0


def compose_config(overrides: list[str], config_dir: str | None) -> Job:
    """The checked configs. Raises ConfigError with all problems."""
    if not any(text.lstrip("+").startswith("launch=") for text in overrides):
        overrides = ["launch=slurm", *overrides]
    sweep = None
    if grammar.jobs(overrides)[0]:
        procs = processes_of(overrides, config_dir)
        trials = expand(overrides, procs, config_dir)
        folder = trials_folder(overrides, config_dir).absolute()
        sweep = Sweep(folder, list(trials[0].values), procs, config_dir, trials)
        configs = [load(trial.overrides, procs, config_dir) for trial in trials]
    else:
        configs = [load_sized(overrides, None, config_dir)[0]]
    if other := [config.launch.name for config in configs if config.launch.command != "submit"]:
        raise ConfigError(f"launch={other[0]}: submit needs launch=slurm, or none named")
    if any(config.launch != configs[0].launch for config in configs):
        raise ConfigError("launch: cannot be swept: the runs of a sweep are one job array")
    if sweep and configs[0].launch.chain > 1:
        raise ConfigError(f"launch.chain={configs[0].launch.chain}: a sweep is a job array, which cannot be chained")
    if "\n" in str(sweep.folder if sweep else folder_of(configs[0])):
        raise ConfigError("run.dir: has a line break, which a script of Slurm cannot have in a path")
    return Job(configs[0].run.name, sweep.folder if sweep else folder_of(configs[0]), configs, overrides, sweep)


def folder_of(config: Config) -> Path:
    return Path(config.run.dir).expanduser().absolute()


def write(job: Job) -> Path:
    """The job's files, in folders of their own; gives the script. Raises ConfigError where a folder takes none."""
    try:
        for config in job.configs:
            folder = folder_of(config)
            if config.run.fresh and folder.exists():
                from trainer.run_directory import set_aside  # late: torch

                set_aside(folder)
            (folder / "logs").mkdir(parents=True, exist_ok=True)
        number = 1
        while (job.folder / "slurm" / str(number)).exists():
            number += 1
        for config in job.configs:
            files = folder_of(config) / "slurm" / str(number)
            files.mkdir(mode=0o700, parents=True, exist_ok=True)
            values = config.with_secrets()
            values["run"]["fresh"] = False  # done
            replace_file(files / "config.yaml", yaml.safe_dump(values, sort_keys=False).encode())
            (files / "config.yaml").chmod(0o600)  # addresses may have passwords
        (job.folder / "logs").mkdir(parents=True, exist_ok=True)
        if job.sweep:
            job.sweep.save()
        files = job.folder / "slurm" / str(number)
        files.mkdir(mode=0o700, parents=True, exist_ok=True)
        about, diff = revision(Path.cwd())
        replace_file(files / "overrides.txt", (shown_command(job.overrides) + "\n").encode())
        replace_file(files / "revision.json", (json.dumps(about, indent=1) + "\n").encode())
        if diff:
            replace_file(files / "changes.diff", prose(diff).encode())
        replace_file(files / "job.sbatch", _script(job, number).encode())
    except Timeout:
        raise ConfigError(f"run.dir={job.folder}: {locks.describe_run_lock(job.folder)}; stop it first") from None
    except OSError as error:
        raise ConfigError(f"run.dir={job.folder}: {locks.refused(error)}; choose another run.dir") from None
    return files / "job.sbatch"


def _script(job: Job, number: int) -> str:
    tasks = [
        Task(folder_of(config), folder_of(config) / "slurm" / str(number) / "config.yaml") for config in job.configs
    ]
    log = str(job.folder).replace("%", "%%") + "/" + job.log
    return render(job.launch, job.name, tasks, Path(log), Path.cwd(), array=job.sweep is not None)


def _refuse_twice(job: Job) -> None:
    """Two jobs in one folder: the second would wait, and fail."""
    known = {number: folder for folder in map(folder_of, job.configs) for number in slurm_queue.jobs_of(folder)}
    for name, state in slurm_queue.active(list(known)).items():
        folder = known.get(name) or known[name.partition("_")[0]]
        way = f"`onecurve cancel {shlex.quote(str(folder))}` first, or choose another run.name"
        raise ConfigError(f"run.dir={folder}: job {name} of this run is {state}: {way}")


def _look_at_data(config: Config) -> None:
    """Raises ConfigError or DataError for what the ranks would end with, hours later."""
    from trainer.plugin_checks import check_plugins
    from trainer.pretrained import open_pretrained  # late: torch
    from trainer.run_data import open_shards
    from trainer.topology import ALONE

    check_plugins(config)
    open_pretrained(config, ALONE, open_shards(_glanced_at(config), ALONE).tokenizer)


def _glanced_at(config: Config) -> Config:
    """The config with one shard of those that come over the network: all of them are for the nodes to look through."""
    from trainer.data.shard_spec import expand
    from trainer.data.storage import is_url

    def one(spec: Any, key: str) -> Any:
        patterns = [spec] if isinstance(spec, str) else spec or []
        if not any(map(is_url, patterns)):
            return spec
        found = expand(spec, key, allow_pipe=config.data.allow_pipe)
        return [url for url in found if not is_url(url)] + [url for url in found if is_url(url)][:1]

    data = config.data
    sources = {
        name: source.model_copy(update={"shards": one(source.shards, f"data.sources.{name}.shards")})
        for name, source in data.sources.items()
    }
    shards, validation = one(data.shards, "data.shards"), one(data.validation, "data.validation")
    looked_at = data.model_copy(update={"shards": shards, "sources": sources, "validation": validation})
    return config.model_copy(update={"data": looked_at})
