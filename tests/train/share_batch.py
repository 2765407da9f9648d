"""Run by torchrun, see test_distributed.py: the gradients of one batch, and a collection's embeddings, shared."""

import sys
from pathlib import Path

import torch
from test_gradients import LOSSES, PLAIN, make_batch

from gradret.data.sources import open_collection, parse_source
from gradret.distributed import Processes, end_process, join_processes
from gradret.encoder.load import load_encoder
from gradret.encoder.model import Encoder
from gradret.evaluation.measures import evaluate
from gradret.settings import DEFAULT_ENCODER, FitSettings
from gradret.train.batches import Batch
from gradret.train.gradients import BatchGradients, Objective

# One loss for each way to compute it: fused, by blocks of lists, and one value for the whole batch.
SHARED = ("fused", "infonce", "gaussian")


def find_all_gradients(encoder: Encoder, batch: Batch, processes: Processes) -> dict[str, torch.Tensor]:
    """Loss and gradients of the losses in SHARED, with dropout, as `loss/default_grade/type/parameter`."""
    found = {}
    for name in SHARED:
        options = LOSSES[name]
        for default_grade in (0.0, None):
            encoder.train().zero_grad(set_to_none=True)
            settings = FitSettings(**PLAIN | options)
            gradients = BatchGradients(
                encoder, Objective(settings, default_grade), "float32", 4, default_grade is not None, processes
            )
            loss = gradients.accumulate(batch, "0/0/0")
            processes.sum_gradients(list(encoder.parameters()))
            here = f"{name}/{default_grade}/{encoder.dtype}".replace("torch.", "")
            found[f"{here}/loss"] = torch.tensor(loss, dtype=torch.float64)
            found |= {f"{here}/{n}": p.grad for n, p in encoder.named_parameters() if p.grad is not None}
    return found


def main(model: str, out: str) -> None:
    with join_processes("cpu") as (processes, _):
        # In the tiny encoder's vectors all texts are alike, so that sums cancel and float32's rounding is what remains.
        found = find_all_gradients(load_encoder(model).double(), make_batch(6), processes)
        found |= find_all_gradients(load_encoder(DEFAULT_ENCODER), make_batch(3), processes)
        collection = open_collection(parse_source("sample"))
        result = evaluate(load_encoder(model), collection, cache=Path(out), processes=processes, progress=False)
        for rank, measures in enumerate(processes.gather_objects(result.measures)):
            found |= {f"{rank}/{name}": torch.tensor(value) for name, value in measures.items()}
    if processes.is_first:
        torch.save(found, Path(out, "found.pt"))


if __name__ == "__main__":
    main(*sys.argv[1:])
    end_process(0)
