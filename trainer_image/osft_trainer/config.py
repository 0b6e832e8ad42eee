"""CONTRACT: every parameter of a training run, once.

The fields below are the keyword arguments of `osft()`, the arguments of the trainer's container,
`osft-train --help`, the schema of `spec.training` in the OSFTJob CRD, and the table in the
README. Called by the operator (spec, crd, render), by the launcher and by the Python API. After a
change run `make generate`. Operator, trainer image and definition may be one minor version apart:
the default of a parameter that is added means what was done before there was one, and a choice that
is added becomes the default one version later. Must never import torch, transformers, kopf or
kubernetes.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from osft_trainer.parameters import Parameters, Path, Text

ENDLESS_SCHEDULES = ("constant", "constant_with_warmup")
"""Learning rate schedules that need no total number of steps (`training_mode: infinite`)."""


class TrainingParameters(Parameters):
    """What to train, on what, how, and what to write."""

    model_path: Path
    """Folder of the base model in Hugging Face format (safetensors), or its hub name."""
    data_path: Path
    """JSONL, JSON or Parquet file, a folder with such files in it and below it, a pattern such as
    /data/train-*.jsonl.gz, or a folder of datasets' save_to_disk. A row is {"messages": [...]},
    with "tools" and "unmask" if wanted; isPretraining takes other rows."""
    ckpt_output_dir: Path
    """Folder of the run: checkpoints, metrics and the final model. Shared by all nodes."""
    unfreeze_rank_ratio: float = Field(ge=0, le=1)
    """Share of each target matrix's directions that may change. 0: none. 1: all, which is full
    fine-tuning. The least used directions are freed first; 0.25 is a careful start."""
    effective_batch_size: int = Field(ge=1, le=1_000_000)
    """Samples per optimizer step, over all ranks."""
    max_tokens_per_gpu: int = Field(ge=1, le=100_000_000)
    """Tokens one rank holds in one forward pass, padding included. More is faster, until memory is
    full; it does not change the result."""
    max_seq_len: int = Field(ge=1, le=100_000_000)
    """Longest sample in tokens; see onOverlong. At most maxTokensPerGpu."""
    learning_rate: float = Field(gt=0, le=1)
    """Peak learning rate of AdamW."""

    target_patterns: list[Annotated[Text, Field(max_length=256)]] | None = Field(
        default=None, min_length=1, max_length=64
    )
    """Regular expressions searched in module paths: which matrices are split. Absent: every linear
    layer and expert inside the decoder blocks, never lm_head, routers or gates of experts."""
    split_by: Literal["weights", "activations"] = "weights"
    """What tells old knowledge from free room. weights: the strong directions of each matrix are
    kept. activations: those that the inputs of each matrix use on text of the old skills."""
    retention_data_path: Path | None = None
    """Text of the skills to keep, as dataPath; trained on only where replayRatio says so. The loss
    on a part of it is measured before and after. Absent where splitBy activations, rankAllocation
    adaptive or replayRatio needs it: the model writes such text itself."""
    retention_tokens: int = Field(default=100_000, ge=1, le=1_000_000_000)
    """Tokens of retention text that are read, or written by the model."""
    replay_ratio: float = Field(default=0.0, ge=0, le=16)
    """Samples of retention text that are learned again for each sample of the data, on top of
    effectiveBatchSize; 0.25 adds a sample to each four. It helps where the new is asked in the
    words of the old, which a split cannot tell apart."""
    rank_allocation: Literal["uniform", "adaptive"] = "uniform"
    """uniform: every matrix gets the same share of free directions. adaptive: blocks that change
    their input little, measured on retention text, keep more; the mean share stays."""
    parameterization: Literal["exact", "core", "factored"] = "exact"
    """How the allowed update is written down. exact: one factor that spans the whole allowed set.
    core: one square factor, a part of the set with far smaller optimizer state. factored: the U, S,
    V factors of mini_trainer, for comparison."""
    other_parameters: Literal["frozen", "norms", "all"] = "frozen"
    """What happens to parameters that are no target: frozen, only the norms are trained, or all are
    trained as in plain fine-tuning."""

    training_mode: Literal["epoch", "step", "token", "infinite"] = "epoch"
    """What ends the run: numEpochs, maxSteps, maxTokens, or nothing but a stop."""
    num_epochs: int | None = Field(default=None, ge=1, le=1_000_000)
    """Passes over the data, in mode epoch. Absent: 1."""
    max_steps: int | None = Field(default=None, ge=1, le=1_000_000_000)
    """Optimizer steps, in mode step."""
    max_tokens: int | None = Field(default=None, ge=1, le=1_000_000_000_000_000)
    """Tokens that count for the loss, in mode token; the step that reaches it is the last."""
    lr_scheduler: Annotated[Text, Field(max_length=64)] = "cosine"
    """Schedule by its transformers name: cosine, linear, constant, constant_with_warmup, ..."""
    lr_scheduler_kwargs: dict[str, Any] = Field(default_factory=dict, max_length=16)
    """Further arguments of the schedule, for instance {"num_cycles": 0.5}."""
    warmup_steps: int = Field(default=0, ge=0, le=1_000_000_000)
    """Optimizer steps in which the learning rate rises from zero."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """AdamW's decay of the mean of gradients."""
    beta2: float = Field(default=0.95, ge=0, lt=1)
    """AdamW's decay of the mean of squared gradients."""
    eps: float = Field(default=1e-8, gt=0, le=1)
    """AdamW's addend in the denominator."""
    weight_decay: float = Field(default=0.0, ge=0, le=10)
    """AdamW's decay. With parameterization exact it decays the update: towards the base model."""
    max_grad_norm: float = Field(default=1.0, gt=0, le=1e9)
    """Global gradient norm above which gradients are scaled down; of what may change alone."""
    seed: int = Field(default=42, ge=0, le=2**32 - 1)
    """Order of the data and random numbers of the model."""

    on_overlong: Literal["error", "drop", "truncate"] = "error"
    """What to do with a sample longer than maxSeqLen. Dropped and cut samples are counted."""
    on_bad_sample: Literal["error", "skip"] = "error"
    """What to do with a row that cannot be used. error: stop and name up to five, by file, line and
    reason. skip: go on; the first ones are named in the log and all are counted."""
    on_missing_eos: Literal["error", "append", "ignore"] = "error"
    """What to do where the chat template ends an assistant's turn with no token that can be
    trained. append: the tokenizer's eos_token ends each turn. ignore: the model learns no end."""
    unmask_messages: bool = False
    """Loss on every turn but the system's, in every sample; "unmask": true does it for one."""
    use_processed_dataset: bool = False
    """Rows hold input_ids and labels instead of messages; a label is -100 or the id itself."""
    is_pretraining: bool = False
    """Rows hold plain documents instead of messages: joined, and cut into blocks of blockSize."""
    block_size: int | None = Field(default=None, ge=2, le=100_000_000)
    """Tokens of a block, which is one sample. Needed with isPretraining; at most maxSeqLen."""
    document_column_name: Annotated[Text, Field(max_length=256)] | None = None
    """Where a row of isPretraining keeps its text. Absent: in `document`, else in `text`."""
    use_liger: bool = True
    """Liger kernels on CUDA. On CPU they do not exist: a line in the log says that they are off."""
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the frozen weights and of the arithmetic. auto: bfloat16 on CUDA, float32 on CPU.
    What is trained is always float32."""
    activation_checkpointing: bool = True
    """Recompute each block in the backward pass: less memory, more time."""
    selective_activation_checkpointing: bool = False
    """Keep the results of matrix products and attention, and recompute only what is cheap: far less
    memory than without activationCheckpointing, and nearly its speed."""
    torch_compile: bool = False
    """Compile each decoder block when it first runs, which took 20 s on CPU; then what lies between
    the products is fused. Dropout draws other numbers. On CPU it needs a C++ compiler, which the
    trainer image does not have."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off unless you read that code."""

    validation_data_path: Path | None = None
    """Data in the form of dataPath on which the loss is measured and nothing is learned."""
    validation_split: float = Field(default=0.0, ge=0, lt=1)
    """Share of the samples of dataPath that is held back for this instead. Which ones follows from
    their content, so a sample stays on its side when others are added."""
    validation_frequency: int | None = Field(default=None, ge=1, le=1_000_000_000)
    """Measure the validation loss every so many optimizer steps."""
    validate_at_epoch: bool = False
    """Measure the validation loss at the end of each epoch."""
    validate_at_final: bool = True
    """Measure the validation loss after the last optimizer step."""
    save_best_val_loss: bool = False
    """Write the model with the lowest validation loss so far to exports/best."""
    val_loss_improvement_threshold: float = Field(default=0.0, ge=0, le=1e9)
    """Least fall of the validation loss, in nats per token, that makes a model the best."""

    checkpoint_every_steps: int | None = Field(default=None, ge=1, le=1_000_000_000)
    """Save a state to resume from every so many optimizer steps; training goes on meanwhile.
    Absent, and checkpointEveryMinutes too: only when stopped or at the end, and at each epoch if
    checkpointAtEpoch is set."""
    checkpoint_every_minutes: float | None = Field(default=None, gt=0, le=1_000_000)
    """Save such a state when so many minutes have passed since the last one."""
    keep_checkpoints: int = Field(default=2, ge=1, le=1000)
    """How many of these states stay; older ones are removed."""
    checkpoint_at_epoch: bool = False
    """Save a state at the end of each epoch, and the model as exports/epoch-NNNN."""
    save_final_checkpoint: bool = True
    """Write the trained model to final/ as a Hugging Face folder."""
    save_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type of the weights in exported folders, in place of the type that most of the base's have;
    single tensors of another type keep theirs. Absent: every tensor's as in the base."""

    wandb_project: Annotated[Text, Field(max_length=128)] | None = None
    """Weights & Biases project; its key comes from the environment (WANDB_API_KEY). With
    WANDB_MODE=offline the run lies in wandb/ in ckptOutputDir."""
    wandb_entity: Annotated[Text, Field(max_length=128)] | None = None
    """Weights & Biases team or user."""
    wandb_run_name: Annotated[Text, Field(max_length=128)] | None = None
    """Name of the Weights & Biases run."""
    mlflow_tracking_uri: Annotated[Text, Field(max_length=1024)] | None = None
    """MLflow server, a file: address, or a database (sqlite:///...), which needs the whole mlflow
    package; credentials come from the environment (MLFLOW_TRACKING_TOKEN, ...)."""
    mlflow_experiment_name: Annotated[Text, Field(max_length=256)] | None = None
    """MLflow experiment. Absent: Default."""
    mlflow_run_name: Annotated[Text, Field(max_length=256)] | None = None
    """Name of the MLflow run."""
    tensorboard: bool = False
    """Write events for TensorBoard to logs/ in ckptOutputDir."""

    @model_validator(mode="after")
    def _check_lengths(self) -> Self:
        if self.max_seq_len > self.max_tokens_per_gpu:
            raise ValueError(
                f"max_seq_len {self.max_seq_len} must be at most max_tokens_per_gpu "
                f"{self.max_tokens_per_gpu}: lower max_seq_len or raise max_tokens_per_gpu"
            )
        return self

    @model_validator(mode="after")
    def _check_split(self) -> Self:
        if self.split_by == "activations" and self.parameterization != "exact":
            raise ValueError(
                f"parameterization {self.parameterization} is made of a matrix's own directions, "
                "split_by activations of its inputs': use parameterization exact"
            )
        if self.split_by == "activations" and self.other_parameters != "frozen":
            raise ValueError(
                f"other_parameters {self.other_parameters} would change the inputs that split_by "
                "activations relies on: use other_parameters frozen"
            )
        return self

    @model_validator(mode="after")
    def _check_form(self) -> Self:
        forms = ("is_pretraining", "use_processed_dataset", "unmask_messages")
        given = [name for name in forms if getattr(self, name)]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} exclude one another: keep one")
        if self.is_pretraining and self.on_overlong != "error":
            raise ValueError(
                f"on_overlong {self.on_overlong} has no effect with is_pretraining, which cuts "
                "documents into blocks: remove it"
            )
        return self

    @model_validator(mode="after")
    def _check_recomputation(self) -> Self:
        if self.selective_activation_checkpointing and not self.activation_checkpointing:
            raise ValueError(
                "selective_activation_checkpointing has no effect without "
                "activation_checkpointing: set activation_checkpointing"
            )
        return self

    @model_validator(mode="after")
    def _check_blocks(self) -> Self:
        for name in ("block_size", "document_column_name"):
            if getattr(self, name) is not None and not self.is_pretraining:
                raise ValueError(f"{name} has no effect without is_pretraining: set is_pretraining")
        if not self.is_pretraining:
            return self
        if self.block_size is None:
            raise ValueError("is_pretraining needs block_size: set it, for instance to max_seq_len")
        if self.block_size > self.max_seq_len:
            raise ValueError(
                f"block_size {self.block_size} must be at most max_seq_len {self.max_seq_len}: "
                "lower block_size or raise max_seq_len"
            )
        return self

    @model_validator(mode="after")
    def _check_mode(self) -> Self:
        limits = {"epoch": "num_epochs", "step": "max_steps", "token": "max_tokens"}
        own = limits.get(self.training_mode)
        if own in ("max_steps", "max_tokens") and getattr(self, own) is None:
            raise ValueError(f"training_mode {self.training_mode} needs {own}: set it")
        for name in limits.values():
            if name != own and getattr(self, name) is not None:
                raise ValueError(
                    f"{name} {getattr(self, name)} has no effect in training_mode "
                    f"{self.training_mode}: remove it or change training_mode"
                )
        if self.training_mode == "infinite" and self.lr_scheduler not in ENDLESS_SCHEDULES:
            raise ValueError(
                f"lr_scheduler {self.lr_scheduler} needs an end, training_mode infinite has none: "
                f"use one of {', '.join(ENDLESS_SCHEDULES)}"
            )
        return self

    @model_validator(mode="after")
    def _check_trackers(self) -> Self:
        for name, needed in (
            ("wandb_entity", "wandb_project"),
            ("wandb_run_name", "wandb_project"),
            ("mlflow_experiment_name", "mlflow_tracking_uri"),
            ("mlflow_run_name", "mlflow_tracking_uri"),
        ):
            if getattr(self, name) is not None and getattr(self, needed) is None:
                raise ValueError(f"{name} has no effect without {needed}: set {needed}")
        return self

    @property
    def text_decides(self) -> bool:
        """Whether retention text has a part in the result, and is not only measured on."""
        return (
            self.split_by == "activations"
            or self.rank_allocation == "adaptive"
            or self.replay_ratio > 0
        )

    @property
    def has_validation(self) -> bool:
        """Whether there is data to validate on."""
        return self.validation_data_path is not None or self.validation_split > 0

    @model_validator(mode="after")
    def _check_validation(self) -> Self:
        if self.validation_data_path is not None and self.validation_split > 0:
            raise ValueError(
                f"validation_split {self.validation_split} and validation_data_path exclude each "
                "other: keep one of them"
            )
        for name in ("validation_frequency", "validate_at_epoch", "save_best_val_loss"):
            if getattr(self, name) and not self.has_validation:
                raise ValueError(
                    f"{name} has no effect without validation data: set validation_split or "
                    "validation_data_path"
                )
        if self.val_loss_improvement_threshold > 0 and not self.save_best_val_loss:
            raise ValueError(
                "val_loss_improvement_threshold has no effect without save_best_val_loss: set "
                "save_best_val_loss"
            )
        at_final = self.validate_at_final and self.training_mode != "infinite"
        if self.has_validation and not (
            self.validation_frequency or self.validate_at_epoch or at_final
        ):
            raise ValueError(
                "the validation data is never used: set validation_frequency, validate_at_epoch "
                "or validate_at_final (a run without end has no final step)"
            )
        return self


class RunParameters(Parameters):
    """Which run this is, and what to do with one that is already in the folder."""

    run_id: Annotated[Text, Field(max_length=128)] | None = None
    """Identity of the run: the OSFTJob's uid. Absent: a fingerprint of data, arguments, model."""
    attempt: int = Field(default=1, ge=1, le=1_000_000)
    """Which try of the run this is; a save by an older attempt is refused."""
    on_existing_run: Literal["resume", "restart", "error"] = "resume"
    """What to do with another run's results in ckptOutputDir. resume: continue if data, arguments
    and model are the same, else an error. restart: move them to previous-N/. error: refuse."""


class LaunchParameters(Parameters):
    """Processes and rendezvous, as torchrun names them. Absent: PET_* from the environment."""

    nproc_per_node: int | Literal["auto", "gpu"] | None = Field(default=None)
    """Processes on this node. auto: one per GPU, or one without GPUs. gpu: one per GPU."""
    nnodes: int | None = Field(default=None, ge=1, le=1000)
    """Number of nodes."""
    node_rank: int | None = Field(default=None, ge=0, le=999)
    """Number of this node, from 0; node 0 hosts the rendezvous."""
    rdzv_id: str | int | None = None
    """Name of the rendezvous, equal on all nodes."""
    rdzv_endpoint: Annotated[str, Field(max_length=512)] | None = None
    """HOST:PORT of a c10d rendezvous. Excludes master_addr. For closed networks only: torch
    unpickles what whoever reaches this port writes there. One node opens no such port."""
    master_addr: Annotated[str, Field(max_length=512)] | None = None
    """Host of node 0 for a static rendezvous. Excludes rdzv_endpoint."""
    master_port: int | None = Field(default=None, ge=1, le=65535)
    """Port of node 0 for a static rendezvous."""
    metrics_port: int | None = Field(default=None, ge=1, le=65535)
    """Port on which local rank 0 serves /progress and /metrics. Absent: not served."""

    @model_validator(mode="after")
    def _check_rendezvous(self) -> Self:
        if self.rdzv_endpoint is not None and self.master_addr is not None:
            raise ValueError(
                f"rdzv_endpoint {self.rdzv_endpoint!r} (c10d) and master_addr "
                f"{self.master_addr!r} (static) exclude each other: give one of them"
            )
        if isinstance(self.nproc_per_node, int) and not 1 <= self.nproc_per_node <= 1024:
            raise ValueError(
                f"nproc_per_node {self.nproc_per_node} must be 1 to 1024, 'auto' or 'gpu'"
            )
        return self
