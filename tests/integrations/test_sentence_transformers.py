"""The loss for SentenceTransformerTrainer has the gradients of gradret's own trainer; the documented examples run."""

import re

import pytest
import torch
from conftest import SAMPLE_FILE, make_tiny_encoder
from datasets import Dataset
from sentence_transformers import (
    DefaultBatchSampler,
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from torch.utils.data import SequentialSampler

import gradret.integrations.sentence_transformers
from gradret.data.lists import RankingList, read_lists
from gradret.encoder.load import load_encoder
from gradret.integrations.sentence_transformers import WassersteinLoss
from gradret.settings import FitSettings
from gradret.train.batches import collate
from gradret.train.gradients import BatchGradients, Objective

OPTIONS = {
    "defaults": {},
    "order 1": {"order": 1, "temperature": 0.3},
    "roots": {"targets": "sqrt", "ground": "sqrt", "loss": "wasserstein:.4+kl:.6"},
    "softmax": {"targets": "softmax", "loss": "wasserstein"},
    "contrast": {"loss": "wasserstein:.6+contrast:.4"},
}
MIXTURE = "wasserstein:.05+kl:.1+contrast:.85"


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory):
    """A tiny encoder without dropout, as sentence-transformers saves one."""
    folder = tmp_path_factory.mktemp("model")
    encoder = load_encoder(str(make_tiny_encoder(folder / "plain", dropout=0.0)))
    encoder.save(folder / "saved")
    return folder / "saved"


@pytest.fixture(scope="module")
def lists() -> list[RankingList]:
    return list(read_lists(SAMPLE_FILE))[:6]


@pytest.mark.parametrize("labels", [None, [[3, 0], [3, 0]]])
def test_a_data_set_without_labels(model_directory, labels):
    """The trainer then hands over None; most losses of the library need none."""
    model = SentenceTransformer(str(model_directory), device="cpu")
    columns = [model.preprocess(["tea", "rye"]) for _ in range(3)]
    with pytest.raises(ValueError, match="the data set needs a column of labels, a list of n grades per row; got "):
        WassersteinLoss(model)(columns, labels)


def sample_in_order(dataset, **options) -> DefaultBatchSampler:
    return DefaultBatchSampler(SequentialSampler(dataset), **options)


def make_trainer(model, lists, folder, **options) -> SentenceTransformerTrainer:
    columns = {"query": [r.query for r in lists]}
    for i in range(4):
        columns[f"passage_{i + 1}"] = [r.passages[i].content for r in lists]
    columns["label"] = [[p.grade for p in r.passages] for r in lists]
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=len(lists),
        batch_sampler=sample_in_order,
        report_to="none",
        use_cpu=True,
    )
    loss = WassersteinLoss(model, **options)
    return SentenceTransformerTrainer(model=model, args=arguments, train_dataset=Dataset.from_dict(columns), loss=loss)


@pytest.mark.parametrize("in_batch", [True, False])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_gradients_are_those_of_fit(options, in_batch, model_directory, lists, tmp_path):
    model = SentenceTransformer(str(model_directory), device="cpu")
    trainer = make_trainer(model, lists, tmp_path, in_batch=in_batch, **options)
    (inputs,) = trainer.get_train_dataloader()
    loss = trainer.compute_loss(model, inputs)
    loss.backward()
    encoder = load_encoder(str(model_directory))
    objective = Objective(FitSettings(in_batch=in_batch, **options), 0.0 if in_batch else None)
    expected = BatchGradients(encoder, objective, "float32", 4, False).accumulate(collate(lists), "0")
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    found = {name.removeprefix("0.model."): p.grad for name, p in model.named_parameters()}
    theirs = {name.removeprefix("transformer."): p.grad for name, p in encoder.named_parameters()}
    assert found.keys() == theirs.keys()
    pairs = [(found[k], g) for k, g in theirs.items() if g is not None]
    norm = torch.stack([g.norm() for _, g in pairs]).norm()
    assert norm > 0 and len(pairs) > 10
    assert torch.stack([(f - g).norm() for f, g in pairs]).norm() <= 1e-5 * norm


@pytest.mark.parametrize("name", ["cosine", "dot"])
def test_the_score_is_the_models_similarity(name, model_directory):
    model = SentenceTransformer(str(model_directory), device="cpu", similarity_fn_name=name)
    torch.manual_seed(0)
    embeddings = [torch.randn(2, 8) for _ in range(4)]
    grades = torch.tensor([[3.0, 1.0, 0.0], [0.0, 2.0, 1.0]])
    found = WassersteinLoss(model, loss="wasserstein", in_batch=False).compute_loss_from_embeddings(embeddings, grades)
    scores = torch.stack([model.similarity_pairwise(embeddings[0], column) for column in embeddings[1:]], 1)
    expected = gradret.wasserstein_loss(scores, grades)
    torch.testing.assert_close(found, expected)


def test_rows_of_two_processes_are_one_batch(model_directory, monkeypatch):
    module = gradret.integrations.sentence_transformers
    model = SentenceTransformer(str(model_directory), device="cpu")
    torch.manual_seed(0)
    embeddings = [torch.randn(4, 8) for _ in range(4)]
    grades = torch.randint(0, 4, (4, 3)).float()
    whole = WassersteinLoss(model, loss=MIXTURE).compute_loss_from_embeddings(embeddings, grades)
    everyone = {column[rank : rank + 2].data_ptr(): column for column in embeddings for rank in (0, 2)}
    monkeypatch.setattr(module, "all_gather_with_grad", lambda column: everyone[column.data_ptr()])
    halves = []
    for rank in range(2):
        monkeypatch.setattr(module, "get_rank", lambda rank=rank: rank)
        rows = slice(2 * rank, 2 * rank + 2)
        loss = WassersteinLoss(model, loss=MIXTURE, gather_across_devices=True)
        halves.append(loss.compute_loss_from_embeddings([column[rows] for column in embeddings], grades[rows]))
    torch.testing.assert_close(torch.stack(halves).mean(), whole)
    assert halves[0] != halves[1]


def test_the_model_card_names_the_loss_its_options_and_whom_to_cite(model_directory, lists, tmp_path):
    model = SentenceTransformer(str(model_directory), device="cpu")
    make_trainer(model, lists, tmp_path / "out", loss=MIXTURE).train()
    model.save_pretrained(str(tmp_path / "model"))
    card = (tmp_path / "model" / "README.md").read_text()
    for told in ("WassersteinLoss", f'"loss": "{MIXTURE}"', "2503.23239"):
        assert told in card


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": 3}, "order must be 1 or 2, got 3"),
        ({"temperature": 0.0}, "temperature must be above 0, got 0.0"),
        ({"targets": "linear"}, "targets must be one of 'gain', 'softmax', 'sqrt'; got 'linear'"),
        (
            {"loss": "wasserstein:.5+kl:.5", "default_grade": 1.0},
            "kl and contrast need targets that give documents of the default grade no mass",
        ),
        ({"in_batch": False, "gather_across_devices": True}, "gather_across_devices gathers the other rows' passages"),
    ],
)
def test_options_that_do_not_do_are_told_at_once(options, message, model_directory):
    model = SentenceTransformer(str(model_directory), device="cpu")
    with pytest.raises(ValueError, match=re.escape(message)):
        WassersteinLoss(model, **options)


def test_rows_that_do_not_do(model_directory):
    loss = WassersteinLoss(SentenceTransformer(str(model_directory), device="cpu"))
    with pytest.raises(ValueError, match="columns must be a query and at least 2 passages, got 2 columns"):
        loss.compute_loss_from_embeddings([torch.zeros(2, 8)] * 2, torch.zeros(2, 1))
    with pytest.raises(ValueError, match=r"labels must hold a grade for each of 3 passages per row, got \(2,\)"):
        loss.compute_loss_from_embeddings([torch.zeros(2, 8)] * 4, torch.zeros(2))
    model = SentenceTransformer(str(model_directory), device="cpu", similarity_fn_name="euclidean")
    with pytest.raises(ValueError, match="the model's similarity must be 'cosine' or 'dot', got 'euclidean'"):
        WassersteinLoss(model)
