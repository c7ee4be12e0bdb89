"""`onecurve replay RUN_DIR --step K`: repeats a step of a run, and finds the sample that drives a spike."""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.progress import ReportProgress, progress

if TYPE_CHECKING:
    from trainer.replayed_step import Replay, Sample, SampleMetrics
    from trainer.spike_driver import SpikeDriver

PATIENCE_S = 10.0  # between two lines on how far it is, where stderr is not a terminal
STANDS_OUT = 3  # times the median: the gradient of a sample that is said to drive the step


def add_commands(commands: Any) -> None:
    parser = commands.add_parser(
        "replay",
        help="a recorded step again on one process: its samples, loss and gradient norm; --bisect finds who drives it",
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="is only read: the run may be going on")
    parser.add_argument("--step", type=int, required=True, metavar="K", help="the step, from 1 on")
    parser.add_argument(
        "--bisect", action="store_true", help="find the sample (or the document in it) that drives the gradient norm"
    )
    parser.add_argument(
        "--show", type=int, default=8, metavar="N", help="how many samples are listed, those of the highest loss first"
    )
    parser.add_argument(
        "--checkpoint",
        type=int,
        metavar="STEP",
        help="the one to begin with, 0: the initial weights (default: the nearest before the step)",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead, with all samples in their order")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="where its data or model.weights are, if not where its config.yaml says, such as data.shards=... with its "
        "secrets",
    )
    parser.add_argument("--plugins", nargs="*", default=[], help="packages of yours that the run's classes come from")
    parser.set_defaults(func=replay)


def replay(arguments: argparse.Namespace) -> int:
    from trainer import spike_driver
    from trainer.errors import ConfigError
    from trainer.replay import replay_step
    from trainer.tracking.jsonl import dumps

    with _progress() as report:
        result = replay_step(
            arguments.run_dir,
            arguments.step,
            report,
            plugins=arguments.plugins,
            checkpoint=arguments.checkpoint,
            overrides=arguments.set,
        )
        if arguments.bisect and not result.samples:
            raise ConfigError(f"--bisect: no sample of step {arguments.step} could be read in the run")
        parts = spike_driver.measure_samples(result, report, gradients=arguments.bisect)
        driver = spike_driver.find_driver(result, parts) if arguments.bisect else None
    if arguments.json:
        print(dumps(_json_object(result, parts, driver)))
        return 0
    print(*_summary_lines(result), sep="\n")
    if arguments.show > 0 and parts:
        print(*_sample_lines(result, parts, arguments.show), sep="\n")
    if driver:
        print(*_driver_lines(result, driver), sep="\n")
    return 0


@contextmanager
def _progress() -> Iterator[ReportProgress]:
    """Shows progress on stderr; where that is not a terminal, as a line at the start and then every few seconds."""
    if sys.stderr.isatty():
        with progress() as report:
            yield report
        return
    last_report = 0.0

    def print_progress(name: str, num_done: int, total: int) -> None:
        nonlocal last_report
        if num_done == 0 or time.monotonic() > last_report + PATIENCE_S:
            last_report = time.monotonic()
            print(name if num_done == 0 else f"{name}: {num_done} of {total}", file=sys.stderr, flush=True)

    yield print_progress


def _summary_lines(replay: Replay) -> Iterator[str]:
    """Yields where the replay began, and how its numbers compare with the recorded ones."""
    from trainer.replayed_step import LOSS, NORM

    step, (recorded_on, replayed_on) = replay.data.step, replay.devices
    origin = f"the checkpoint of step {replay.start}" if replay.start else "the initial weights"
    num_repeated = step - 1 - replay.start
    yield (
        f"step {step} of {replay.config.run.name}: {len(replay.samples)} samples, {replay.targets:,} targets; from "
        f"{origin}, {num_repeated} step{'s' * (num_repeated != 1)} done again"
    )
    differences = replay.numbers.relative_difference(replay.recorded)
    yield f"{'':15}{'recorded':>14}{'replayed':>14}{'apart':>10}"
    for title, *values in zip(("loss", "gradient norm"), replay.recorded, replay.numbers, differences, strict=True):
        yield f"{title:15}{values[0]:>14.7g}{values[1]:>14.7g}{values[2]:>10.1g}"
    if replay.numbers.agrees_with(replay.recorded):
        yield "the same as recorded"
    else:
        since = "" if replay.differs_since is None else f", from step {replay.differs_since} on"
        precision = replay.strategy.precision.compute
        where = f"recorded on {_printable(recorded_on)}, replayed on {replayed_on} in {precision}"
        yield f"not as recorded{since} ({where}; within {LOSS:g} and {NORM:g} only fp32 is the same everywhere)"
    ledger = {True: "the samples are those of ledger.jsonl", False: "other samples than those of ledger.jsonl"}
    if replay.in_ledger is not None:
        yield ledger[replay.in_ledger]


def _sample_lines(replay: Replay, parts: Sequence[SampleMetrics], count: int) -> Iterator[str]:
    """Yields a table of the samples with the largest gradients if they were measured, else with the highest losses."""
    from trainer.spike_driver import size

    width = shutil.get_terminal_size((120, 24)).columns
    pairs = sorted(zip(replay.samples, parts, strict=True), key=lambda pair: (-size(pair[1]), -pair[1].loss))
    names = [_name(replay, sample) for sample, _ in pairs[:count]]
    column = max(map(len, ["sample", *names]))
    title = "" if parts[0].grad_norm is None else f"{'norm':>10}"
    yield f"\n{'number':>10}{'loss':>10}{title}  {'sample':{column}}  content"
    for name, (sample, part) in zip(names, pairs, strict=False):
        line = f"{sample.number:>10}{_format_metrics(part)}  {name:{column}}  "
        yield line + _printable(_content(replay, sample))[: max(24, width - len(line))]
    if len(pairs) > count:
        yield f"{'':10}  and {len(pairs) - count} more; --show {len(pairs)} lists all"


def _format_metrics(part: SampleMetrics) -> str:
    return f"{part.loss:>10.4f}" + ("" if part.grad_norm is None else f"{part.grad_norm:>10.4g}")


def _driver_lines(replay: Replay, culprit: SpikeDriver) -> Iterator[str]:
    from trainer.spike_driver import size

    driver_norm, median_norm, step_norm = size(culprit.part), culprit.median, replay.numbers.grad_norm
    stands_out, without = driver_norm >= STANDS_OUT * median_norm, culprit.without
    place = culprit.documents[0].span if culprit.documents else (culprit.sample.spans or [culprit.sample.entry])[0]
    name = f"{_printable(' '.join(_place(place)))}, in number {culprit.sample.number} of the run"
    yield f"\nfound: {name}" if stands_out else f"\nnone stands out; the largest gradient: {name}"
    if culprit.documents:
        visibility = "" if replay.config.data.document_mask else ", each of which sees those before it"
        yield f"the documents packed there{visibility}:"
    for piece, part in culprit.documents:
        yield f"{'':10}{_format_metrics(part)}  {_printable(' '.join(_place(piece)))}"
    median = f"the median of the samples is {median_norm:.4g}"
    yield f"its part of the gradient has norm {driver_norm:.4g}, {median}, the step {step_norm:.4g}"
    if without is not None:
        loss = replay.numbers.loss
        yield f"without it the step has norm {without.grad_norm:.4g}, loss {without.loss:.4g} instead of {loss:.4g}"


def _json_object(replay: Replay, parts: Sequence[SampleMetrics], culprit: SpikeDriver | None) -> dict[str, Any]:
    """Returns what `--json` prints."""
    bisect = culprit and {
        "number": culprit.sample.number,
        "source": culprit.sample.source,
        "sample": culprit.sample.entry,
        **culprit.part._asdict(),
        "median": culprit.median,
        "documents": [{"piece": piece, **part._asdict()} for piece, part in culprit.documents],
        "without": culprit.without and culprit.without._asdict(),
    }
    return {
        "run": replay.config.run.name,
        "step": replay.data.step,
        "checkpoint": replay.start,
        **replay.numbers._asdict(),
        "recorded": replay.recorded._asdict(),
        "apart": replay.numbers.relative_difference(replay.recorded)._asdict(),
        "same": replay.numbers.agrees_with(replay.recorded),
        "apart_since": replay.differs_since,
        "in_ledger": replay.in_ledger,
        "samples": [
            {
                "number": sample.number,
                "source": sample.source,
                "sample": sample.entry,
                **part._asdict(),
                "content": _content(replay, sample),
            }
            for sample, part in zip(replay.samples, parts, strict=True)
        ],
        **({"bisect": bisect} if bisect else {}),
    }


def _name(replay: Replay, sample: Sample) -> str:
    """Returns `shard key [first:end]` of a sample's first document, in a mixture with the source's name in front."""
    document = sample.spans[0] if sample.spans else sample.entry
    more = f" +{len(sample.spans) - 1}" if len(sample.spans) > 1 else ""
    source = f"{sample.source}/" if replay.config.data.sources else ""
    return _printable(f"{source}{' '.join(_place(document))}{more}")


def _place(entry: Sequence[Any]) -> list[str]:
    """Returns the words that name an entry: a shard, a key and perhaps a range of tokens."""
    shard, key, *tokens = entry
    return [shard, key, *([f"[{tokens[0]}:{tokens[1]}]"] if tokens else [])]


def _content(replay: Replay, sample: Sample) -> str:
    """Returns a sample's text, or the dtypes and shapes of the tensors that the model gets."""
    text = replay.text(sample)
    if text is not None:
        return text
    fields = ((name, tensor[0]) for name, tensor in sample.row.items() if name != "draws")
    return ", ".join(
        f"{name} {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}" for name, tensor in fields
    )


def _printable(text: str) -> str:
    """Escapes what would move the cursor: the text comes from data."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
