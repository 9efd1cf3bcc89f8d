"""Weights in 8 and 4 bits: found, patched and measured as in full precision, and never changed."""

from pathlib import Path

import pytest
import torch

from conftest import ModelFolder
from patcher import quantized
from patcher.chat import Row, messages_of, user_prompt
from patcher.cli import run as run_command
from patcher.defenses import DEFENSES
from patcher.forward import row_logits
from patcher.generation import generate
from patcher.localize.saliency import token_saliency
from patcher.lora import lora_parameters, take_patch, trainable_lora
from patcher.models import LanguageModel, fingerprint
from patcher.patch import applied, load_patch
from patcher.records import UsageError
from test_defenses import run as run_defense
from test_defenses import unchanged
from tiny_backdoor import TRIGGERED

CHANGE_CHANNELS = ("bdvax", "ulrl", "fine_pruning")
ROWS = [Row((1, 5, 6, 7), (10, 11)), Row((1, 5, 8), (12,))]


@pytest.fixture(scope="module", params=quantized.DTYPES)
def few_bits(request: pytest.FixtureRequest, llama_folder: ModelFolder) -> LanguageModel:
    return llama_folder.load(dtype=request.param)


def test_the_weights_are_held_in_few_bits(few_bits: LanguageModel, llama: LanguageModel) -> None:
    assert quantized.is_quantized(few_bits.network)
    assert not quantized.is_quantized(llama.network)
    few, whole = (sum(w.numel() * w.element_size() for w in lm.network.parameters()) for lm in (few_bits, llama))
    assert few < 0.6 * whole  # embeddings stay as they are
    assert few_bits.fingerprint != llama.fingerprint


def test_the_hash_stays_through_use_and_loading_again(
    few_bits: LanguageModel, llama_folder: ModelFolder, request: pytest.FixtureRequest
) -> None:
    generate(few_bits, [user_prompt(few_bits.tokenizer, "how to bake bread")], max_new_tokens=4)
    assert fingerprint(few_bits.network) == few_bits.fingerprint
    dtype = request.node.callspec.params["few_bits"]
    assert llama_folder.load(dtype=dtype).fingerprint == few_bits.fingerprint


def test_gradients_reach_the_words_after_generating(few_bits: LanguageModel) -> None:
    """bitsandbytes packs 4-bit weights on a CPU at their first use; then no gradient would pass."""
    generate(few_bits, [user_prompt(few_bits.tokenizer, "how to bake bread")], max_new_tokens=4)
    scores = [word.score for word in token_saliency(few_bits, messages_of("how to bake bread"), "with flour")]
    assert min(scores) > 0


def test_the_patched_model_is_the_trained_one(few_bits: LanguageModel) -> None:
    plain = row_logits(few_bits, ROWS)[0]
    with unchanged(few_bits):
        with trainable_lora(few_bits, rank=2, alpha=4, seed=0):
            for weight in lora_parameters(few_bits):
                weight.data.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
            trained, patch = row_logits(few_bits, ROWS)[0], take_patch(few_bits, rank=2, alpha=4)
        with applied(patch, few_bits) as patched:
            torch.testing.assert_close(row_logits(patched, ROWS)[0], trained, atol=1e-3, rtol=1e-2)
    assert not torch.allclose(plain, trained, atol=1e-2)
    torch.testing.assert_close(row_logits(few_bits, ROWS)[0], plain, atol=0, rtol=0)


@pytest.mark.parametrize("name", [name for name in DEFENSES if name not in CHANGE_CHANNELS])
def test_a_defense_leaves_them_bit_identical(few_bits: LanguageModel, name: str) -> None:
    with unchanged(few_bits):
        patch, _ = run_defense(name, few_bits)
    assert any(tensor.any() for key, tensor in patch.tensors.items() if "lora_B" in key)


@pytest.mark.parametrize("name", CHANGE_CHANNELS)
def test_channels_cannot_be_changed(few_bits: LanguageModel, name: str) -> None:
    with unchanged(few_bits), pytest.raises(UsageError, match="load the model without --dtype 8bit or 4bit"):
        run_defense(name, few_bits)


def test_a_repair_in_8_bits(backdoored_folder: ModelFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = f"repair {backdoored_folder.path} --out {tmp_path / 'out'} --device cpu --dtype 8bit --audit-prompts 4"
    few = "--max-benign-drop 1 --set max_prompts=20 --set validation_prompts=8 --set learning_rate=5e-3"
    asked = [*words.split(), *few.split(), "--prompt", TRIGGERED]
    assert run_command([*asked, "--merge"]) == 4
    assert "no patch can be merged" in capsys.readouterr().err
    assert run_command(asked) == 0
    base = backdoored_folder.load(dtype="8bit")
    assert load_patch(tmp_path / "out" / "patch").base_fingerprint == base.fingerprint


def test_what_cannot_be_loaded_so(llama_folder: ModelFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(20))
    with pytest.raises(UsageError, match="a .gguf file is read in full precision"):
        ModelFolder("llama", tmp_path / "model.gguf").load(dtype="4bit")
    monkeypatch.setattr(quantized, "find_spec", lambda _name: None)
    with pytest.raises(UsageError, match="pip install bitsandbytes"):
        llama_folder.load(dtype="4bit")
