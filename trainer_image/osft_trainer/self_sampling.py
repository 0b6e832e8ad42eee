"""Text that a model writes itself, as a picture of what it knows.

Lives here: sampling conversations by the model's own chat template: the model is given the
beginning of a user's turn, writes the question, then answers it (as Xu et al., 2024, do to collect
instructions), each up to where the template ends such a turn; and sampling documents, from their
first token. Called by `retention` where the user has no text of the old skills. Must never: change
the model or the process's random numbers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from osft_trainer.chat_template import ASKED, ChatTemplate
from osft_trainer.forward import evaluating
from osft_trainer.turn_ends import Stop, TurnEnds

AT_ONCE = 64
"""Most samples that are written together."""
CACHE_BYTES = 4 * 2**30
"""Most that keys and values hold while they are written, unless a single sample needs more. Fixed,
so that a seed gives the same text whatever else lies on the device."""
_MARK = "OSFTMARK"
"""Stands for a user's words in a rendered template; what is before it begins a user's turn."""
_MARK_OF_THOUGHTS = "OSFTTHINKS"
_MOST_ROUNDS_WITHOUT_TEXT = 3

Sample = dict[str, object]
"""A row of data."""
_Round = Callable[[int], list[tuple[Sample, int]]]
"""Writes about so many samples; gives each with its number of tokens."""


def sample_conversations(
    hf: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    tokens: int,
    max_seq_len: int,
    seed: int,
) -> list[Sample]:
    """Conversations of one question and one answer, at temperature 1, until there is enough.

    Args:
        hf: the loaded model; used in evaluation mode and left as it was.
        tokenizer: its tokenizer, with a chat template.
        tokens: how many tokens to write, about.
        max_seq_len: most tokens of a conversation.
        seed: of the draws; equal seeds give equal text on equal hardware.

    Raises:
        ValueError: if the model writes nothing that the template can show.
    """
    form = _Form.of(tokenizer)
    ends = _ends(hf, tokenizer)

    def converse(count: int) -> list[tuple[Sample, int]]:
        begins = [form.begin] * count
        asked = _continue(hf, tokenizer, begins, max_seq_len // 2, ends, form.question)
        questions = [form.question.cut(_text(tokenizer, ids)) for ids in asked]
        chats = [[{"role": "user", "content": q}] for q in questions if q.strip()]
        prompts = [form.template.prompted(form.template.adapted(chat)) for chat in chats]
        answers = _answers(hf, tokenizer, prompts, max_seq_len, ends, form.answer)
        found: list[tuple[Sample, int]] = []
        for chat, prompt, answer in zip(chats, prompts, answers, strict=True):
            message = form.message_of(tokenizer, answer)
            if message["content"].strip():
                # With the token that ends the answer, which the text will have.
                length = len(_ids(tokenizer, prompt)) + len(answer) + 1
                found.append(({"messages": [*chat, message]}, length))
        return found

    return _until_enough(hf, converse, tokens, max_seq_len, seed)


def sample_documents(
    hf: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    column: str,
    tokens: int,
    max_seq_len: int,
    seed: int,
) -> list[Sample]:
    """Documents from their first word on, as `sample_conversations`; the text is in `column`."""
    ends = _ends(hf, tokenizer)

    def write(count: int) -> list[tuple[Sample, int]]:
        written = _continue(hf, tokenizer, [""] * count, max_seq_len, ends, Stop())
        texts = [_text(tokenizer, ids) for ids in written]
        return [({column: text}, len(_ids(tokenizer, text))) for text in texts if text.strip()]

    return _until_enough(hf, write, tokens, max_seq_len, seed)


def samples_at_once(hf: PreTrainedModel, length: int) -> int:
    """How many sequences of so many tokens may be written together, by their keys and values."""
    config = hf.config.get_text_config()
    heads: int = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width: int = (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    layers: int = config.num_hidden_layers
    a_token = 2 * layers * heads * width * hf.dtype.itemsize
    fitting: int = CACHE_BYTES // (a_token * length)
    return max(1, min(AT_ONCE, fitting))


def _until_enough(
    hf: PreTrainedModel, write: _Round, tokens: int, max_seq_len: int, seed: int
) -> list[Sample]:
    found: list[Sample] = []
    written, empty = 0, 0
    at_once = samples_at_once(hf, max_seq_len)
    with _undisturbed(hf, seed):
        while written < tokens:
            pairs = write(at_once)
            found += [sample for sample, _ in pairs]
            written += sum(length for _, length in pairs)
            empty = 0 if pairs else empty + 1
            if empty >= _MOST_ROUNDS_WITHOUT_TEXT:
                raise ValueError(
                    "retention_data_path: the model writes nothing by itself to take instead; give "
                    "a file with text of the old skills"
                )
    return found


@dataclass(frozen=True)
class _Form:
    """How a conversation begins, and where its turns end, as the chat template writes them.

    A user's turn need not end in the token that ends the model's own: some templates go on with the
    assistant's header at once, as a token or as plain text.
    """

    template: ChatTemplate
    begin: str
    """Up to the user's first word."""
    question: Stop
    answer: Stop
    plain: tuple[str, ...]
    """What the model writes before an answer; none: the template writes it otherwise."""
    thinking: tuple[str, ...]
    """What it writes before thoughts, and between them and the answer; none as above."""

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> _Form:
        """Find out once.

        Raises:
            ValueError: there is no template, or it does not show what a user says.
        """
        if tokenizer.chat_template is None:
            raise ValueError(
                "retention_data_path: the tokenizer has no chat template, so the model cannot be "
                "asked for conversations; give a file with text of the old skills"
            )
        template = ChatTemplate(tokenizer)
        asked = template.adapted([{"role": "user", "content": _MARK}])
        before, mark, _ = template.render(asked, None).partition(_MARK)
        if not mark:
            raise ValueError(
                "retention_data_path: the chat template shows no user's words, so the model cannot "
                "be asked for text; give a file with text of the old skills"
            )
        ends = TurnEnds(tokenizer, template)
        answer = {"role": "assistant", "content": _MARK}
        thoughts = {template.thoughts or "": _MARK_OF_THOUGHTS}
        return cls(
            template,
            before,
            ends.of_question(),
            ends.of_answer(),
            _scaffold(template, answer, _MARK),
            _scaffold(template, answer | thoughts, _MARK_OF_THOUGHTS, _MARK),
        )

    def message_of(self, tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> dict[str, str]:
        """The assistant's message that these tokens are: its thoughts, if it has any, told apart.

        Without control tokens, but where they tell the two apart.
        """
        whole = self.answer.cut(_text(tokenizer, ids, with_special_tokens=True))
        content, thoughts = self.answer.cut(_text(tokenizer, ids)), ""
        if self.thinking and whole.startswith(self.thinking[0]) and self.thinking[1] in whole:
            begun = whole.removeprefix(self.thinking[0])
            thoughts, _, content = map(_clean(tokenizer), begun.partition(self.thinking[1]))
        elif self.plain and self.plain[0] and whole.startswith(self.plain[0]):
            content = _clean(tokenizer)(whole.removeprefix(self.plain[0]))
        message = {"role": "assistant", "content": content}
        return message | ({str(self.template.thoughts): thoughts} if thoughts.strip() else {})


def _scaffold(template: ChatTemplate, answer: dict[str, str], *marks: str) -> tuple[str, ...]:
    """What the template writes before each mark of an answer, from the prompt's end on."""
    prompt = template.prompted(template.adapted([ASKED]))
    text = template.tried([ASKED, answer])
    found = []
    for mark in marks:
        written, mark_found, rest = text.removeprefix(prompt).partition(mark)
        if not mark_found or not text.startswith(prompt):
            return ()
        found.append(written)
        text = prompt + rest
    return tuple(found)


def _clean(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], str]:
    """Takes the special tokens out of a text."""
    special = sorted(set(tokenizer.all_special_tokens), key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, special)) or r"(?!)")
    return lambda text: pattern.sub("", text)


def _answers(
    hf: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_seq_len: int,
    ends: Sequence[int],
    stop: Stop,
) -> list[list[int]]:
    """An answer to each, in tokens; an empty one where the question leaves no room."""
    lengths = [len(_ids(tokenizer, prompt)) for prompt in prompts]
    # Others than the tokens that were drawn: the words of a question may have several spellings.
    fitting = [number for number, length in enumerate(lengths) if length < max_seq_len]
    answers: list[list[int]] = [[] for _ in prompts]
    if fitting:
        room = max_seq_len - max(lengths[number] for number in fitting)
        asked = [prompts[number] for number in fitting]
        written = _continue(hf, tokenizer, asked, room, ends, stop)
        for number, answer in zip(fitting, written, strict=True):
            answers[number] = answer
    return answers


def _continue(
    hf: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    length: int,
    ends: Sequence[int],
    stop: Stop,
) -> list[list[int]]:
    """Sample the tokens that follow each prompt, up to one that ends the turn.

    Args:
        hf: the model.
        tokenizer: its own.
        prompts: one or more.
        length: most tokens to write.
        ends: tokens that end any turn.
        stop: what ends this one, beside them.
    """
    # A template may begin with the user's words; the model still needs a first token.
    start = tokenizer.bos_token_id or tokenizer.eos_token_id or 0
    rows = [_ids(tokenizer, prompt) or [start] for prompt in prompts]
    widest = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), widest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for place, row in enumerate(rows):
        # Left-padded: what is written follows the last word at once.
        ids[place, widest - len(row) :] = torch.tensor(row)
        mask[place, widest - len(row) :] = 1
    last = [*ends, *([tokenizer.convert_tokens_to_ids(stop.token)] if stop.token else [])]
    by_text = {"stop_strings": [stop.text], "tokenizer": tokenizer} if stop.text else {}
    out: Tensor = hf.generate(
        input_ids=ids.to(hf.device),
        attention_mask=mask.to(hf.device),
        max_new_tokens=length,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        pad_token_id=tokenizer.eos_token_id,
        eos_token_id=last,
        **by_text,
    )
    return [_before_any(row, last) for row in out[:, widest:].tolist()]


def _text(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], with_special_tokens: bool = False
) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=not with_special_tokens))


def _before_any(ids: list[int], ends: Sequence[int]) -> list[int]:
    """The ids as far as the first of these."""
    return ids[: next((place for place, each in enumerate(ids) if each in ends), len(ids))]


def _ends(hf: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends a turn, as the model's folder names them."""
    named = hf.generation_config.eos_token_id if hf.generation_config is not None else None
    ends = {named} if isinstance(named, int) else set(named or [])
    if tokenizer.eos_token_id is not None:
        ends.add(tokenizer.eos_token_id)
    return sorted(ends)


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    # The template has written the special tokens already.
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


@contextmanager
def _undisturbed(hf: PreTrainedModel, seed: int) -> Iterator[None]:
    """Evaluation mode and random numbers of our own; both as before afterwards."""
    devices = [hf.device] if hf.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad(), evaluating(hf):
        torch.manual_seed(seed)
        yield
