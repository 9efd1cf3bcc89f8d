"""CROW: hidden states that pass smoothly from layer to layer, also under an adversarial nudge of the embeddings.

Min et al. (2025), ICML, arXiv:2411.12768. It needs no trigger and no report.
"""

import random

import torch
from jaxtyping import Float, Int
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from patcher.chat import collate
from patcher.defenses.common import LoraSettings, clean_answers, tune
from patcher.defenses.contract import Evidence, Trained
from patcher.layers import all_hidden_states
from patcher.losses import consistency, response_nll
from patcher.models import LanguageModel
from patcher.network import logits_of
from patcher.training import Progress, endless


class CrowSettings(LoraSettings):
    """The authors' code [code], unless said."""

    rank: PositiveInt = 8
    """LoRA rank [code]."""
    alpha: PositiveInt = 16
    """LoRA scale [code]."""
    learning_rate: PositiveFloat = 1e-3
    """AdamW's peak learning rate [code]."""
    max_steps: PositiveInt = 63
    """5 epochs of 100 samples, 8 a step [code]."""
    warmup_steps: NonNegativeInt = 6
    """A tenth of the steps [code]."""
    cosine: bool = True
    """Decay to 0 over the steps [code]."""
    clean_rows: PositiveInt = 8
    """Clean samples a step; theirs are 2 in 4 accumulated batches [code]."""
    max_prompts: PositiveInt = 100
    """Clean samples [code]."""
    response_tokens: PositiveInt = 32
    """Answers are cut here; ours."""
    consistency_weight: PositiveFloat | None = None
    """α; 5.5, or where benign requests are refused 11 [code]."""
    nudge: PositiveFloat = 0.1
    """ε, the size of each coordinate of the nudge [code]."""

    @property
    def sequences(self) -> int:
        """At most, in training."""
        return 2 * super().sequences


def run(lm: LanguageModel, evidence: Evidence, settings: CrowSettings, *, seed: int, on_progress: Progress) -> Trained:
    """Train on clean data under a consistency loss.

        L_cons(e) = mean over layers and tokens of 1 - cos(h_l, h_{l+1}), h = the layers' outputs from embeddings e
        δ = ε sign(∂L_cons/∂e)
        L = NLL(answer) + α L_cons(e + δ)

    The embeddings themselves and the last layer are left out of L_cons, as in the authors' code.

    Departures: clean data are the model's own answers to `max_prompts` benign requests and to all borderline ones, so
    that the steps are 2.6 epochs of the bundled prompts; the gradients of a whole batch are kept
    (in the authors' code those of earlier micro-batches are lost) and padding is left out of L_cons.
    """
    rng = random.Random(seed)
    weight = settings.consistency_weight or (11.0 if evidence.detector.symptom.objective == "refusal" else 5.5)
    clean = endless(clean_answers(lm, evidence, settings, on_progress), rng)

    def loss_at(_step: int) -> Tensor:
        rows = [next(clean).row(lm) for _ in range(settings.clean_rows)]
        batch = collate(rows, int(lm.tokenizer.pad_token_id), lm.device, lift=False)
        embeddings = lm.network.get_input_embeddings()(batch.input_ids).detach().requires_grad_(True)
        states = all_hidden_states(lm.network, embeddings, batch.mask)
        (slope,) = torch.autograd.grad(layer_consistency(states, batch.mask), embeddings, retain_graph=True)
        nudged = all_hidden_states(lm.network, embeddings.detach() + settings.nudge * slope.sign(), batch.mask)
        logits = logits_of(lm.network, states[-1][batch.target_rows, batch.target_positions])
        smooth = layer_consistency(nudged, batch.mask)
        return response_nll(logits, batch.targets).mean() + weight * smooth

    return tune(lm, loss_at, settings, seed=seed, what="smoothing layers", on_progress=on_progress)


def layer_consistency(states: tuple[Float[Tensor, "B T D"], ...], mask: Int[Tensor, "B T"]) -> Float[Tensor, ""]:
    """L_cons of a model's hidden states, the embeddings first; with two layers, all count."""
    return consistency(states[1:-1] if len(states) > 3 else states, mask)
