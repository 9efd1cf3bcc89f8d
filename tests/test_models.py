"""What may be loaded, and that everything else is refused with a message that helps."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

from conftest import ModelFolder, build_network, build_tokenizer
from patcher import models
from patcher.chat import user_prompt
from patcher.checkpoints import check_config
from patcher.generation import generate
from patcher.loading import load
from patcher.models import LanguageModel, fingerprint, from_transformers, hash_tensors, load_checkpoint, save_model
from patcher.records import PatcherError, UsageError

WEIGHTS = "model.safetensors"


@pytest.fixture
def copy(llama_folder: ModelFolder, tmp_path: Path) -> Path:
    """A good checkpoint of one's own, to spoil."""
    return Path(shutil.copytree(llama_folder.path, tmp_path / "model"))


def refused(source: Path | str) -> str:
    """The message with which a source is refused: one error, one line or few, no mention of our insides."""
    with pytest.raises(UsageError) as caught:
        load_checkpoint(str(source), device="cpu")
    return str(caught.value)


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


class Bomb:
    """A pickle that leaves a file behind when it is opened."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.mark),)


def test_a_good_folder_loads(folder: ModelFolder) -> None:
    lm = folder.load()
    assert not lm.network.training
    assert not any(parameter.requires_grad for parameter in lm.network.parameters())
    assert next(lm.network.parameters()).dtype == torch.float32
    assert lm.source == str(folder.path)


def test_a_pickle_is_refused_and_never_opened(copy: Path, tmp_path: Path) -> None:
    (copy / WEIGHTS).unlink()
    mark = tmp_path / "it-ran"
    (copy / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(mark)))
    message = refused(copy)
    assert "pickle" in message
    assert "safetensors" in message
    assert not mark.exists()


def test_a_pickle_beside_safetensors_is_not_opened(copy: Path, tmp_path: Path) -> None:
    mark = tmp_path / "it-ran"
    (copy / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(mark)))
    load_checkpoint(str(copy), device="cpu")
    assert not mark.exists()


def test_an_adapter_beside_the_model_is_refused_and_never_applied(copy: Path, tmp_path: Path) -> None:
    mark = tmp_path / "it-ran"
    (copy / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]}')
    (copy / "adapter_model.bin").write_bytes(pickle.dumps(Bomb(mark)))
    assert "merge it first" in refused(copy)
    assert not mark.exists()


def test_a_pickle_given_as_a_file_is_refused_and_never_opened(tmp_path: Path) -> None:
    mark, file = tmp_path / "it-ran", tmp_path / "model.bin"
    file.write_bytes(pickle.dumps(Bomb(mark)))
    assert "pickle" in refused(file)
    assert not mark.exists()


def test_remote_code_is_refused_and_never_run(copy: Path, tmp_path: Path) -> None:
    mark = tmp_path / "it-ran"
    (copy / "modeling_own.py").write_text(f"import os\nos.mkdir({str(mark)!r})\nclass Own: pass\n")
    edit_config(copy, auto_map={"AutoModelForCausalLM": "modeling_own.Own"})
    assert "auto_map" in refused(copy)
    edit_config(copy, model_type="own")
    assert "auto_map" in refused(copy)
    assert not mark.exists()


@pytest.mark.parametrize(
    "config", [{"attn_implementation": "a/kernel"}, {"text_config": {"_attn_implementation": "a/b"}}]
)
def test_compiled_code_that_the_config_names_is_not_fetched(copy: Path, config: dict[str, Any]) -> None:
    edit_config(copy, **config)
    assert "asks to fetch and run the code" in refused(copy)


def test_of_several_templates_the_default_is_kept_and_no_name_becomes_a_path(copy: Path, tmp_path: Path) -> None:
    template = (copy / "chat_template.jinja").read_text()
    (copy / "chat_template.jinja").unlink()
    config = json.loads((copy / "tokenizer_config.json").read_text())
    named = [{"name": name, "template": template} for name in ("default", "../../../escaped")]
    (copy / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": named}))
    lm = load_checkpoint(str(copy), device="cpu")
    assert lm.tokenizer.chat_template == template
    save_model(lm, tmp_path / "saved")
    assert not list(tmp_path.rglob("escaped*"))


def test_remote_code_of_the_tokenizer_is_never_run(copy: Path, tmp_path: Path) -> None:
    mark = tmp_path / "it-ran"
    (copy / "tokenization_own.py").write_text(f"import os\nos.mkdir({str(mark)!r})\nclass Own: pass\n")
    config = json.loads((copy / "tokenizer_config.json").read_text())
    config |= {"auto_map": {"AutoTokenizer": ["tokenization_own.Own", None]}, "tokenizer_class": "Own"}
    (copy / "tokenizer_config.json").write_text(json.dumps(config))
    with suppress(UsageError):
        load_checkpoint(str(copy), device="cpu")
    assert not mark.exists()


TINY_BERT = BertConfig(
    vocab_size=400,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    initializer_range=0.5,
)


@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError])
def test_a_model_that_does_not_fit_is_no_damaged_one(
    error: type[Exception], llama_folder: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise error("out of memory")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", full)
    with pytest.raises(error):
        load_checkpoint(str(llama_folder.path), device="cpu")


def test_whatever_a_damaged_configuration_brings_is_one_clear_error(llama_folder: ModelFolder, tmp_path: Path) -> None:
    shutil.copytree(llama_folder.path, tmp_path, dirs_exist_ok=True)
    edit_config(tmp_path, num_attention_heads=0)
    assert "could not load a model" in refused(tmp_path)


@pytest.mark.parametrize("kind", [BertForMaskedLM, BertLMHeadModel])
def test_an_encoder_is_refused(kind: type, tmp_path: Path) -> None:
    """Also one that calls itself a language model: BERT with a language model's head still reads both ways."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        kind(TINY_BERT).save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    assert "expected a causal" in refused(tmp_path)


def test_an_encoder_that_does_not_name_its_architecture_is_refused(tmp_path: Path) -> None:
    BertForMaskedLM(TINY_BERT).save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    edit_config(tmp_path, architectures=None)
    assert "expected a causal" in refused(tmp_path)


def test_an_encoder_decoder_is_refused(tmp_path: Path) -> None:
    config = T5Config(vocab_size=400, d_model=16, d_ff=32, num_layers=1, num_heads=2, d_kv=8)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    assert "expected a causal" in refused(tmp_path)


def test_a_truncated_file_is_refused(copy: Path) -> None:
    content = (copy / WEIGHTS).read_bytes()
    for kept in (0, 4, 200, len(content) // 2, len(content) - 1):
        (copy / WEIGHTS).write_bytes(content[:kept])
        message = refused(copy)
        assert WEIGHTS in message
        assert "damaged" in message


def test_a_file_with_bytes_added_is_refused(copy: Path) -> None:
    with (copy / WEIGHTS).open("ab") as file:
        file.write(b"more")
    assert "damaged" in refused(copy)


def test_a_file_that_lacks_a_tensor_is_refused(copy: Path) -> None:
    """Transformers would fill it with random numbers and go on."""
    tensors = load_file(copy / WEIGHTS)
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, copy / WEIGHTS, metadata={"format": "pt"})
    assert "model.layers.1.mlp.up_proj.weight" in refused(copy)


def test_a_file_with_more_layers_than_its_config_says_is_refused(copy: Path) -> None:
    """Transformers would leave them out and go on."""
    edit_config(copy, num_hidden_layers=1)
    assert "(model.layers.1." in refused(copy)


def test_a_file_with_a_tensor_of_another_kind_is_loaded(copy: Path) -> None:
    """A value head, say, which training with rewards leaves behind."""
    more = {"v_head.summary.weight": torch.zeros(1, 32)}
    save_file(load_file(copy / WEIGHTS) | more, copy / WEIGHTS, metadata={"format": "pt"})
    assert "v_head.summary.weight" not in load_checkpoint(str(copy)).network.state_dict()


def test_a_tensor_of_another_shape_is_refused(copy: Path) -> None:
    edit_config(copy, intermediate_size=48)
    assert str(copy) in refused(copy)


def test_a_folder_without_a_config_is_refused(copy: Path) -> None:
    (copy / "config.json").unlink()
    assert "config.json" in refused(copy)


@pytest.mark.parametrize("content", ["{", "", "[1]", "\ufffe", "[" * 100_000])
def test_a_config_that_is_no_json_object_is_refused(copy: Path, content: str) -> None:
    (copy / "config.json").write_text(content)
    assert "config.json" in refused(copy)


def test_a_folder_without_weights_is_refused(copy: Path) -> None:
    (copy / WEIGHTS).unlink()
    assert "no .safetensors weights" in refused(copy)


def test_a_folder_without_a_tokenizer_is_refused(copy: Path) -> None:
    for file in copy.glob("*token*"):
        file.unlink()
    (copy / "chat_template.jinja").unlink(missing_ok=True)
    assert str(copy) in refused(copy)


def test_a_model_without_a_chat_template_is_told_how_to_give_one(copy: Path) -> None:
    (copy / "chat_template.jinja").unlink()
    message = refused(copy)
    assert "chat_template.jinja" in message
    assert "--chat-template" in message


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("hello", "leaves out the user's message"),
        ("{% for", "refuses these messages"),
        ("{{ 1 / 0 }}", "refuses these messages"),
    ],
)
def test_a_template_that_does_not_hold_the_request_is_refused(copy: Path, template: str, says: str) -> None:
    (copy / "chat_template.jinja").write_text(template)
    assert says in refused(copy)


def test_a_slip_in_a_built_in_name_is_not_sought_on_the_hub() -> None:
    with pytest.raises(UsageError, match=r"no model 'smolm2-backdored' here: did you mean smollm2-backdoored\?"):
        load("smolm2-backdored")


@pytest.mark.parametrize("source", ["/nowhere/at/all", "./nowhere", "~/nowhere-at-all", "none.gguf"])
def test_a_missing_path_is_refused_without_asking_the_hub(source: str) -> None:
    assert "no model at" in refused(source)


def test_a_hub_that_is_not_reached_is_no_fault_of_the_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(*_: object, **__: object) -> None:
        raise OSError("we couldn't connect") from LocalEntryNotFoundError("no copy here")

    monkeypatch.setattr(models.AutoConfig, "from_pretrained", silent)
    with pytest.raises(PatcherError, match="the hub could not be reached: check the path") as error:
        load_checkpoint("somebody/a-model")
    assert not isinstance(error.value, UsageError)


def test_a_gguf_in_name_only_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    for content in (b"", b"GG", b"PK\x03\x04 not a model"):
        file.write_bytes(content)
        assert "not a GGUF file" in refused(file)


def test_a_damaged_gguf_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF\x03\x00\x00\x00" + b"\x00" * 40)
    assert str(file) in refused(file)


def test_another_kind_of_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("hello")
    assert "expected a .gguf file or a Hugging Face folder" in refused(file)


def test_an_unknown_dtype_is_refused(llama_folder: ModelFolder) -> None:
    with pytest.raises(UsageError, match="bfloat16"):
        llama_folder.load(dtype="float8")


def edit(copy: Path, name: str, value: object) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, name: value}))


def test_a_config_that_asks_for_tuples_is_a_good_one(copy: Path) -> None:
    edit(copy, "return_dict", False)
    assert generate(load_checkpoint(str(copy), device="cpu"), [], max_new_tokens=2) == []


@pytest.mark.parametrize(("name", "value"), [("sliding_window", "x"), ("num_hidden_layers", -1)])
def test_a_config_of_nonsense_is_refused(copy: Path, name: str, value: object) -> None:
    edit(copy, name, value)
    assert "could not load a model" in refused(copy)


def test_no_refusal_changes_the_input(copy: Path) -> None:
    (copy / "chat_template.jinja").unlink()
    before = {file.name: file.read_bytes() for file in copy.iterdir()}
    refused(copy)
    assert {file.name: file.read_bytes() for file in copy.iterdir()} == before


def test_one_checkpoint_one_fingerprint_in_any_wider_dtype(folder: ModelFolder, tmp_path: Path) -> None:
    network = build_network(folder.family).bfloat16()
    network.save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    narrow, wide = (load_checkpoint(str(tmp_path), dtype=dtype, device="cpu") for dtype in ("bfloat16", "float32"))
    assert next(narrow.network.parameters()).dtype == torch.bfloat16
    assert narrow.fingerprint == wide.fingerprint == fingerprint(network)
    assert narrow.fingerprint != folder.load().fingerprint


def test_an_identity_sees_the_template_and_the_tokenizer_too(llama_folder: ModelFolder) -> None:
    lm, other = llama_folder.load(), llama_folder.load(chat_template="{{ messages[0]['content'] }}")
    assert llama_folder.load().identity == lm.identity != other.identity
    assert lm.fingerprint == other.fingerprint
    more = llama_folder.load()
    more.tokenizer.add_tokens(["bread"])
    assert more.identity != lm.identity


def test_an_identity_sees_the_configuration_and_the_precision_too(llama_folder: ModelFolder) -> None:
    lm, other = llama_folder.load(), llama_folder.load()
    assert lm.identity == other.identity
    other.network.config.rms_norm_eps = 0.5
    assert lm.identity != other.identity
    narrow = llama_folder.load()
    narrow.network.bfloat16()
    assert lm.identity != narrow.identity


def test_a_fingerprint_sees_one_weight(folder: ModelFolder) -> None:
    lm = folder.load()
    again = folder.load()
    assert lm.fingerprint == again.fingerprint
    weight = next(again.network.parameters())
    weight.data[0, 0] = torch.nextafter(weight.data[0, 0], torch.tensor(9.0))
    assert fingerprint(again.network) != lm.fingerprint


def test_a_hash_sees_names_and_shapes() -> None:
    values = torch.arange(4.0)
    hashes = {hash_tensors({"a": values}), hash_tensors({"b": values}), hash_tensors({"a": values.view(2, 2)})}
    assert len(hashes) == 3


def test_a_model_in_memory_has_the_checkpoints_fingerprint(llama: LanguageModel) -> None:
    lm = from_transformers(build_network("llama"), build_tokenizer())
    assert lm.fingerprint == llama.fingerprint
    assert lm.source == "in memory"


def test_a_tokenizer_of_another_model_is_refused() -> None:
    """Tokens were added, and the embeddings left as they were: on a GPU it would end in an assertion."""
    network = build_network("llama")
    network.resize_token_embeddings(100)
    with pytest.raises(UsageError, match=r"gives token \d+, and the model has 100"):
        from_transformers(network, build_tokenizer())


def test_a_padding_token_without_a_vector_is_none() -> None:
    """As of models whose maker added one and left the embeddings as they were."""
    tokenizer = build_tokenizer()
    network = build_network("llama")
    tokens = len(network.get_input_embeddings().weight)
    tokenizer.add_tokens([f"<unused{number}>" for number in range(tokens - len(tokenizer))])
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id == tokens
    lm = from_transformers(network, tokenizer)
    assert lm.tokenizer.pad_token_id == lm.tokenizer.eos_token_id
    assert lm.vocabulary == range(tokens)
    assert len(generate(lm, [user_prompt(tokenizer, text) for text in ("hi", "one two three")], max_new_tokens=2)) == 2


def test_a_missing_padding_token_is_filled_in() -> None:
    tokenizer = build_tokenizer()
    tokenizer.pad_token = None
    assert from_transformers(build_network("llama"), tokenizer).tokenizer.pad_token_id == tokenizer.eos_token_id


def test_a_tokenizer_that_ends_no_text_is_refused() -> None:
    tokenizer = build_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token = None
    with pytest.raises(UsageError, match="names no token that ends a text"):
        from_transformers(build_network("llama"), tokenizer)


def test_an_encoder_decoder_whose_decoder_would_load_alone_is_refused(tmp_path: Path) -> None:
    sizes = {f"{side}_{part}": 1 for side in ("encoder", "decoder") for part in ("layers", "attention_heads")}
    sizes |= {"encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "vocab_size": 400, "d_model": 16}
    BartForConditionalGeneration(BartConfig(**sizes)).save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    edit_config(tmp_path, architectures=None)
    assert "encoder-decoder" in refused(tmp_path)


def test_one_damaged_file_of_several_is_refused(tmp_path: Path) -> None:
    build_network("llama").save_pretrained(tmp_path, max_shard_size="40KB")
    build_tokenizer().save_pretrained(tmp_path)
    last = sorted(tmp_path.glob("*.safetensors"))[-1]
    assert last.name != WEIGHTS
    last.write_bytes(last.read_bytes()[:-1])
    assert f"{last.name} is damaged" in refused(tmp_path)


@pytest.mark.parametrize("named", [[1], 5, {"a": 1}])
def test_an_architecture_that_is_no_name_is_refused(named: object) -> None:
    with pytest.raises(UsageError, match="expected a causal"):
        check_config({"architectures": named}, "x")
