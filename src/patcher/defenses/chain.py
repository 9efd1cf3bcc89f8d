"""Two repairs, one after the other, as one patch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from patcher.defenses.contract import Defense, Evidence, Trained
from patcher.models import LanguageModel
from patcher.patch import applied, compose
from patcher.records import Record, UsageError
from patcher.training import Progress


class ChainSettings(Record):
    """Each defense's own settings, by its name; on the command line NAME.SETTING=VALUE."""

    parts: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Chain:
    """Defenses that repair in turn, each what the one before left."""

    links: Sequence[Defense]

    @property
    def name(self) -> str:
        """As on the command line: patcher+crow."""
        return "+".join(link.name for link in self.links)

    def settings(self, **changes: Any) -> ChainSettings:
        """All parts' settings, checked. Raises UsageError for a name that is no part's."""
        own: dict[str, dict[str, Any]] = {link.name: {} for link in self.links}
        for key, value in changes.items():
            part, dot, setting = key.partition(".")
            if part not in own or not dot:
                raise UsageError(f"{key!r}: a setting of {self.name} is named by its part: {self.links[0].name}.{key}")
            own[part][setting] = value
        return ChainSettings(parts={link.name: link.configured(own[link.name]).model_dump() for link in self.links})

    def run(
        self, lm: LanguageModel, evidence: Evidence, settings: ChainSettings, *, seed: int, on_progress: Progress
    ) -> Trained:
        """The first on `lm`, the next on what that left; the model that came in goes out bit-identical."""
        first, *others = self.links
        patch, log = first.repair(
            lm, evidence, first.configured(settings.parts[first.name]), seed=seed, on_progress=on_progress
        )
        logs = [log]
        for link in others:
            own = link.configured(settings.parts[link.name])
            with applied(patch, lm) as repaired:
                further, log = link.repair(repaired, evidence, own, seed=seed, on_progress=on_progress)
            patch = compose(patch, further)
            logs.append(log)
        return Trained(
            patch,
            steps=sum(log.steps for log in logs),
            stopped_because="; ".join(f"{log.defense}: {log.stopped_because}" for log in logs),
            checks=tuple(check for log in logs for check in log.checks),
        )
