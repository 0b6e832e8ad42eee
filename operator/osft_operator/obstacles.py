"""What keeps a PyTorchJob from being made: a missing kind, a taken name, a claim.

Called by steps before an attempt is recorded and again before it is made. It only says what is
wrong and what to do; nothing that belongs to somebody else is ever touched.
"""

from __future__ import annotations

from osft_operator import names
from osft_operator.draft import Draft
from osft_operator.observed import controller, is_deleting
from osft_operator.resolved import Resolved
from osft_operator.spec import OSFTJob

LONG_SECONDS = 30.0
"""Until the next look at something that a person must change."""


def in_the_way(draft: Draft, job: OSFTJob, resolved: Resolved, name: str) -> bool:
    """Say what keeps the PyTorchJob from being made, if anything does."""
    observed = draft.observed
    stranger = observed.stranger_named(name)
    if not observed.pytorch_job_kind_present:
        reason, words = (
            "PyTorchJobKindMissing",
            ("the cluster has no PyTorchJobs (kubeflow.org/v1): install the training-operator"),
        )
    elif stranger is not None:
        owner = controller(stranger)
        whose = f"{owner.get('kind')} {owner.get('name')}" if owner else "nobody"
        reason, words = (
            "NameTaken",
            (f"PyTorchJob {name} is there, owned by {whose}: delete it, or use another name"),
        )
    elif (trouble := _claim_trouble(draft, job, resolved)) is not None:
        reason, words = trouble
    else:
        return False
    draft.condition("Running", "False", reason, words)
    draft.look_again(LONG_SECONDS)
    return True


def _claim_trouble(draft: Draft, job: OSFTJob, resolved: Resolved) -> tuple[str, str] | None:
    claim, name = draft.observed.claim, resolved.checkpoint_claim
    if job.spec.storage.checkpoints.claim_name is not None:
        if claim is None:
            return "ClaimNotFound", f"claim {name} does not exist: create it"
        return None
    if claim is None:
        return None
    if is_deleting(claim):
        return "ClaimTerminating", f"claim {name} of an earlier OSFTJob is being deleted"
    owner = controller(claim)
    label = (claim["metadata"].get("labels") or {}).get(names.JOB_LABEL)
    if owner and owner.get("uid") != draft.observed.uid:
        whose = f"{owner.get('kind')} {owner.get('name')}"
        return "ClaimTaken", f"claim {name} belongs to {whose}: delete it, or use claimName"
    if not owner and label != job.metadata.name:
        return "ClaimTaken", (
            f"claim {name} exists without label {names.JOB_LABEL}={job.metadata.name}: label it, "
            "delete it, or use claimName"
        )
    return None
