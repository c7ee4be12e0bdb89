"""One of four ranks of test_agreed_stream.py: two copies of a model on two stages each, and each rank reads other
samples badly. Prints its steps: [step, the samples it trains on, what was left out]."""

from __future__ import annotations

import json

from tests.data.numbered_examples import Units
from trainer import topology
from trainer.config.strategy import Layout
from trainer.data.batch_sizes import Batches
from trainer.data.mixture import Mixture
from trainer.data.stream import OrderedSource, RankStream, Stream
from trainer.resilience.agreed_stream import AgreedStream

BAD = [set[int](), {17}, {5, 9}, {5, 8, 23}]
STEPS = 12


def share(bad: set[int], dp_rank: int, dp_size: int) -> RankStream:
    part = OrderedSource(Units(30, bad=frozenset(bad)), lanes=3, window=4, seed=7)
    batches, mixture = Batches(12), Mixture([(0, [1])])
    return RankStream([part], mixture, batches, 2, 7, dp_rank, dp_size, ledger=True, tolerant=True)


def main() -> None:
    ranks = topology.join(timeout_s=60, layout=Layout(stages=2))
    stream = AgreedStream(Stream(share(BAD[ranks.rank], ranks.dp_rank, ranks.dp_size)), ranks)
    stream.seek(2)
    steps = []
    for _ in range(STEPS):
        data = stream.take()
        sizes = [len(batch["draws"]) for batch in data.micro_batches]
        steps.append([data.step, sizes, data.entries, [[slot.number, fault.key] for slot, fault in data.faults]])
    stream.close()
    print(json.dumps([ranks.rank, ranks.dp_rank, steps]) + "\n", end="", flush=True)  # at once: one pipe for all
    ranks.close()


if __name__ == "__main__":
    main()
