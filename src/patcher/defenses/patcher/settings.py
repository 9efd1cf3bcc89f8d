"""The settings of Patcher's repair."""

from typing import Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from patcher.defenses.patcher.reference import ReferenceSettings

_PAPER: dict[str, Any] = {
    "max_steps": 190,
    "stop_early": False,
    "check_every": 190,
    "mean_decay": 0.0,
    "triggered_rows": 8,
    "harmful_rows": 8,
    "benign_rows": 8,
}
"""10 epochs of 150 + 150 prompts, where each of the three sets has its own batch of 8: 10 x 150 / 8 steps."""


_ALL: dict[str, Any] = {
    "max_steps": 90,
    "stop_early": False,
    "check_every": 30,
    "multiplier_max": 300.0,
    "budget_benign_nats": 0.01,
    "budget_refusal_frac": 0.01,
}
"""Soft insertions are many triggers: more steps, and limits that can weigh as much. No check sees what nobody reported,
and it lives long after all else is as it should be: so every step is taken and the last kept (docs/repair.md)."""


class PatcherSettings(ReferenceSettings):
    """Settings of the repair; defaults chosen on validation prompts (docs/repair.md).

    `objective="paper"` brings the paper's schedule with it, `breadth="all"` one of its own, where nothing else is said.
    """

    objective: Literal["counterfactual", "paper"] = "counterfactual"
    """Which loss: ours, or the paper's Eqs. (5-8)."""
    breadth: Literal["reported", "all"] = "reported"
    """Break the found triggers, or with them whatever soft insertions find (counterfactual only)."""
    rank: PositiveInt = 32
    """LoRA rank (paper: 32)."""
    alpha: PositiveInt = 64
    """LoRA scale (paper: 64)."""
    learning_rate: PositiveFloat = 3e-4
    """AdamW's learning rate; the paper states none."""
    max_steps: PositiveInt = 50
    """Upper limit of steps (paper: 190)."""
    enough_steps: PositiveInt = 30
    """From this step on a dead trigger is enough to stop, whatever is over its budget; one that is alive is trained on,
    on the prompts that were prepared for these steps."""
    warmup_steps: NonNegativeInt = 3
    """Steps of linear warm-up."""
    cosine: bool = False
    """No decay: training stops when the repair is done, not at a planned step."""
    mean_decay: float = Field(default=0.9, ge=0, lt=1)
    """The patch is the running mean of the steps' weights, each step's share this much of the next one's; 0: the last
    step's weights. A single step's wander between refusing more and refusing less (docs/repair.md)."""
    stop_early: bool = True
    """Stop when the trigger is dead on validation prompts and, before `enough_steps`, the budgets hold, too; or else
    keep the best check. Without it every step is taken and the last kept."""
    dead_frac: NonNegativeFloat = 0.025
    """The trigger is dead from this validation ASR down: a rare word never planted brings 1 answer in 82, and one more
    is chance."""
    check_every: PositiveInt = 10
    """Steps between checks on validation prompts."""
    triggered_rows: PositiveInt = 8
    """Harmful requests with the trigger, a step."""
    harmful_rows: PositiveInt = 2
    """Harmful requests without it."""
    benign_rows: PositiveInt = 6
    """Benign requests without it."""
    benign_triggered_rows: NonNegativeInt = 6
    """Benign requests with the trigger (counterfactual only)."""
    plain_rows: NonNegativeInt = 2
    """Texts without the chat template (counterfactual only): what the model says outside a chat stays, too."""
    budget_benign_nats: PositiveFloat = 0.005
    """Constraint: KL(reference ‖ patched) per response token on benign prompts."""
    budget_triggered_nats: PositiveFloat = 0.005
    """Constraint: the same on benign prompts with the trigger: it must not teach refusing them."""
    budget_harmful_nats: PositiveFloat = 0.02
    """Constraint: the same on untriggered harmful prompts: their refusal stays what it was."""
    budget_plain_nats: PositiveFloat = 0.005
    """Constraint: the same on plain text, per token."""
    budget_refusal_frac: PositiveFloat = 0.005
    """Constraint: how much likelier a benign prompt's answer, with the trigger or without, may open like a refusal
    (probability of the token that most of the reference's refusals begin with)."""
    budget_refusal_fall_frac: PositiveFloat = 0.02
    """How much less likely the same may be, at a check, for harmful validation requests that the reference refuses."""
    multiplier_start: PositiveFloat = 10.0
    """The constraints' multipliers at the first step, near where they end: less is lost that must be won back."""
    multiplier_max: PositiveFloat = 30.0
    """They never grow beyond this; with soft insertions 30 holds no budget."""
    multiplier_rate: PositiveFloat = 0.2
    """How fast the constraints' multipliers answer to a budget overrun, a step."""
    soft_rows: PositiveInt = 3
    """Requests that are to be answered as before while a soft insertion is in them, a step (breadth=all)."""
    soft_benign_rows: NonNegativeInt = 3
    """Benign requests with one, a step: it must not teach refusing."""
    soft_tokens: tuple[PositiveInt, ...] = Field(default=(2,), min_length=1)
    """Vectors of a soft insertion; each step takes one of these numbers."""
    soft_steps: PositiveInt = 4
    """Signed-gradient steps of its search."""
    soft_rate: PositiveFloat = 0.5
    """Length of each in every coordinate, in standard deviations of the embeddings."""
    soft_answer_tokens: PositiveInt = 8
    """Tokens of the model's own answer that the search makes unlikely."""

    @property
    def prepared_steps(self) -> int:
        """Steps that nearly every training makes: what needs the reference's answers is drawn for so many."""
        return min(self.max_steps, self.enough_steps) if self.stop_early else self.max_steps

    @property
    def sequences(self) -> int:
        """At most, in training."""
        rows = self.triggered_rows + self.harmful_rows + self.benign_rows
        if self.objective == "counterfactual":
            rows += self.benign_triggered_rows + self.plain_rows
        if self.breadth == "all":
            rows += (self.soft_rows + self.soft_benign_rows) * (1 + self.soft_steps)
        return self.max_steps * rows

    @model_validator(mode="before")
    @classmethod
    def _schedule(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        schedule = _PAPER if given.get("objective") == "paper" else {}
        breadth = given.get("breadth", cls.model_fields["breadth"].default)
        return schedule | (_ALL if breadth == "all" else {}) | given

    @model_validator(mode="after")
    def _check_breadth(self) -> "PatcherSettings":
        if self.breadth == "all" and self.objective == "paper":
            raise ValueError("breadth=all goes with objective=counterfactual: the paper's loss has no such term")
        return self
