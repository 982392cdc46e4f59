"""Operations and speed of models that are not here yet."""

import pytest
import torch
from transformers import BertForMaskedLM

from tuneformer.data import checkpoint_files
from tuneformer.finetune import throughput
from tuneformer.finetune.throughput import ARCHITECTURES, ThroughputError
from tuneformer.study import paths
from tuneformer.study.params import load_study

V1 = {"checkpoint": "Geneformer-V1-10M", "precision": "fp32", "device": "cpu", "threads": 1}


@pytest.fixture(autouse=True)
def nothing_downloaded(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "DOWNLOADS", tmp_path)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_architecture_has_as_many_weights_as_the_published_file(name):
    """4 bytes a weight; the rest of the file is its table of names."""
    config = throughput.config_of(load_study("tiny", checkpoint=name))
    with torch.device("meta"):
        model = BertForMaskedLM(config)
    n_bytes = 4 * sum(weight.numel() for weight in model.parameters())
    size, _ = checkpoint_files.MODELS[name][1]["model.safetensors"]
    assert 0 <= size - n_bytes < 60_000


def test_a_checkpoint_that_is_here_says_what_it_is():
    assert throughput.config_of(load_study("tiny")).hidden_size == 64
    assert throughput.length_of(load_study("tiny")) == 128
    assert throughput.length_of(load_study("tiny", max_length=50)) == 50
    assert throughput.length_of(load_study("tiny", **V1)) == 2048


def test_operations_of_a_cell_follow_the_formula():
    """Per token and layer weight 2 operations forward, 4 backward; 4 x width per pair of tokens forward, 8 backward."""
    length, width, layers = 2048, 256, 6
    weights = layers * (4 * width**2 + 2 * width * 512)
    forward = length * weights * 2 + length**2 * width * 4 * layers
    trained, predicted = throughput.cell_flops(load_study("tiny", strategy="full", **V1))
    assert (trained, predicted) == (3 * forward, forward)
    assert throughput.cell_flops(load_study("tiny", strategy="linear_probe", **V1)) == (forward, forward)
    assert throughput.cell_flops(load_study("tiny", strategy="knn_pca", **V1)) == (0, forward)
    halves = load_study("tiny", strategy="lp_ft", epochs=10, head_share=0.5, **V1)  # the head for half of the epochs
    assert throughput.cell_flops(halves)[0] == 2 * forward
    frozen = load_study("tiny", strategy="selective_freeze2", **V1)  # the embeddings learn below: no weight gradient
    assert throughput.cell_flops(frozen)[0] == 3 * forward - 2 * length * weights * 2 / layers


def test_a_small_model_is_tried_whole():
    settings = load_study("tiny", batch_size=4, threads=1, device="cpu")
    speed = throughput.measure(settings, seconds=20)
    assert (speed.batch, speed.length, speed.steps, speed.is_whole) == (4, 128, throughput.STEPS, True)
    per_cell, _ = throughput.cell_flops(load_study("tiny", strategy="full"))
    assert speed.flops_per_second == pytest.approx(speed.cells_per_second * per_cell)


def test_without_time_a_single_short_cell_is_tried():
    speed = throughput.measure(load_study("tiny", threads=1, device="cpu"), seconds=0)
    assert (speed.batch, speed.length, speed.steps, speed.is_whole) == (1, throughput.SHORT, 1, False)


def test_sizes_grow_to_the_whole():
    assert list(throughput._sizes(12, 2048))[:3] == [(1, 64), (1, 128), (1, 256)]
    assert list(throughput._sizes(12, 2048))[-5:] == [(1, 2048), (2, 2048), (4, 2048), (8, 2048), (12, 2048)]
    assert list(throughput._sizes(1, 50)) == [(1, 50)]


def test_too_little_memory_is_one_sentence(monkeypatch):
    def step(*_):
        msg = "CUDA out of memory"
        raise torch.OutOfMemoryError(msg)

    monkeypatch.setattr(throughput._Trial, "step", step)
    with pytest.raises(ThroughputError, match="a training step of demo needs more memory than there is"):
        throughput.measure(load_study("tiny", threads=1, device="cpu"), seconds=1)
