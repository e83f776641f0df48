"""What a run may end with, and what is a violation."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

from bench.campaign.plan import Plan
from bench.campaign.sides import SLACK_S, STARVED_S

__all__ = ["Verdict", "judge"]


@dataclass
class Verdict:
    """How one run ended.

    Attributes:
        harmed: harm was not only planned, but met something.
        complaints: what broke the invariant; none in a good run.
        codes: the error codes that any side reported.
        story: what happened, for whoever looks into a violation.
    """

    plan: Plan
    delivered: bool = False
    repaired: bool = False
    harmed: bool = False
    complaints: list[str] = field(default_factory=list)
    codes: set[str] = field(default_factory=set)
    story: list[object] = field(default_factory=list)

    def followed_by(self, other: Verdict) -> Verdict:
        """Return the verdict on a run of two rounds."""
        return Verdict(self.plan, self.delivered and other.delivered,
                       self.repaired or other.repaired, False,
                       self.complaints + other.complaints, self.codes | other.codes,
                       self.story + other.story)

    def violation(self) -> dict[str, object]:
        return {"seed": self.plan.seed, "family": self.plan.name, "complaints": self.complaints,
                "plan": asdict(self.plan), "story": self.story}


Outcomes = list[dict[str, object]]


def judge(plan: Plan, sent: Outcomes | None, got: Outcomes | None, late_s: float = 0.0
          ) -> Verdict:
    """Weigh what the two sides report of each transfer; None: that side was killed.

    Args:
        late_s: by how much the campaign's own process ran late meanwhile.
    """
    late_s = max([late_s, *(found["late_s"] for found in [*(sent or ()), *(got or ())])])
    verdict = Verdict(plan, story=[{"sent": sent}, {"got": got}])
    for side, outcomes in (("sender", sent), ("receiver", got)):
        for number, found in enumerate(outcomes or ()):
            verdict.complaints += [f"transfer {number}, {side}: {complaint}"
                                   for complaint in _complaints(plan, found, late_s)]
            verdict.codes |= {found["code"]} - {""}
    for number, (there, here) in enumerate(zip(sent or (), got or ())):
        if here["error"] and not there["error"] and not there["hangs"]:
            verdict.complaints.append(
                f"transfer {number}: the sender believes delivered what the receiver says is not")
    decisive = got or sent or []
    verdict.delivered = bool(decisive) and all(
        not each["error"] and not each["hangs"] for each in decisive)
    verdict.repaired = verdict.delivered and any(each["repaired"] for each in decisive)
    return verdict


def _complaints(plan: Plan, found: dict[str, object], late_s: float) -> list[str]:
    complaints = []
    if found["hangs"]:
        complaints.append(f"has not ended {SLACK_S} s after its deadline")
    elif found["took_s"] > plan.deadline_s + SLACK_S + 2 * found["late_s"]:
        complaints.append(f"ended after {found['took_s']} s")
    if found["error"] and not found["typed"]:
        complaints.append(f"an error that no run may end with: {found['error']}")
    elif found["error"] and plan.must_deliver and late_s < STARVED_S:
        complaints.append(f"nothing here may keep it from arriving, but: {found['error']}")
    if found["wrong"]:
        complaints.append(found["wrong"])
    return complaints
