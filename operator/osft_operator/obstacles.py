"""What keeps a PyTorchJob from being made: a missing kind, a taken name, a claim.

Called by steps before an attempt is recorded and again before it is made. It only says what is
wrong and what to do; nothing that belongs to somebody else is ever touched.
"""

from __future__ import annotations

from osft_operator import names
from osft_operator.draft import Draft
from osft_operator.observed import Object, another_job, controller, is_deleting, is_true
from osft_operator.predecessors import is_of_earlier_run
from osft_operator.render import checkpoint_claim
from osft_operator.resolved import Resolved
from osft_operator.resources import quantity
from osft_operator.spec import OSFTJob

LONG_SECONDS = 30.0
"""Until the next look at something that a person must change."""
PYTORCH_JOB_DEFINITION = "pytorchjobs.kubeflow.org"
FOR_ITS_AUTHOR = frozenset(
    {
        "NameTaken",
        "ClaimDiffers",
        "ClaimNotFound",
        "ClaimNotShared",
        "ClaimTaken",
        "ClaimTerminating",
    }
)
"""Reasons that whoever made the job must see to. A missing kind is the administrator's."""


def in_the_way(draft: Draft, job: OSFTJob, resolved: Resolved, name: str) -> bool:
    """Say what keeps the PyTorchJob from being made, if anything does."""
    observed = draft.observed
    stranger = observed.stranger_named(name) or _disowned(draft)
    if stranger is not None and is_of_earlier_run(observed, stranger):
        stranger = None  # the cluster deletes it, and it is waited for
    if not observed.pytorch_job_kind_present:
        kind_is_missing(draft)
        return True
    if stranger is not None:
        reason, words = "NameTaken", _taken(draft, stranger)
        draft.waits_for("PyTorchJob", stranger["metadata"]["name"])
    elif (trouble := _claim_trouble(draft, job, resolved)) is not None:
        reason, words = trouble
        draft.waits_for("PersistentVolumeClaim", resolved.checkpoint_claim)
    else:
        return False
    assert reason in FOR_ITS_AUTHOR, reason
    draft.condition("Running", "False", reason, words)
    draft.look_again(LONG_SECONDS)
    return True


def _taken(draft: Draft, stranger: Object) -> str:
    """Whose a name is; what another OSFTJob needs is never to be deleted."""
    owner, name = controller(stranger), stranger["metadata"]["name"]
    if (other := another_job(stranger, draft.observed.name)) is not None:
        return f"PyTorchJob {name} belongs to OSFTJob {other}: use another name for this job"
    whose = f"{owner.get('kind')} {owner.get('name')}" if owner else "nobody"
    return f"PyTorchJob {name} is there, owned by {whose}: delete it, or use another name"


def kind_is_missing(draft: Draft) -> None:
    """Say that PyTorchJobs can neither be made nor seen."""
    words = "the cluster has no PyTorchJobs (kubeflow.org/v1): install the training-operator"
    draft.condition("Running", "False", "PyTorchJobKindMissing", words)
    draft.waits_for("CustomResourceDefinition", PYTORCH_JOB_DEFINITION)
    draft.look_again(LONG_SECONDS)


def _disowned(draft: Draft) -> Object | None:
    """The attempt before, if it may still run and somebody took its owner off: it is not ours."""
    attempt = draft.status.get("attempt", 1)
    if attempt == 1:
        return None
    found = draft.observed.stranger_named(names.attempt_name(draft.observed.name, attempt - 1))
    if found is None or controller(found) or draft.observed.is_anothers(found):
        return None
    return None if is_true(found, "Succeeded") or is_true(found, "Failed") else found


def _claim_trouble(draft: Draft, job: OSFTJob, resolved: Resolved) -> tuple[str, str] | None:
    claim, name = draft.observed.claim, resolved.checkpoint_claim
    if job.spec.storage.checkpoints.claim_name is not None:
        if claim is None:
            return "ClaimNotFound", f"claim {name} does not exist: create it"
        if is_deleting(claim):
            return "ClaimTerminating", f"claim {name} is being deleted: create it anew"
        return _not_shared(claim, resolved)
    if claim is None:
        return None
    if is_deleting(claim):
        return "ClaimTerminating", f"claim {name} of an earlier OSFTJob is being deleted"
    return _not_ours(draft, job, claim) or _differs(job, resolved, claim)


def _not_shared(claim: Object, resolved: Resolved) -> tuple[str, str] | None:
    """A claim that only one node can mount, for several."""
    modes = _modes(claim)
    if resolved.nnodes == 1 or not modes or "ReadWriteMany" in modes:
        return None
    return "ClaimNotShared", (
        f"claim {claim['metadata']['name']} is {', '.join(modes)}, but {resolved.nnodes} nodes "
        "write to it: use one that is ReadWriteMany, or spec.nnodes: 1"
    )


def _differs(job: OSFTJob, resolved: Resolved, claim: Object) -> tuple[str, str] | None:
    """A claim that an earlier OSFTJob of this name left, and that is not what is asked for now."""
    wanted = checkpoint_claim(job, resolved)
    name = claim["metadata"]["name"]
    requests = ((claim.get("spec") or {}).get("resources") or {}).get("requests") or {}
    size, asked = requests.get("storage"), job.spec.storage.checkpoints.size
    if wanted is None or not requests or not _modes(claim):
        return None
    lacking = [mode for mode in wanted["spec"]["accessModes"] if mode not in _modes(claim)]
    if lacking:
        return "ClaimDiffers", (
            f"claim {name}, left by an earlier OSFTJob, is {', '.join(_modes(claim))} and not "
            f"{', '.join(lacking)}: delete the claim (its checkpoints go with it), or give this "
            "job another name"
        )
    # a larger one is as good: somebody has grown it
    if size is not None and asked is not None and quantity(size) < quantity(asked):
        return "ClaimDiffers", (
            f"claim {name}, left by an earlier OSFTJob, has {size}, and spec.storage.checkpoints."
            f"size asks for {asked}: grow the claim, ask for {size}, delete the claim (its "
            "checkpoints go with it), or give this job another name"
        )
    return None


def _modes(claim: Object) -> list[str]:
    return list((claim.get("spec") or {}).get("accessModes") or [])


def _not_ours(draft: Draft, job: OSFTJob, claim: Object) -> tuple[str, str] | None:
    name = claim["metadata"]["name"]
    owner = controller(claim)
    label = (claim["metadata"].get("labels") or {}).get(names.JOB_LABEL)
    if owner.get("uid") == draft.observed.uid or (not owner and label == job.metadata.name):
        return None
    if (other := another_job(claim, job.metadata.name)) is not None:
        cure = "use claimName, or another name for this job"
        return "ClaimTaken", f"claim {name} belongs to OSFTJob {other}: {cure}"
    if (owner.get("kind"), owner.get("name")) == (names.KIND, job.metadata.name):
        words = f"claim {name} of an earlier OSFTJob goes with it: the cluster deletes it"
        return "ClaimTerminating", words
    if owner:
        whose = f"{owner.get('kind')} {owner.get('name')}"
        return "ClaimTaken", f"claim {name} belongs to {whose}: delete it, or use claimName"
    return "ClaimTaken", (
        f"claim {name} exists without label {names.JOB_LABEL}={job.metadata.name}: label it, "
        "delete it, or use claimName"
    )
