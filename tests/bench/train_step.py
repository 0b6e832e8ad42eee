"""Step time of osft beside plain fine-tuning and PEFT's OSF: one model, one batch, one process.

`make bench` prints a table of ratios to plain fine-tuning. The methods take turns (A B C, A B C,
...), so that a busy machine slows all of them alike; the spread is over the rounds. Random weights:
speed does not depend on them.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from osft_trainer.model import convert
from osft_trainer.targets import plan_targets

Step = Callable[[], None]
RATIO = 0.25


def base_model(hidden: int, layers: int) -> PreTrainedModel:
    """A Llama of this width and depth, MLP 3.5 times as wide, as Llama-3's."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=4096,
            hidden_size=hidden,
            intermediate_size=hidden * 7 // 2,
            num_hidden_layers=layers,
            num_attention_heads=8,
            num_key_value_heads=8,
        )
    )


def osft_step(model: PreTrainedModel, tokens: torch.Tensor, form: str) -> Step:
    """One optimizer step of our trainer's model, form `plain` trains everything."""
    plain = form == "plain"
    plan = plan_targets(
        model,
        1.0 if plain else RATIO,
        "exact" if plain else form,
        None,
        "all" if plain else "frozen",
    )
    converted = convert(model, plan)
    parameters = list(converted.trainables().values())
    optimizer = torch.optim.AdamW(parameters, lr=1e-5)
    positions = torch.arange(tokens.shape[1])[None]

    def step() -> None:
        loss = converted(input_ids=tokens, position_ids=positions, labels=tokens)
        (loss / tokens.numel()).backward()
        converted.project_gradients()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        converted.finish_step()
        optimizer.zero_grad()

    return step


def peft_step(model: PreTrainedModel, tokens: torch.Tensor) -> Step:
    """One optimizer step of PEFT's OSF at the same share of free directions."""
    from peft import OSFConfig, get_peft_model

    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    tuned = get_peft_model(model, OSFConfig(effective_rank=1 - RATIO, target_modules=names))
    parameters = [p for p in tuned.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5)

    def step() -> None:
        tuned(input_ids=tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    """Time the methods in turns and print ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    base = base_model(arguments.hidden, arguments.layers)
    tokens = torch.randint(4096, (1, arguments.tokens))
    steps: dict[str, Step] = {
        "plain fine-tuning": osft_step(copy.deepcopy(base), tokens, "plain"),
        "osft exact": osft_step(copy.deepcopy(base), tokens, "exact"),
        "osft factored": osft_step(copy.deepcopy(base), tokens, "factored"),
        "PEFT OSF": peft_step(copy.deepcopy(base), tokens),
    }
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(arguments.rounds + 1):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            if turn > 0:  # the first one warms up
                seconds[name].append(time.perf_counter() - began)
    plain = seconds["plain fine-tuning"]
    print(
        f"{sum(p.numel() for p in base.parameters()) / 1e6:.0f} M weights, "
        f"{arguments.tokens} tokens a step, ratio {RATIO}, {torch.get_num_threads()} threads"
    )
    print(f"{'':<20}{'seconds':>10}{'x plain':>10}{'spread':>16}")
    for name, times in seconds.items():
        ratios = [mine / theirs for mine, theirs in zip(times, plain, strict=True)]
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        print(
            f"{name:<20}{statistics.median(times):>10.3f}{statistics.median(ratios):>10.2f}"
            f"{spread:>16}"
        )


if __name__ == "__main__":
    main()
