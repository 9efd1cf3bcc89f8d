"""A patch is a value: applied and reverted exactly, saved and loaded exactly, refused where it does not fit."""

import json
import resource
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraModel
from safetensors.torch import load_file, save_file

from conftest import ModelFolder
from patcher import patch as patch_module
from patcher.chat import Row, collate, response_ids, user_prompt
from patcher.loading import demo_adapter, load
from patcher.lora import RunningMean, lora_parameters, take_patch, trainable_lora
from patcher.losses import response_nll
from patcher.models import LanguageModel, fingerprint, from_transformers, load_checkpoint
from patcher.network import response_logits
from patcher.outputs import atomic_folder, atomic_path
from patcher.patch import Patch, applied, load_patch, merge, save_patch
from patcher.records import PatcherError, UsageError
from patcher.training import fit

RANK, ALPHA = 2, 4


@dataclass(frozen=True)
class Quick:
    """Three large steps."""

    learning_rate: float = 5e-2
    max_steps: int = 3
    warmup_steps: int = 1
    cosine: bool = False


def batch_of(lm: LanguageModel):
    pairs = (("How do I bake bread?", "I'm sorry, but I can't help."), ("hi", "Sure, here is a guide."))
    rows = [
        Row(user_prompt(lm.tokenizer, prompt).ids, response_ids(lm.tokenizer, answer, end=True, limit=16))
        for prompt, answer in pairs
    ]
    return collate(rows, lm.tokenizer.pad_token_id, lm.device)


@torch.no_grad()
def logits(lm: LanguageModel) -> torch.Tensor:
    return response_logits(lm.network, batch_of(lm)).clone()


def train(lm: LanguageModel, seed: int = 0) -> tuple[Patch, torch.Tensor]:
    """A patch, and the logits of the network with the trained layers still in it."""
    batch = batch_of(lm)
    with trainable_lora(lm, rank=RANK, alpha=ALPHA, seed=seed):
        fit(lm, lambda _step: response_nll(response_logits(lm.network, batch), batch.targets).mean(), Quick())
        return take_patch(lm, rank=RANK, alpha=ALPHA), logits(lm)


def anatomy(lm: LanguageModel) -> tuple[object, ...]:
    """All that must be as before: module classes, flags, gradients, mode, weights to the bit."""
    network = lm.network
    return (
        [(name, type(module)) for name, module in network.named_modules()],
        [(name, weight.requires_grad, weight.grad is None) for name, weight in network.named_parameters()],
        [weight.data_ptr() for weight in network.parameters()],
        sorted(vars(network)),
        network.training,
        fingerprint(network),
    )


@contextmanager
def unchanged(lm: LanguageModel) -> Iterator[None]:
    before, said = anatomy(lm), logits(lm)
    try:
        yield
    finally:
        assert anatomy(lm) == before
        assert torch.equal(logits(lm), said)


@pytest.fixture(scope="session")
def patch(tiny: LanguageModel) -> Patch:
    return train(tiny)[0]


@pytest.fixture
def saved(llama: LanguageModel, tmp_path: Path) -> tuple[Patch, Path]:
    """A patch for the Llama and the folder it lies in."""
    made = train(llama)[0]
    with atomic_folder(tmp_path / "patch") as building:
        save_patch(made, building, card="# A card\n")
    return made, tmp_path / "patch"


def equal(one: Patch, other: Patch) -> bool:
    return (
        one.fingerprint == other.fingerprint
        and one.tensors.keys() == other.tensors.keys()
        and all(torch.equal(one.tensors[name], other.tensors[name]) for name in one.tensors)
    )


def test_apply_then_revert_is_exact(tiny: LanguageModel, patch: Patch) -> None:
    plain = logits(tiny)
    with unchanged(tiny), applied(patch, tiny) as patched:
        assert patched.fingerprint == patch.fingerprint
        assert (logits(patched) - plain).abs().max() > 0.05, "the patch changes nothing: this test would see nothing"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_apply_is_reverted_when_the_block_fails(tiny: LanguageModel, patch: Patch, error: type) -> None:
    with unchanged(tiny), pytest.raises(error), applied(patch, tiny):
        raise error


def test_apply_is_reverted_when_it_fails_midway(tiny: LanguageModel, patch: Patch) -> None:
    broken = dict(patch.tensors)
    last = max(name for name in broken if name.endswith("lora_B.weight"))
    del broken[last]
    half = Patch(broken, patch.rank, patch.alpha, patch.base_fingerprint, patch.base_source)
    with unchanged(tiny), pytest.raises(KeyError), applied(half, tiny):
        pass


def test_training_leaves_the_model_as_it_was(tiny: LanguageModel) -> None:
    with unchanged(tiny):
        made, _ = train(tiny)
    assert any((up @ down).any() for _, down, up in made.factors()), "nothing was trained: this test would see nothing"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_failed_training_leaves_the_model_as_it_was(tiny: LanguageModel, error: type) -> None:
    with unchanged(tiny), pytest.raises(error), trainable_lora(tiny, rank=RANK, alpha=ALPHA, seed=0):
        batch = batch_of(tiny)
        response_nll(response_logits(tiny.network, batch), batch.targets).mean().backward()
        raise error


def test_an_interrupt_while_the_layers_go_in_leaves_the_model_as_it_was(
    tiny: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    create, calls = LoraModel._create_and_replace, []

    def interrupted(self, *args, **named):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return create(self, *args, **named)

    monkeypatch.setattr(LoraModel, "_create_and_replace", interrupted)
    with unchanged(tiny), pytest.raises(KeyboardInterrupt), trainable_lora(tiny, rank=RANK, alpha=ALPHA, seed=0):
        pass
    assert len(calls) == 3


def test_only_the_new_layers_are_trained_and_the_output_matrix_has_none(tiny: LanguageModel) -> None:
    with trainable_lora(tiny, rank=RANK, alpha=ALPHA, seed=0):
        trained = {name for name, weight in tiny.network.named_parameters() if weight.requires_grad}
        assert trained
        assert all(".lora_" in name for name in trained)
        assert len(trained) == len(lora_parameters(tiny))
        assert not any(name.startswith(("lm_head", "embed_out")) for name in trained)


def test_layers_are_trained_in_float32_whatever_the_model_computes_in(folder: ModelFolder) -> None:
    """Small steps of an optimizer would be rounded away in bfloat16."""
    half = load_checkpoint(str(folder.path), dtype="bfloat16", device="cpu")
    batch = collate([Row((5, 6, 7), (8, 9))], 0, half.device)
    with unchanged(half), trainable_lora(half, rank=RANK, alpha=ALPHA, seed=0):
        response_nll(response_logits(half.network, batch), batch.targets).mean().backward()
        trained = lora_parameters(half)
        assert {one.dtype for one in trained} == {torch.float32}
        assert any(one.grad is not None and one.grad.abs().max() > 0 for one in trained)
        assert {one.dtype for one in take_patch(half, rank=RANK, alpha=ALPHA).tensors.values()} == {torch.float32}


def test_what_was_trained_beside_bfloat16_weights_is_what_is_applied(folder: ModelFolder) -> None:
    """In the weights, where `merge` must put it, a change this small is mostly rounded away."""
    half, for_good = (load_checkpoint(str(folder.path), dtype="bfloat16", device="cpu") for _ in range(2))
    plain = logits(half).float()
    with trainable_lora(half, rank=RANK, alpha=ALPHA, seed=0), torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for weights in lora_parameters(half):
            weights.copy_(0.02 * torch.randn(weights.shape, generator=generator))
        trained, patch = logits(half).float(), take_patch(half, rank=RANK, alpha=ALPHA)
    with unchanged(half), applied(patch, half) as patched:
        beside = logits(patched).float()
    inside = logits(merge(patch, for_good, "merged")).float()
    assert (trained - plain).abs().mean() > 0
    assert (beside - trained).abs().mean() < 0.3 * (inside - trained).abs().mean()


@pytest.mark.parametrize(("decay", "expected"), [(0.9, (0.09 * 1 + 0.1 * 3) / 0.19), (0.0, 3.0)])
def test_the_running_mean_of_two_steps_by_hand_and_the_last_step_is_back_after_it(
    tiny: LanguageModel, decay: float, expected: float
) -> None:
    with trainable_lora(tiny, rank=RANK, alpha=ALPHA, seed=0):
        weights = lora_parameters(tiny)[0]
        mean = RunningMean(tiny, decay)
        for value in (1.0, 3.0):
            weights.data.fill_(value)
            mean.update()
        with pytest.raises(KeyboardInterrupt), mean.inside():
            assert weights.flatten().tolist() == pytest.approx([expected] * weights.numel())
            raise KeyboardInterrupt
        assert set(weights.flatten().tolist()) == {3.0}


def test_training_goes_on_from_a_patch(tiny: LanguageModel, patch: Patch) -> None:
    with applied(patch, tiny):
        expected = logits(tiny)
    with unchanged(tiny), trainable_lora(tiny, rank=RANK, alpha=ALPHA, seed=1, start=patch):
        assert equal(take_patch(tiny, rank=RANK, alpha=ALPHA), patch)
        assert torch.allclose(logits(tiny), expected, atol=1e-4)


def test_a_patch_for_another_base_or_of_another_shape_is_no_start(tiny: LanguageModel, patch: Patch) -> None:
    fewer = dict(list(patch.tensors.items())[2:])
    for other, message in (
        (replace(patch, base_fingerprint="0" * 64), "fits the base"),
        (replace(patch, rank=RANK + 1), f"has rank {RANK + 1}.*expected rank {RANK}"),
        (replace(patch, alpha=ALPHA + 1), f"alpha {ALPHA + 1}; expected rank {RANK} and alpha {ALPHA}"),
        (replace(patch, tensors=fewer), f"has {len(fewer)} tensors, expected {len(patch.tensors)}"),
    ):
        with (
            unchanged(tiny),
            pytest.raises(UsageError, match=message),
            trainable_lora(tiny, rank=RANK, alpha=ALPHA, seed=0, start=other),
        ):
            pass


def test_untrained_layers_compute_the_base(tiny: LanguageModel) -> None:
    plain = logits(tiny)
    with trainable_lora(tiny, rank=RANK, alpha=ALPHA, seed=0):
        assert torch.equal(logits(tiny), plain)
        for weight in lora_parameters(tiny):
            weight.data.normal_(generator=torch.Generator().manual_seed(0))
        assert not torch.allclose(logits(tiny), plain, atol=1e-2)


def test_the_patched_model_is_the_trained_one(tiny: LanguageModel) -> None:
    made, trained = train(tiny)
    with applied(made, tiny) as patched:
        assert torch.allclose(logits(patched), trained, atol=1e-4)


def test_same_seed_same_patch(tiny: LanguageModel) -> None:
    state = torch.get_rng_state()
    first, second, third = train(tiny, 1)[0], train(tiny, 1)[0], train(tiny, 2)[0]
    assert equal(first, second)
    assert first.fingerprint != third.fingerprint
    assert torch.equal(torch.get_rng_state(), state), "the caller's random state was used"


def test_merging_is_applying_for_good(folder: ModelFolder, patch: Patch) -> None:
    lm = folder.load()
    with applied(patch, lm) as patched:
        expected = logits(patched)
    merged = merge(patch, lm, "merged")
    assert torch.equal(logits(merged), expected)
    assert merged.source == "merged"
    assert not equal_weights(merged, folder.load())


def equal_weights(one: LanguageModel, other: LanguageModel) -> bool:
    return fingerprint(one.network) == fingerprint(other.network)


def test_saving_and_loading_loses_nothing(tiny: LanguageModel, patch: Patch, tmp_path: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        out = tmp_path / str(dtype)
        with atomic_folder(out) as building:
            save_patch(patch.rounded(dtype), building, card="# A card\n")
        loaded = load_patch(out)
        assert equal(loaded, patch.rounded(dtype))
        assert (loaded.rank, loaded.alpha, loaded.base_source) == (RANK, ALPHA, patch.base_source)
        with applied(loaded, tiny) as read, torch.no_grad():
            got = logits(read)
        with applied(patch.rounded(dtype), tiny) as kept:
            assert torch.equal(logits(kept), got)
    assert (tmp_path / "torch.float32" / "README.md").read_text() == "# A card\n"


def test_whole_tensors_are_put_in_place_reverted_and_saved(tiny: LanguageModel, patch: Patch, tmp_path: Path) -> None:
    """Under the low-rank change: that goes on top."""
    module = next(name for name, _, _ in patch.factors())
    name = f"{module}.weight"
    new = torch.randn_like(tiny.network.get_parameter(name))
    both = replace(patch, changed={name: new})
    assert both.fingerprint != patch.fingerprint
    before, own = fingerprint(tiny.network), tiny.network.get_parameter(name).data
    with applied(both, tiny):
        change = patch.change(f"{module}.weight")
        torch.testing.assert_close(tiny.network.get_parameter(name).data, new + change)
    assert fingerprint(tiny.network) == before
    assert tiny.network.get_parameter(name).data is own or tiny.network.get_parameter(name).data_ptr() == own.data_ptr()
    with atomic_folder(tmp_path / "both") as folder:
        save_patch(both, folder, card="")
    loaded = load_patch(tmp_path / "both")
    assert loaded.fingerprint == both.fingerprint
    torch.testing.assert_close(loaded.changed[name], new)
    with pytest.raises(KeyError, match=r"load it with patcher\.load"):  # PEFT would leave the whole tensors out
        PeftModel.from_pretrained(tiny.network, str(tmp_path / "both"))
    (tmp_path / "both" / "changed.safetensors").unlink()
    with pytest.raises(UsageError, match="was altered"):
        load_patch(tmp_path / "both")


def test_what_a_killed_run_left_goes_and_what_another_one_writes_stays(tmp_path: Path) -> None:
    out = tmp_path / "patch"
    dead, alive = subprocess.Popen(["true"]), subprocess.Popen(["sleep", "60"])
    dead.wait()
    with atomic_path(out) as own:
        theirs = {process: own.with_name(f"{own.name[:-7]}{process.pid:07}") for process in (dead, alive)}
        own.write_text("whole")
    for part in theirs.values():
        part.mkdir()
        (part / "half").write_text("x")
    with atomic_path(out, again=True) as part:
        part.write_text("again")
    assert {*tmp_path.iterdir()} == {out, theirs[alive]}
    alive.kill()
    alive.wait()


def test_the_same_patch_is_saved_as_the_same_bytes(patch: Patch, tmp_path: Path) -> None:
    for name in ("one", "two"):
        with atomic_folder(tmp_path / name) as building:
            save_patch(patch, building, card="card")
    one, two = ({file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one == two


def test_peft_loads_our_folder(folder: ModelFolder, patch: Patch, tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "patch") as building:
        save_patch(patch, building, card="card")
    lm = folder.load()
    with applied(patch, lm) as patched:
        expected = logits(patched)
    peft = PeftModel.from_pretrained(lm.network, str(tmp_path / "patch"))
    theirs = from_transformers(peft.base_model.model, lm.tokenizer)
    assert torch.allclose(logits(theirs), expected, atol=1e-4)


def test_another_base_is_refused(folder: ModelFolder, patch: Patch) -> None:
    other = folder.load()
    next(other.network.parameters()).data[0, 0] += 1
    other = from_transformers(other.network, other.tokenizer)
    said = "exactly the model that it was made from"
    with unchanged(other), pytest.raises(UsageError, match=said), applied(patch, other):
        pass


def alter_weight(folder: Path) -> None:
    tensors = load_file(folder / patch_module.WEIGHTS)
    tensors[min(tensors)][0, 0] += 1e-3
    save_file(tensors, folder / patch_module.WEIGHTS)


def drop_tensor(folder: Path) -> None:
    tensors = load_file(folder / patch_module.WEIGHTS)
    del tensors[min(tensors)]
    save_file(tensors, folder / patch_module.WEIGHTS)


def truncate(folder: Path) -> None:
    file = folder / patch_module.WEIGHTS
    file.write_bytes(file.read_bytes()[:-7])


def edit_json(name: str, **changes: object):
    def edit(folder: Path) -> None:
        value = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**value, **changes}))

    return edit


def overwrite(name: str, text: str):
    return lambda folder: (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (alter_weight, "was altered"),
        (drop_tensor, "was altered"),
        (truncate, "damaged"),
        (edit_json(patch_module.CONFIG, lora_alpha=400), "was altered"),
        (edit_json(patch_module.CONFIG, r=1), "was altered"),
        (edit_json(patch_module.CONFIG, r="two"), "not a readable"),
        (edit_json(patch_module.CONFIG, r=0), "expected a positive integer"),
        (edit_json(patch_module.CONFIG, r=10**30), "expected a positive integer"),
        (edit_json(patch_module.CONFIG, lora_alpha=True), "expected a positive integer"),
        (edit_json(patch_module.CONFIG, alpha_pattern={"q_proj": 0}), "was altered: adapter_config.json"),
        (edit_json(patch_module.CONFIG, use_rslora=True), "was altered: adapter_config.json"),
        (edit_json(patch_module.CONFIG, target_modules=["q_proj"]), "was altered: adapter_config.json"),
        (edit_json(patch_module.PATCH, base_source=5), "base_source is 5, expected text"),
        (overwrite(patch_module.PATCH, "[" * 100_000), "nested too deeply"),
        (edit_json(patch_module.PATCH, base_fingerprint="0" * 64), "was altered"),
        (edit_json(patch_module.PATCH, fingerprint=None), "was altered"),
        (overwrite(patch_module.PATCH, "{"), "not a readable"),
        (overwrite(patch_module.PATCH, "[]"), "not a readable"),
        (overwrite(patch_module.CONFIG, "{}"), "not a readable"),
        (overwrite(patch_module.WEIGHTS, ""), "damaged"),
        (lambda folder: (folder / patch_module.PATCH).unlink(), "has no patch.json"),
        (lambda folder: (folder / patch_module.WEIGHTS).unlink(), "has no adapter_model.safetensors"),
    ],
)
def test_a_spoilt_adapter_is_refused(saved: tuple[Patch, Path], spoil, said: str) -> None:
    spoil(saved[1])
    with pytest.raises(UsageError, match=said):
        load_patch(saved[1])


def forged(patch: Patch, folder: Path, **changes: object) -> Path:
    """A folder whose hash is that of what it holds, as anybody can write one."""
    with atomic_folder(folder) as building:
        save_patch(replace(patch, **changes), building, card="")  # type: ignore[arg-type]
    return folder


@pytest.mark.parametrize(
    ("add", "said"),
    [
        ({"hello": torch.zeros(2)}, "hello is alone"),
        ({"model.norm.lora_A.weight": torch.zeros(RANK, 32)}, "lora_B.weight is alone"),
        ({f"x.lora_{part}.weight": torch.zeros(3, 3) for part in "AB"}, f"not of rank {RANK}"),
        ({f"x.lora_{part}.weight": torch.zeros(RANK) for part in "AB"}, f"not of rank {RANK}"),
    ],
)
def test_a_forged_adapter_without_pairs_is_refused(
    saved: tuple[Patch, Path], tmp_path: Path, add: dict[str, torch.Tensor], said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        load_patch(forged(saved[0], tmp_path / "forged", tensors={**saved[0].tensors, **add}))


def pair(name: str, into: int, out: int) -> dict[str, dict[str, torch.Tensor]]:
    return {
        "tensors": {f"{name}.lora_A.weight": torch.zeros(RANK, into), f"{name}.lora_B.weight": torch.zeros(out, RANK)}
    }


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (pair("model.layers.0.self_attn.zz_proj", 32, 32), "zz_proj is no linear layer"),
        (pair("model.layers.0.mlp.up_proj", 5, 64), r"up_proj is a linear layer of \[64, 32\]"),
        (pair("model.layers.0.mlp.up_proj", 32, 32), r"up_proj is a linear layer of \[64, 32\]"),
        (pair("model.norm", 32, 32), "model.norm is no linear layer"),
        (pair("model.layers", 32, 32), "model.layers is no linear layer"),
        ({"changed": {"nope.weight": torch.zeros(3)}}, "there is none"),
        ({"changed": {"model.norm.weight": torch.zeros(3)}}, r"that weight is \[32\]"),
        ({"changed": {"lm_head.weight": torch.zeros(3, 32)}}, r"changes the output matrix \(lm_head.weight\)"),
        (pair("lm_head", 32, 64), r"changes the output matrix \(lm_head.lora_A.weight\)"),
    ],
)
def test_a_forged_adapter_that_fits_no_layer_is_refused(
    llama: LanguageModel, saved: tuple[Patch, Path], tmp_path: Path, changes: dict[str, object], said: str
) -> None:
    loaded = load_patch(forged(saved[0], tmp_path / "forged", **changes))
    with unchanged(llama), pytest.raises(UsageError, match=said), applied(loaded, llama):
        pass


def test_an_adapter_that_is_its_own_base_is_refused(saved: tuple[Patch, Path], tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for folder, base in ((one, other), (other, one)):
        forged(saved[0], folder, base_source=str(base))
    with pytest.raises(UsageError, match="names itself as its base"):
        load(str(one))


def test_every_adapter_that_ships_is_as_patcher_writes_it() -> None:
    beds = [path.parent for path in (Path(__file__).parents[1] / "testbeds").glob(f"*/{patch_module.PATCH}")]
    assert all(load_patch(folder).rank for folder in (demo_adapter(), *beds))


def test_a_pickled_adapter_is_never_opened(saved: tuple[Patch, Path]) -> None:
    folder = saved[1]
    (folder / patch_module.WEIGHTS).rename(folder / "adapter_model.bin")
    with pytest.raises(UsageError, match="has no adapter_model.safetensors"):
        load_patch(folder)


def test_an_existing_output_is_refused_and_kept(tmp_path: Path) -> None:
    for name, make in (("folder", Path.mkdir), ("file", Path.touch)):
        out = tmp_path / name
        make(out)
        with pytest.raises(UsageError, match="exists already"), atomic_folder(out):
            pytest.fail("the block ran")
        assert out.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_what_appears_in_the_meantime_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(PatcherError, match="nothing is overwritten"), atomic_path(out) as part:
        part.write_text("ours")
        out.write_text("theirs")
    assert out.read_text() == "theirs"
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failing_write_leaves_nothing_behind(tmp_path: Path, error: type) -> None:
    with pytest.raises(error), atomic_folder(tmp_path / "out") as building:
        (building / "half").write_text("half")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_left_is_not_in_the_next_ones_folder(tmp_path: Path) -> None:
    killed = atomic_folder(tmp_path / "out")  # kept: it would clean up when collected
    (killed.__enter__() / "half").write_text("half")
    with atomic_folder(tmp_path / "out") as building:
        (building / "one").write_text("1")
    assert [path.relative_to(tmp_path) for path in tmp_path.rglob("*")] == [Path("out"), Path("out/one")]


def test_the_folder_is_not_seen_before_it_is_whole(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "deep" / "out") as building:
        (building / "one").write_text("1")
        assert not (tmp_path / "deep" / "out").exists()
    assert (tmp_path / "deep" / "out" / "one").read_text() == "1"
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]


def test_a_full_disk_is_one_clear_error_and_leaves_nothing(saved: tuple[Patch, Path], tmp_path: Path) -> None:
    """The kernel's limit on a file's size stands for the full disk: safetensors' own write really fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, before[1]))
        said = "nothing was left behind"
        with pytest.raises(PatcherError, match=said), atomic_folder(tmp_path / "out") as building:
            save_patch(saved[0], building, card="card")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert [path.name for path in tmp_path.iterdir()] == ["patch"]


def test_a_place_that_cannot_be_written_is_the_callers_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot write"), atomic_folder(tmp_path / "file" / "out"):
        pytest.fail("the block ran")
