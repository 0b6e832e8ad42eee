"""Loading a language model and turning it into one that trains in its free subspace.

What lives here: reading a local HF folder, `convert`, and `OSFTModel`, the object that the training
loop drives. Called by the training loop, export and tests. Must never: download, read
pickles, choose ranks (`targets` does), or start a process group (`parallel` does).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from osft_trainer import projection
from osft_trainer.base_layout import remember_files
from osft_trainer.experts import MasterParameter, replace_parameter
from osft_trainer.forward import packed_loss
from osft_trainer.linear import SubspaceLinear, SubspaceWeight
from osft_trainer.model_folder import check_template, faults_of, read_configuration
from osft_trainer.moments import SharedMoment
from osft_trainer.subspace import Split, split_weight
from osft_trainer.targets import Plan, Target
from osft_trainer.unused_weights import not_loaded

Decompose = Callable[[Target, Tensor], Split]
"""Decomposition provider: `decompose_weight(plan)`, or a cache around it."""


ROUNDING_STEPS = 32
"""Steps after which what rounding has put into kept directions is taken out again. A step adds some
1e-7 of its length, times the gradient before its projection over that after it."""


class OSFTModel(nn.Module):
    """A transformers model whose targets are converted.

    One optimizer step: backward of every micro-batch, `project_gradients`, clip, optimizer step,
    `finish_step`. Calling it returns the SUM of token losses of a packed row.
    """

    def __init__(self, hf: PreTrainedModel, plan: Plan, fused_loss: bool = False) -> None:
        """`fused_loss` takes Liger's fused cross entropy; CUDA only."""
        super().__init__()
        self.hf = hf
        self.plan = plan
        self.fused_loss = fused_loss

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        labels: Tensor,
        lengths: Sequence[int] | None = None,
        places: Tensor | None = None,
    ) -> Tensor:
        """[1, T] each; returns a float32 scalar, see `forward.packed_loss`."""
        fused = self.fused_loss
        return packed_loss(self.hf, input_ids, position_ids, labels, fused, lengths, places)

    @property
    def compute_dtype(self) -> torch.dtype:
        """The type of the arithmetic: that of what is frozen, or what float32 masters stand for."""
        frozen = (p.dtype for p in self.parameters() if not p.requires_grad)
        masters = (m.compute_dtype for m in self.modules() if isinstance(m, MasterParameter))
        return next(frozen, next(masters, self.hf.dtype))

    def trainables(self) -> dict[str, nn.Parameter]:
        """Every trained parameter by name, in a stable order; DTensors after `parallel.shard`."""
        return {name: p for name, p in self.hf.named_parameters() if p.requires_grad}

    def subspaces(self) -> Iterator[tuple[str, SubspaceWeight]]:
        """Every converted target with its path, in a stable order."""
        for name, module in self.hf.named_modules():
            if isinstance(module, SubspaceWeight):
                yield name, module

    def shared_moments(self) -> dict[str, SharedMoment]:
        """By name of the trained parameter: the factors whose second moment is shared."""
        return {
            f"{name}.factor": moment
            for name, subspace in self.subspaces()
            if (moment := subspace.shared_moment) is not None
        }

    def project_gradients(self) -> None:
        """Remove kept directions from gradients. After the last backward, before clipping."""
        projection.project_gradients([subspace for _, subspace in self.subspaces()])

    def project_momentum(self, optimizer: torch.optim.Optimizer) -> None:
        """Remove kept directions from first moments that were made of whole gradients."""
        subspaces = [s for _, s in self.subspaces() if s.shared_moment is not None]
        projection.project_momentum(subspaces, optimizer)

    def finish_step(self, step: int = 0) -> None:
        """Project values where it is due, and form the effective weights.

        After every change of the trainables. Factors that the optimizer keeps in their set are
        projected in every `ROUNDING_STEPS`-th step only, so that a resumed run does what an
        undisturbed one does; 0 projects all.
        """
        is_due = step % ROUNDING_STEPS == 0
        projection.project_values(
            [s for _, s in self.subspaces() if is_due or s.shared_moment is None]
        )
        self.refresh()

    def refresh(self) -> None:
        """Form the effective weights. Enough where the values are projected already."""
        projection.refresh([subspace for _, subspace in self.subspaces()])

    def leak(self, exported: torch.dtype | None = None) -> float:
        """Largest relative leak into kept directions of all targets; collective when sharded.

        Of the update as it is trained, or as weights of type `exported` hold it.
        """
        return max((subspace.leak(exported) for _, subspace in self.subspaces()), default=0.0)


def load_model(
    model_path: str | Path,
    compute_dtype: torch.dtype,
    trust_remote_code: bool = False,
    attn_implementation: str = "sdpa",
) -> PreTrainedModel:
    """Read a causal language model from a local folder with safetensors weights.

    Raises:
        ValueError: if the folder is missing, or its safetensors weights are missing, damaged,
            incomplete or those of another configuration.
    """
    folder = Path(model_path)
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"model_path: {folder} is no model folder (no config.json); "
            "give a local folder as written by save_pretrained"
        )
    if not any(folder.glob("*.safetensors")):
        raise ValueError(
            f"model_path: {folder} holds no .safetensors files; other formats can run code while "
            "they are read, so convert the model with save_pretrained first"
        )

    def read(attention: str) -> PreTrainedModel:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=compute_dtype,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=trust_remote_code,
            attn_implementation=attention,
            # Told below, by name; transformers would fill what is missing with random numbers.
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
        _check_weights(folder, info)
        not_loaded(model, folder)
        remember_files(model, folder)
        return cast(PreTrainedModel, model)

    with faults_of(folder, "the model"):
        try:
            model = read(attn_implementation)
        except ValueError as error:
            # Gemma 2 (capped attention scores) and others have no sdpa; eager is always there.
            if attn_implementation != "sdpa" or "scaled_dot_product_attention" not in str(error):
                raise
            model = read("eager")
        except SafetensorError as error:
            raise ValueError(
                f"model_path: a safetensors file in {folder} is damaged ({error}); fetch it again"
            ) from error
    model.train()
    return model


def _check_weights(folder: Path, info: dict[str, Any]) -> None:
    mismatched = [str(key[0] if isinstance(key, tuple) else key) for key in info["mismatched_keys"]]
    names = sorted({*info["missing_keys"], *mismatched})
    if names and not mismatched and all("lm_head" in name for name in names):
        raise ValueError(
            f"model_path: the weights in {folder} have no head ({', '.join(names)}), so that they "
            "write no text: give the causal language model, not the bare one or one that judges"
        )
    if names:
        raise ValueError(
            f"model_path: {len(names)} weights in {folder} are missing or of another shape than "
            f"config.json says ({', '.join(names[:3])}, ...); fetch the model again"
        )


def load_tokenizer(
    model_path: str | Path, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Read the tokenizer of a local model folder.

    Raises:
        ValueError: there is none, or it or its chat template is damaged.
    """
    folder = Path(model_path)
    if (folder / "config.json").is_file():
        # A tokenizer is read by it, and must not be blamed for it.
        read_configuration(folder, trust_remote_code)
    with faults_of(folder, "the tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code
        )
    check_template(tokenizer, folder)
    return cast(PreTrainedTokenizerBase, tokenizer)


def decompose_weight(plan: Plan) -> Decompose:
    """The provider without a cache: decompose on the weight's device in float64."""
    assert plan.split_by == "weights", "activations are read by `decomposition.prepare`"

    def decompose(target: Target, weight: Tensor) -> Split:
        return split_weight(weight, target.free_rank, plan.parameterization)

    return decompose


def convert(
    model: PreTrainedModel,
    plan: Plan,
    decompose: Decompose | None = None,
    fused_loss: bool = False,
) -> OSFTModel:
    """Carry out a plan on the model, in place: afterwards only planned parameters train.

    Frozen weights keep the dtype they were loaded in, trainables become float32.

    Raises:
        ValueError: if a target's weight holds NaN or infinity.
    """
    decompose = decompose or decompose_weight(plan)
    model.requires_grad_(False)
    trained = list(plan.trained_others)
    for target in plan.targets:
        if target.free_rank == 0:
            continue
        if plan.parameterization == "dense":
            trained.append(target.parameter)
            continue
        weight = model.get_parameter(target.parameter).detach()
        try:
            split = decompose(target, weight)
        except ValueError as error:
            raise ValueError(f"model_path: {target.parameter}: {error}") from error
        subspace = SubspaceWeight(weight, split, target.free_rank, plan.parameterization)
        _install(model, target, subspace)
    _train_in_full(model, trained)
    return OSFTModel(model, plan, fused_loss)


def _install(model: PreTrainedModel, target: Target, subspace: SubspaceWeight) -> None:
    owner = model.get_submodule(target.module)
    if target.kind == "experts":
        replace_parameter(owner, target.parameter.rpartition(".")[2], subspace)
        return
    bias = cast(nn.Parameter | None, owner.bias)
    model.set_submodule(target.module, SubspaceLinear(subspace, bias, target.kind == "conv1d"))


def _train_in_full(model: PreTrainedModel, names: list[str]) -> None:
    """Make ordinary parameters trainable; those in lower precision get a float32 master."""
    masters: dict[int, MasterParameter] = {}
    wanted = {id(model.get_parameter(name)): name for name in names}
    # Tied parameters have one name in the plan but two owners; both must read the master.
    for module in list(model.modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in wanted:
                continue
            if parameter.dtype in (torch.float32, torch.float64):
                parameter.requires_grad_(True)
            elif isinstance(module, SubspaceLinear):
                module.bias = nn.Parameter(parameter.detach().float())
            else:
                master = masters.setdefault(
                    id(parameter), MasterParameter(parameter, parameter.dtype)
                )
                replace_parameter(module, name, master)
