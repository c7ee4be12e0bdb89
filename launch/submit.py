"""`onecurve submit [--print-only] [overrides]`: writes the job of a run, or of a sweep, and submits it to Slurm.

The whole config, the overrides and the revision of the code lie beside the script: the job uses the config that was
checked, even if its files change while the job is queued.
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
    """One run, or the runs of a sweep, to submit. `folder` is the run's, or the one that contains the sweep's runs."""

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
        """The path of the log below `folder`, with sbatch's patterns."""
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
        _check_data(job.configs[0])
    _refuse_second_job(job)
    verdict = slurm_queue.test_only(_script(job, 1))  # before anything is written
    if arguments.test_only:
        print(verdict)
        return 0
    script, jobs = write(job), list[str]()
    for _ in range(job.launch.chain):
        jobs.append(slurm_queue.submit(script))
        slurm_queue.note(job.folder, jobs[-1])
        if job.sweep:
            for task, config in enumerate(job.configs):
                slurm_queue.note(folder_of(config), f"{jobs[-1]}_{task}")
    log = job.folder / job.log.replace("%j", jobs[0]).replace("%A_%a", f"{jobs[0]}_0")
    array_text = f"{len(job.configs)} runs, each on " if job.sweep else ""
    print(f"{job.name}: submitted as job {' '.join(jobs)}: {array_text}{job.launch.nodes} node(s)")
    print(f"\nscript  {script}\nlog     {log}\n\nnext:")
    for command in ("status", "logs --follow", "cancel"):
        print(f"  onecurve {command} {shlex.quote(str(job.folder))}")
    return 0


def compose_config(overrides: list[str], config_dir: str | None) -> Job:
    """Composes and checks the configs of a job. Raises ConfigError with all problems."""
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
    if other_launches := [config.launch.name for config in configs if config.launch.command != "submit"]:
        raise ConfigError(f"launch={other_launches[0]}: submit needs launch=slurm, or none named")
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
    """Writes a job's files, each job in new folders, and returns the script. Raises ConfigError if it cannot."""
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
        versions, diff = revision(Path.cwd())
        replace_file(files / "overrides.txt", (shown_command(job.overrides) + "\n").encode())
        replace_file(files / "revision.json", (json.dumps(versions, indent=1) + "\n").encode())
        if diff:
            replace_file(files / "changes.diff", prose(diff).encode())
        replace_file(files / "job.sbatch", _script(job, number).encode())
    except Timeout:
        raise ConfigError(f"run.dir={job.folder}: {locks.describe_run_lock(job.folder)}; stop it first") from None
    except OSError as error:
        raise ConfigError(f"run.dir={job.folder}: {locks.describe_refusal(error)}; choose another run.dir") from None
    return files / "job.sbatch"


def _script(job: Job, number: int) -> str:
    tasks = [
        Task(folder_of(config), folder_of(config) / "slurm" / str(number) / "config.yaml") for config in job.configs
    ]
    log = str(job.folder).replace("%", "%%") + "/" + job.log
    return render(job.launch, job.name, tasks, Path(log), Path.cwd(), array=job.sweep is not None)


def _refuse_second_job(job: Job) -> None:
    """Raises ConfigError if a job of the run is queued: a second one would wait for its folder, and fail."""
    folders = {number: folder for folder in map(folder_of, job.configs) for number in slurm_queue.jobs_of(folder)}
    for name, state in slurm_queue.active(list(folders)).items():
        folder = folders.get(name) or folders[name.partition("_")[0]]
        advice = f"`onecurve cancel {shlex.quote(str(folder))}` first, or choose another run.name"
        raise ConfigError(f"run.dir={folder}: job {name} of this run is {state}: {advice}")


def _check_data(config: Config) -> None:
    """Raises the ConfigError or DataError that the ranks would fail with, hours later."""
    from trainer.plugin_checks import check_plugins
    from trainer.pretrained import open_pretrained  # late: torch
    from trainer.run_data import open_shards
    from trainer.topology import ALONE

    check_plugins(config)
    open_pretrained(config, ALONE, open_shards(_with_one_remote_shard(config), ALONE).tokenizer)


def _with_one_remote_shard(config: Config) -> Config:
    """Returns the config with only the first of the shards that come over the network: the nodes check all of them."""
    from trainer.data.shard_spec import expand
    from trainer.data.storage import is_url

    def keep_one_url(spec: Any, key: str) -> Any:
        patterns = [spec] if isinstance(spec, str) else spec or []
        if not any(map(is_url, patterns)):
            return spec
        urls = expand(spec, key, allow_pipe=config.data.allow_pipe)
        return [url for url in urls if not is_url(url)] + [url for url in urls if is_url(url)][:1]

    data = config.data
    sources = {
        name: source.model_copy(update={"shards": keep_one_url(source.shards, f"data.sources.{name}.shards")})
        for name, source in data.sources.items()
    }
    shards, validation = keep_one_url(data.shards, "data.shards"), keep_one_url(data.validation, "data.validation")
    reduced = data.model_copy(update={"shards": shards, "sources": sources, "validation": validation})
    return config.model_copy(update={"data": reduced})
